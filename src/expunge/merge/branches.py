"""The branches of a merge: adapter folders read, checked, and their deltas formed layer by layer.

Dimensions: M branches, r rank, (out, in) the shape of a linear layer, A (r, in), B (out, r).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from expunge.adapter_files import adapter_scales, blocks_of, read_adapter
from expunge.errors import MergeError


@dataclass(frozen=True)
class Branch:
    """One adapter: float32 factors and scale by layer."""

    folder: Path
    factors: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    base: str
    transposed: bool = False
    """Whether the base's weights lie as (in, out)."""

    def delta(self, layer: str) -> Tensor:
        """ΔW = scale · B A of one layer, in float32: (out, in)."""
        a, b = self.factors[layer]
        return (self.scales[layer] * b) @ a

    @cached_property
    def blocks(self) -> int:
        """How many blocks the model has, up to the last that is adapted."""
        return blocks_of(self.factors)

    def rank(self, layer: str) -> int:
        """r of one layer."""
        return len(self.factors[layer][0])

    def shape(self, layer: str) -> tuple[int, int]:
        """(out, in) of one layer."""
        a, b = self.factors[layer]
        return b.shape[0], a.shape[1]

    def stored(self, layer: str) -> tuple[int, int]:
        """The shape of its weight as it lies in the base."""
        out, inner = self.shape(layer)
        return (inner, out) if self.transposed else (out, inner)


def read_branches(folders: Sequence[Path]) -> list[Branch]:
    """Read adapter folders that can be merged: same layers, same shapes, all numbers finite."""
    if not folders:
        raise MergeError("a merge needs at least one branch, and none was given")
    branches = [_read_branch(Path(folder)) for folder in folders]
    first = branches[0]
    for other in branches[1:]:
        for one, two in ((first, other), (other, first)):
            missing = sorted(one.factors.keys() - two.factors.keys())
            if missing:
                raise MergeError(
                    f"{two.folder} does not adapt {missing[0]}, which {one.folder} does; "
                    "branches must adapt the same layers"
                )
        if first.transposed != other.transposed:
            raise MergeError(
                f"{first.folder} and {other.folder} differ in fan_in_fan_out; branches must come "
                "from the same base"
            )
        for layer in first.factors:
            if first.shape(layer) != other.shape(layer):
                raise MergeError(
                    f"{layer} is {first.shape(layer)} in {first.folder} but {other.shape(layer)} "
                    f"in {other.folder}; branches must come from the same base"
                )
    return branches


def uneven(branches: Sequence[Branch]) -> str | None:
    """The first layer at which the branches differ in rank."""
    layers = branches[0].factors
    return next((x for x in layers if len({branch.rank(x) for branch in branches}) > 1), None)


def same_ranks(branches: Sequence[Branch]) -> None:
    """Refuse branches whose factors differ in shape."""
    layer = uneven(branches)
    if layer is not None:
        ranks = ", ".join(str(branch.rank(layer)) for branch in branches)
        raise MergeError(
            f"the branches have ranks {ranks} at {layer}, so their factors cannot be merged entry "
            "by entry; say space: delta; as an edit, use add"
        )


def _read_branch(folder: Path) -> Branch:
    factors, config = read_adapter(folder)
    if not factors:
        raise MergeError(f"{folder} adapts no layer")
    for layer, (a, b) in factors.items():
        for which, tensor in (("lora_A", a), ("lora_B", b)):
            if not torch.isfinite(tensor).all():
                raise MergeError(f"{folder}: {layer}.{which} holds NaN or infinite numbers")
    return Branch(
        folder=folder,
        factors={
            layer: (factors[layer][0].float(), factors[layer][1].float())
            for layer in sorted(factors)
        },
        scales=adapter_scales(folder, factors, config),
        base=str(config.get("base_model_name_or_path") or ""),
        transposed=bool(config.get("fan_in_fan_out")),
    )
