"""Which blocks of which models run as one function, and when.

Dimensions: T tokens of a pack, d width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from expunge import parallel
from expunge.attention import SHORT
from expunge.fused.block import LAYERS, Form, block
from expunge.products import FastLinear

FAMILIES = ("llama", "mistral", "qwen2")
"""Of transformers: their blocks are built alike, but for biases and windows."""

_fused: dict[type, type] = {}


def fuse(model: nn.Module) -> None:
    """Let each block of `model` that is one of FAMILIES' run as one function where it may."""
    for module in model.modules():
        kind: Any = type(module)
        if _is_known(module, kind):
            # Of the same name: what shards a model asks for blocks by theirs.
            _fused.setdefault(kind, type(kind.__name__, (FusedBlock, kind), {}))
            module.__class__ = _fused[kind]


def _is_known(module: Any, kind: type) -> bool:
    """Whether a module is a block of FAMILIES whose MLP is gated by SiLU."""
    family = kind.__module__.removeprefix("transformers.models.").split(".")[0]
    named = family in FAMILIES and kind.__name__.lower() == f"{family}decoderlayer"
    return named and type(module.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


class FusedBlock(nn.Module):
    """A block that is trained on a CPU in bfloat16 as one function, and else runs as it did."""

    def forward(self, hidden_states: Tensor, *given: Any, **options: Any) -> Any:
        """The block's own arguments and result: (1, T, d) to (1, T, d)."""
        form = None if given else _form(self, hidden_states, options)
        if form is None:
            return super().forward(hidden_states, *given, **options)
        cos, sin = (one[0] for one in options["position_embeddings"])
        this: Any = self
        norms = this.input_layernorm.weight, this.post_attention_layernorm.weight
        layers = [_parts(layer) for layer in _linear(self)]
        return block(hidden_states[0], cos, sin, form, norms, layers)[None]  # pyright: ignore


def _form(block: Any, x: Tensor, options: dict[str, Any]) -> Form | None:
    """How to run a block as one function; None where it runs as it did."""
    lengths, attention = options.get("lengths"), block.self_attn
    if (
        lengths is None
        or options.get("past_key_values") is not None
        or not torch.is_grad_enabled()
        or parallel.world() > 1
        or x.device.type != "cpu"
        or max(lengths) > min(SHORT, _window(attention))
        or (block.training and attention.attention_dropout)
    ):
        return None
    layers, norms = _linear(block), (block.input_layernorm, block.post_attention_layernorm)
    bases = [getattr(layer, "base", layer) for layer in layers]
    if not all(map(_is_plain, bases)):
        return None
    weights = [norm.weight for norm in norms]
    weights += [part for base in bases for part in (base.weight, base.bias) if part is not None]
    kind = _factors_alone(layers, weights, x) or _every_weight(layers, weights, x)
    parts = (attention, block.mlp, block.mlp.act_fn, *norms, *layers, *bases)
    if kind is None or any(map(_watched, parts)):
        return None
    scales = tuple(getattr(layer, "kept_scale", 1.0) for layer in layers)
    dropping = tuple(getattr(layer, "dropping", 0.0) for layer in layers)
    eps = (norms[0].variance_epsilon, norms[1].variance_epsilon)
    return Form(lengths, attention.head_dim, attention.scaling, eps, scales, dropping, kind)


def _factors_alone(layers: list[Any], weights: list[Tensor], x: Tensor) -> torch.dtype | None:
    """The type of products where low-rank factors are trained and nothing else is."""
    adapted = [layer for layer in layers if hasattr(layer, "lora_A")]
    learns = any(layer.lora_A.requires_grad or layer.lora_B.requires_grad for layer in adapted)
    alone = learns and not any(part.requires_grad for part in weights)
    return x.dtype if alone and all(layer.joins(x) for layer in adapted) else None


def _every_weight(layers: list[Any], weights: list[Tensor], x: Tensor) -> torch.dtype | None:
    """The type of products where every weight is trained under autocast."""
    if any(hasattr(layer, "lora_A") for layer in layers) or not torch.is_autocast_enabled("cpu"):
        return None
    wide = all(part.dtype == torch.float32 and part.requires_grad for part in (x, *weights))
    kind = torch.get_autocast_dtype("cpu")
    return kind if wide and kind == torch.bfloat16 else None


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its product and nothing more."""
    return type(layer) in (nn.Linear, FastLinear) and not hasattr(layer.weight, "ds_id")


def _linear(block: Any) -> list[nn.Module]:
    """The layers of a block, in the order of LAYERS."""
    return [getattr(block.mlp, name, None) or getattr(block.self_attn, name) for name in LAYERS]


def _parts(layer: Any) -> tuple[Tensor | None, ...]:
    """(W, b, A, B) of a layer, None what it lacks."""
    if not hasattr(layer, "lora_A"):
        return layer.weight, layer.bias, None, None
    factors = (layer.lora_A, layer.lora_B) if layer.enabled else (None, None)
    return layer.base.weight, layer.base.bias, *factors


def _window(attention: Any) -> float:
    """Tokens that one looks back on at most."""
    given = (attention, attention.config) if hasattr(attention, "config") else (attention,)
    found = [getattr(one, "sliding_window", None) for one in given]
    return min((window for window in found if window), default=math.inf)


def _watched(part: nn.Module) -> bool:
    """Whether somebody waits for this part to be called."""
    hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks
    return any(hooks) or bool(part._backward_pre_hooks)
