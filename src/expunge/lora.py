"""LoRA: low-rank adapters that do only the necessary arithmetic.

Dimensions: r rank, (out, in) the shape of a linear layer. ΔW = scale · B A, A (r, in), B (out, r).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge import parallel
from expunge.adapter_files import (
    PREFIX,
    adapter_config,
    adapter_scales,
    read_adapter,
    write_adapter,
)
from expunge.config import Section
from expunge.errors import LeftOutError, ModelError
from expunge.linear import chosen_layers, is_linear, is_transposed, shape_of
from expunge.low_rank import adapted, keep_mask, with_term

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Lora(Section):
    """A low-rank adapter."""

    rank: int = Field(default=32, ge=1)
    """r, the rank of each update."""

    alpha: float = Field(default=32, gt=0)
    """Numerator of the scale α/r."""

    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the inputs of A that is dropped in training."""

    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Last names of the linear layers to adapt; null means every one but the head."""

    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Blocks to adapt, counted from 0; null means all."""

    @property
    def shape(self) -> tuple[object, ...]:
        """What another adapter must agree in to be trained further as this one."""
        return self.rank, self.alpha, self.targets, self.layers


class LoraLinear(nn.Module):
    """A frozen linear layer plus scale · B A x while `enabled`."""

    def __init__(self, base: nn.Linear, lora: Lora) -> None:
        super().__init__()
        self.base = base
        self.scale = lora.alpha / lora.rank
        self.dropout = lora.dropout
        self.enabled = True
        place = base.weight.device
        out, inner = shape_of(base)
        self.lora_A = nn.Parameter(torch.empty(lora.rank, inner, device=place))
        self.lora_B = nn.Parameter(torch.zeros(out, lora.rank, device=place))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def __getattr__(self, name: str) -> Any:
        """No weight: a model that reads it, and does not call the layer, leaves the adapter out."""
        if name != "weight":
            return super().__getattr__(name)
        raise LeftOutError(
            "the model reads the weight of an adapted layer itself, so the adapter would be "
            "left out; name other layers in lora.targets"
        )

    def forward(self, x: Tensor) -> Tensor:
        """W x + b, plus the low-rank term: (..., in) to (..., out)."""
        if not self.enabled:
            return self.base(x)
        if not self.dropping and self.joins(x):
            given = self.base.weight, self.base.bias, self.lora_A, self.lora_B
            return adapted(x, *given, self.scale)
        y = self.base(x)
        if self.dropping:
            x = x * keep_mask(x, self.dropping)
        return with_term(x.to(y.dtype), y, self.lora_A, self.lora_B, self.kept_scale)

    @property
    def dropping(self) -> float:
        """The share of the inputs of A that is dropped now."""
        return self.dropout if self.training else 0.0

    @property
    def kept_scale(self) -> float:
        """The scale of a term whose dropped inputs the others make up for."""
        return self.scale / (1 - self.dropping)

    def joins(self, x: Tensor) -> bool:
        """Whether the frozen layer and the low-rank term may be one function here.

        They read numbers of one type then, and the layer's own way of being called does nothing
        more than its product.
        """
        weight = self.base.weight
        return (
            x.dtype == weight.dtype == torch.bfloat16
            and not is_transposed(self.base)
            and not weight.requires_grad
            and not torch.is_autocast_enabled(x.device.type)
            and not hasattr(weight, "ds_id")  # DeepSpeed gathers it when the layer is called
        )


def add_adapter(model: PreTrainedModel, lora: Lora, *, seed: int) -> dict[str, LoraLinear]:
    """Freeze `model` and put a fresh adapter on it; at the start it changes nothing (B = 0).

    Each A is drawn from a generator seeded by `seed` and the layer's place in name order.
    """
    model.requires_grad_(False)
    chosen = target_names(model, lora)
    adapters = {}
    with torch.random.fork_rng(devices=[]):
        for number, name in enumerate(chosen):
            torch.manual_seed(seed * 100_003 + number)
            layer = LoraLinear(model.get_submodule(name), lora)  # pyright: ignore
            _replace(model, name, layer)
            adapters[name] = layer
    return adapters


