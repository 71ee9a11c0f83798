"""Causal attention within each sequence of a pack.

Dimensions: T tokens of a pack, H query heads, G key-value heads (H a multiple of G), w their width,
n tokens of one sequence. Queries (1, H, T, w); keys and values (1, G, T, w).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import ModelError
from expunge.short_attention import short_attention

PACKED_ATTENTION = "expunge_packed"
"""The attention that models are loaded with; without `lengths` it is plain SDPA."""

SHORT = 512
"""Longest sequence whose n x n weights are kept for the backward pass, on a CPU in training."""


_LACKED = {"s_aux": "attention sinks", "softcap": "a soft cap on its attention scores"}
"""What some models ask of attention that neither SDPA nor ours has."""


class LackingAttention(ModelError):
    """A model asks of attention what packed attention does not have."""


class OwnAttention(ModelError):
    """A model's layers take no attention but their own, or have none."""


@cache
def register_attention() -> None:
    """Make PACKED_ATTENTION known to transformers, before a model is loaded with it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float | None
) -> Tensor:
    """softmax(scale · Q Kᵀ + causal mask) V for each of the packed sequences: (1, H, T, w).

    Keys beyond the queries are a cached prefix that every sequence sees whole.
    """
    prefix = key.shape[2] - query.shape[2]
    if not prefix and _keeps_weights(query, lengths):
        kind = _compute_type(query)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
        factor = query.shape[3] ** -0.5 if scale is None else scale
        return short_attention(query, key, value, lengths, factor)
    first_keys, first_values = key[:, :, :prefix], value[:, :, :prefix]
    parts = []
    for q, k, v in zip(
        query.split(lengths, dim=2),
        key[:, :, prefix:].split(lengths, dim=2),
        value[:, :, prefix:].split(lengths, dim=2),
        strict=True,
    ):
        mask = None
        if prefix:
            k, v = torch.cat([first_keys, k], dim=2), torch.cat([first_values, v], dim=2)
            mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(prefix)
        shared = q.shape[1] != k.shape[1]
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=not prefix, scale=scale, enable_gqa=shared
            )
        )
    return torch.cat(parts, dim=2)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within each of the packed sequences; without `lengths`, plain SDPA.

    Keys beyond the queries are a cached prefix that every sequence sees whole.
    """
    for name, what in _LACKED.items():
        if options.get(name) is not None:
            raise LackingAttention(
                f"this model has {what} ({name}), which is left out of packed attention, so its "
                "scores would be wrong; use a model without"
            )
    if lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    if options.get("sliding_window") and _longest(key, query, lengths) > options["sliding_window"]:
        raise ModelError("a sequence is longer than this model's sliding window")
    attended = causal_attention(query, key, value, lengths, scaling)
    return attended.transpose(1, 2), None


def _longest(key: Tensor, query: Tensor, lengths: tuple[int, ...]) -> int:
    """Tokens that the last query of the longest sequence looks back on, itself included."""
    return max(lengths) + key.shape[2] - query.shape[2]


def _keeps_weights(query: Tensor, lengths: tuple[int, ...]) -> bool:
    """Whether a gradient is wanted on a CPU, where torch's own passes take 1.3 times (500 tokens)
    to 2.6 times (15 tokens) as long (benchmarks/attention.py)."""
    trained = torch.is_grad_enabled() and query.requires_grad
    return trained and query.device.type == "cpu" and max(lengths) <= SHORT


def _compute_type(query: Tensor) -> torch.dtype:
    on = torch.is_autocast_enabled(query.device.type)
    return torch.get_autocast_dtype(query.device.type) if on else query.dtype
