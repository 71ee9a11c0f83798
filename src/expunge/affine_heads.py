"""Output heads with a bias or a factor, as a matrix that longer states meet.

        s (W h + b) = [W, b, 0] · [s h, s, 0]

Dimensions: N states, d width, V vocabulary. Where a head is a matrix alone, nothing is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAD = 32
"""Columns that a bias adds to the width: itself and zeros, for products of odd width are slow."""


def head_weight(model: PreTrainedModel) -> Tensor:
    """The weight of the output head itself: (V, d)."""
    return model.get_output_embeddings().weight  # pyright: ignore


def output_head(model: PreTrainedModel) -> Tensor:
    """What states meet to give logits: (V, d), d of the states that `as_head_reads` gives."""
    bias = _bias(model)
    if hasattr(model, "gathered_head"):  # its weight is sliced
        if bias is not None:
            raise ModelError(
                f"the output head of this {type(model).__name__} has a bias, which DeepSpeed "
                "ZeRO-3 leaves out here; take FSDP2"
            )
        return model.gathered_head()  # pyright: ignore
    weight = head_weight(model)
    if bias is None:
        return weight
    if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):
        return _beside(weight, bias)
    made = (weight.data_ptr(), weight._version, bias._version, weight.dtype, weight.device)
    if getattr(model, "expunge_head", (None,))[0] != made:
        model.expunge_head = (made, _beside(weight.detach(), bias.detach()))  # pyright: ignore
    return model.expunge_head[1]  # pyright: ignore


def as_head_reads(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Final hidden states as `output_head` takes them: (…, d), of the head's width."""
    bias, factor = _bias(model), _factor(model)
    if factor != 1:
        states = states * factor
    if bias is None:
        return states
    more = states.new_zeros(*states.shape[:-1], PAD)
    more[..., 0] = factor
    return torch.cat([states, more], dim=-1)


def _beside(weight: Tensor, bias: Tensor) -> Tensor:
    zeros = weight.new_zeros(len(weight), PAD - 1)
    return torch.cat([weight, bias[:, None].to(weight.dtype), zeros], dim=1)


def _bias(model: Any) -> Tensor | None:
    return getattr(model.get_output_embeddings(), "bias", None)


def _factor(model: Any) -> float:
    """s, as configs call it; packs.check_packing finds out whether that is all of it."""
    config = model.config.get_text_config()
    names = ("logit_scale", "lm_head_multiplier", "logits_scaling")
    found = (getattr(config, name, None) for name in names)
    times, more, divisor = (one if isinstance(one, int | float) and one else 1 for one in found)
    return times * more / divisor