def start_from(model: PreTrainedModel, folder: Path) -> None:
    """Give the adapter on `model` the factors of a peft folder of its shape, as where to begin."""
    layers, (factors, config) = adapters_of(model), read_adapter(folder)
    scales = adapter_scales(folder, factors, config)
    if layers.keys() != factors.keys():
        name = sorted(layers.keys() ^ factors.keys())[0]
        raise ModelError(f"{folder} and the branch that begins with it do not both adapt {name}")
    for name, (a, b) in factors.items():
        layer = layers[name]
        _fitting(layer.base, name, a, b, str(folder))
        if len(a) != len(layer.lora_A) or scales[name] != layer.scale:
            raise ModelError(
                f"{folder}: {name} has rank {len(a)} and scale {scales[name]:g}, where the branch "
                f"that begins with it has {len(layer.lora_A)} and {layer.scale:g}"
            )
        layer.lora_A.detach().copy_(a)
        layer.lora_B.detach().copy_(b)


def remove_adapter(model: PreTrainedModel) -> None:
    """Take every adapter off, leaving the base as it was."""
    for name, layer in adapters_of(model).items():
        _replace(model, name, layer.base)


@torch.no_grad()
def fold_adapter(model: nn.Module) -> None:
    """Add every adapter to the weights beneath it, and take it off."""
    for name, layer in adapters_of(model).items():
        weight, delta = layer.base.weight, layer.scale * (layer.lora_B @ layer.lora_A)
        weight.copy_(weight.float() + (delta.T if is_transposed(layer.base) else delta))
        _replace(model, name, layer.base)


def adapters_of(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers of `model` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The reference: within this block the adapters add nothing."""
    layers = [layer for layer in adapters_of(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def save_adapter(model: PreTrainedModel, lora: Lora, folder: Path, *, base: str) -> None:
    """Write the adapter on `model` as a peft folder; `base` is what peft should load it onto.

    Of several ranks the first writes it.
    """
    if not parallel.is_main():
        return
    tensors, layers = {}, adapters_of(model)
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().float().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().float().cpu().contiguous()
    config = adapter_config(
        sorted(layers),
        base,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        transposed=any(is_transposed(layer.base) for layer in layers.values()),
    )
    write_adapter(tensors, config, folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapter of a peft folder on `model`, for scoring or for more training."""
    factors, config = read_adapter(folder)
    scales = adapter_scales(folder, factors, config)
    model.requires_grad_(False)
    for name, (a, b) in factors.items():
        base = _fitting(_submodule(model, name, str(folder)), name, a, b, str(folder))
        rank = a.shape[0]
        layer = LoraLinear(base, Lora(rank=rank, alpha=scales[name] * rank, dropout=0.0))
        layer.lora_A.detach().copy_(a)
        layer.lora_B.detach().copy_(b)
        _replace(model, name, layer)


def swap_factors(model: nn.Module, factors: Iterable[tuple[str, Tensor, Tensor]]) -> None:
    """Make (layer name, A (r, in), B (out, r)) of scale 1 the adapter on `model`, for scoring.

    What is adapted keeps its place in memory where the rank stays; layers that are not named lose
    their adapter. Factors that do not fit leave the model as it was.
    """
    given = {name: (a, b) for name, a, b in factors}
    for name, (a, b) in given.items():
        layer = _submodule(model, name, "the merge")
        base = layer.base if isinstance(layer, LoraLinear) else layer
        _fitting(base, name, a, b, "the merge")
    model.requires_grad_(False)
    for name, layer in adapters_of(model).items():
        if name not in given:
            _replace(model, name, layer.base)
    for name, (a, b) in given.items():
        layer, rank = model.get_submodule(name), len(a)
        if not isinstance(layer, LoraLinear):
            layer = LoraLinear(cast(nn.Linear, layer), Lora(rank=rank, alpha=rank))
            _replace(model, name, layer)
        layer.scale, layer.dropout, layer.enabled = 1.0, 0.0, True
        if len(layer.lora_A) != rank:
            layer.lora_A = nn.Parameter(layer.lora_A.new_empty(a.shape))
            layer.lora_B = nn.Parameter(layer.lora_B.new_empty(b.shape))
        layer.requires_grad_(False)
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)


def target_names(model: PreTrainedModel, lora: Lora) -> list[str]:
    """Names of the linear layers to adapt, in name order; none found is an error."""
    return chosen_layers(model, lora.targets, lora.layers)


def _submodule(model: nn.Module, name: str, origin: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{origin} adapts {name}, which the model does not have") from None


def _fitting(base: nn.Module, name: str, a: Tensor, b: Tensor, origin: str) -> nn.Linear:
    if not is_linear(base) or shape_of(base) != (b.shape[0], a.shape[1]):
        raise ModelError(f"{origin}: {name} does not have the shape of the model's layer")
    return cast(nn.Linear, base)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
