"""Merge LoRA branches into one adapter or one full model, layer by layer.

Dimensions: M branches, r rank, (out, in) the shape of a linear layer. ΔW = scale · B A, A (r, in),
B (out, r).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from expunge.adapter_files import adapter_config, write_adapter
from expunge.config import Section
from expunge.errors import MergeError
from expunge.lora import LoraLinear
from expunge.merge.branches import Branch, read_branches, same_ranks
from expunge.merge.methods import METHODS, Vote, combine, tensor_rng, truncated
from expunge.merge.stream import Stored, add, check_fits, write_model
from expunge.merge.tally import Tally
from expunge.progress import Bar, progress
from expunge.registry import lookup

Pair = tuple[Tensor, Tensor]


class Merge(Section):
    """How the branches become one."""

    of: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the branches to merge, in order; null takes every branch."""

    method: str = "ties"
    """A name in merge.methods.METHODS."""

    density: float = Field(default=0.8, gt=0, le=1)
    """Share of each tensor to keep, for the methods that trim or drop."""

    weights: tuple[float, ...] | None = None
    """One weight a branch; null means 1 each."""

    vote: Vote = "unweighted"
    """Elect signs before weighting (peft) or after (mergekit)."""

    normalize: bool = False
    """Divide by the weights that took part; only for `space: delta`."""

    space: Literal["factors", "delta"] = "factors"
    """`factors`: A's and B's are merged apart, as peft and the published system do; stays an
    adapter of the same rank. `delta`: the operator itself, on ΔW = scale · B A."""

    output: Literal["adapter", "model"] = "adapter"
    """`adapter`: a peft folder. `model`: a full model folder, which needs the base."""

    rank: int | None = Field(default=None, ge=1)
    """Rank of an adapter made in delta space; null means the sum of the branches' ranks."""

    seed: int = Field(default=42, ge=0)
    """Seeds what the methods drop at random."""

    @field_validator("weights")
    @classmethod
    def _usable(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if weights is not None and not (any(weights) and all(map(math.isfinite, weights))):
            raise ValueError("weights must be finite and not all zero")
        return weights

    @model_validator(mode="after")
    def _consistent(self) -> "Merge":
        lookup(METHODS, self.method, "merge method")
        if self.normalize and self.space == "factors":
            raise ValueError("normalize needs space: delta, since factors carry roots of weights")
        if self.rank is not None and (self.space, self.output) != ("delta", "adapter"):
            raise ValueError("rank needs space: delta and output: adapter; elsewhere it is given")
        return self


def merge_adapters(
    branches: Sequence[Path], config: Merge, out: Path, *, base: Path | None = None
) -> dict[str, Any]:
    """Merge the adapter folders `branches` as `config` says into the folder `out`; report on it.

    The report: `layers`, `norm` of the merged delta and `cosine` of it to each branch (over the
    whole model), `truncation_error` (relative, Frobenius; None where nothing was cut) and
    `storage_survival` (share of the weights with a delta whose stored value changed; None for an
    adapter).
    """
    read = _read(branches, config)
    if config.output == "model" and base is None:
        raise MergeError("output: model needs the base model that the branches were trained on")
    if base is not None:
        check_fits(base, {layer: read[0].shape(layer) for layer in read[0].factors})
    if out.is_dir() and any(out.iterdir()):
        raise MergeError(f"{out} exists and is not empty; choose another folder")
    tally = Tally(read)
    with progress("merge", len(read[0].factors), "layers") as bar:
        if config.output == "model":
            assert base is not None

            def delta_of(layer: str) -> Tensor:
                delta = _delta(read, config, layer)
                tally.count(layer, delta)
                bar()
                return delta

            tally.stored = write_model(base, read[0].factors, delta_of, out)
        else:
            _write_merged_adapter(read, config, out, str(base or read[0].base), tally, bar)
    return tally.report()


def merged_deltas(branches: Sequence[Path], config: Merge) -> Iterator[tuple[str, Tensor]]:
    """Yield (layer name, merged float32 ΔW (out, in)) of each layer, exact in either space."""
    read = _read(branches, config)
    for layer in read[0].factors:
        yield layer, _delta(read, config, layer)


@contextmanager
def apply_deltas(model: nn.Module, deltas: Iterable[tuple[str, Tensor]]) -> Iterator[Stored]:
    """Within this block the linear layers of `model` hold W + ΔW; afterwards W, bit for bit.

    Rounds as a written model would. Yields what survived rounding.
    """
    stored = Stored()
    originals: list[Pair] = []
    try:
        for name, delta in deltas:
            weight = _linear_weight(model, name, delta).data
            originals.append((weight, weight.clone()))
            weight.copy_(add(weight, delta.to(weight.device), stored))
        yield stored
    finally:
        for weight, original in originals:
            weight.copy_(original)


def _read(folders: Sequence[Path], config: Merge) -> list[Branch]:
    branches = read_branches(folders)
    if config.weights is not None and len(config.weights) != len(branches):
        raise MergeError(
            f"{len(config.weights)} weights were given for {len(branches)} branches; give one each"
        )
    if config.space == "factors":
        same_ranks(branches)
    return branches


def _weights(branches: Sequence[Branch], config: Merge) -> tuple[float, ...]:
    return config.weights or (1.0,) * len(branches)


def _delta(branches: Sequence[Branch], config: Merge, layer: str) -> Tensor:
    """The merged ΔW of one layer: (out, in)."""
    if config.space == "factors":
        a, b = _merged_factors(branches, config, layer)
        return b @ a
    return combine(
        torch.stack([branch.delta(layer) for branch in branches]),  # (M, out, in)
        METHODS[config.method],
        tensor_rng(config.seed, layer),
        weights=_weights(branches, config),
        density=config.density,
        vote=config.vote,
        normalize=config.normalize,
    )


def _merged_factors(branches: Sequence[Branch], config: Merge, layer: str) -> Pair:
    """A's merged with A's and B's with B's: (r, in), (out, r), to be used with scale 1.

        weight of A_i: sign(w_i) √|w_i s_i|,   weight of B_i: √|w_i s_i|,   s_i the scale

    so that one branch alone comes out as w s B A. With several, cross-terms B_i A_j appear.

    Source: peft add_weighted_adapter.
    """
    roots = [
        math.copysign(math.sqrt(abs(weight) * branch.scales[layer]), weight)
        for weight, branch in zip(_weights(branches, config), branches, strict=True)
    ]

    def merge(which: int, letter: str, weights: Sequence[float]) -> Tensor:
        return combine(
            torch.stack([branch.factors[layer][which] for branch in branches]),
            METHODS[config.method],
            tensor_rng(config.seed, f"{layer}.lora_{letter}"),
            weights=weights,
            density=config.density,
            vote=config.vote,
        )

    return merge(0, "A", roots), merge(1, "B", [abs(root) for root in roots])


def _write_merged_adapter(
    branches: Sequence[Branch], config: Merge, out: Path, base: str, tally: Tally, bar: Bar
) -> None:
    """Write a peft folder with scale 1 at every layer (α = r)."""
    tensors, ranks = {}, {}
    for layer in branches[0].factors:
        if config.space == "factors":
            a, b = _merged_factors(branches, config, layer)
            tally.count(layer, b @ a)
        else:
            a, b = _low_rank(branches, config, layer, tally)
        ranks[layer] = len(a)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = b.contiguous()
        bar()
    rank = max(ranks.values())
    fields = adapter_config(list(ranks), base, rank=rank, alpha=rank)
    fields["rank_pattern"] = {layer: r for layer, r in ranks.items() if r != rank}
    fields["alpha_pattern"] = fields["rank_pattern"]
    write_adapter(tensors, fields, out)


def _low_rank(branches: Sequence[Branch], config: Merge, layer: str, tally: Tally) -> Pair:
    """Factors of the merged ΔW of one layer: exact for a sum that fits the rank, else truncated."""
    delta = _delta(branches, config, layer)
    tally.count(layer, delta)
    exact = sum(branch.rank(layer) for branch in branches)
    rank = min(config.rank or exact, *delta.shape)
    if METHODS[config.method].linear and rank >= exact:
        return _concatenated(branches, config, layer)
    a, b = truncated(delta, rank)
    tally.cut(delta, b @ a)
    return a, b


def _concatenated(branches: Sequence[Branch], config: Merge, layer: str) -> Pair:
    """Factors side by side, whose product is the weighted sum of the deltas exactly."""
    weights = _weights(branches, config)
    total = sum(map(abs, weights)) if config.normalize else 1.0
    pairs = [branch.factors[layer] for branch in branches]
    scales = [w / total * b.scales[layer] for w, b in zip(weights, branches, strict=True)]
    a = torch.cat([a for a, _ in pairs])  # (Σr, in)
    return a, torch.cat([s * b for s, (_, b) in zip(scales, pairs, strict=True)], dim=1)


def _linear_weight(model: nn.Module, name: str, delta: Tensor) -> Tensor:
    """The weight of a linear layer that `delta` fits, beneath its adapter if it has one."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise MergeError(f"the branches adapt {name}, which the model does not have") from None
    layer = layer.base if isinstance(layer, LoraLinear) else layer
    if not isinstance(layer, nn.Linear) or layer.weight.shape != delta.shape:
        raise MergeError(f"{name} does not have the shape {tuple(delta.shape)} in the model")
    shared = [m for m in model.modules() if getattr(m, "weight", None) is layer.weight]
    if len(shared) > 1:
        raise MergeError(f"{name} shares its weight with another layer, so it cannot be changed")
    return layer.weight
