"""Which entries of each delta stay: exact bounds by counting, chances, and rescaling.

Dimensions: M models, n numbers of a tensor, rows = M, or 1 where models share one score.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import numpy as np

from expunge.errors import MergeError
from expunge.merge.bounds import find_bounds, find_varied_bounds
from expunge.merge.fused import Trim
from expunge.merge.operands import Operand, summed

Keep = Literal["all", "largest", "middle", "random", "ranked", "variance"]
Rescale = Literal["none", "chance", "l1"]

_TINY = 1e-7  # sums below it are not divided by
_REMEMBERED = 1 << 28  # draws that are kept from one pass to the next, a byte each


@dataclass(frozen=True)
class Settings:
    """What a method is told about one tensor."""

    name: str
    """The tensor's."""

    weights: tuple[float, ...]
    """One a model."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """By name; a tuple of one value a model for those that the method takes so."""

    seed: int = 42

    def key(self, purpose: object) -> int:
        """64 bits that depend on the seed, the tensor's name and the purpose alone."""
        digest = hashlib.sha256(f"{self.seed}:{self.name}:{purpose}".encode()).digest()
        return int.from_bytes(digest[:8], "little")


def find_trim(
    operand: Operand,
    keep: Keep,
    settings: Settings,
    ops: ModuleType,
    *,
    bounds: np.ndarray | None = None,
) -> Trim:
    """What stays of an operand's deltas; `bounds` are those of the whole model, where wanted."""
    models = len(operand.models)
    density = np.array(settings.options.get("density", (1.0,) * models), np.float32)
    drawn = keep in ("random", "ranked")
    spread = None
    if keep == "ranked":
        spread = np.array(settings.options["epsilon"], np.float32)
        spread[density >= 1] = 0
        _check_spread(density, spread)
    if bounds is None and keep == "variance":
        bounds = find_varied_bounds(operand, float(settings.options["select_topk"]), ops)
    if bounds is None:
        counts = [
            counts_of(keep, float(d), operand.size, gamma)
            for d, gamma in zip(density, _gammas(settings, models), strict=True)
        ]
        bounds = find_bounds([operand], counts, ops)[0]
    trim = Trim(
        bounds=bounds,
        keys=np.array([settings.key(number) for number in range(models)], np.uint64),
        odds=density if drawn else np.ones(models, np.float32),
        scales=np.ones(models, np.float32),
        spread=spread,
        shared=keep == "variance",
        columns=operand.columns,
        drawn={} if keep == "ranked" and models * operand.size <= _REMEMBERED else None,
    )
    return _rescaled(trim, operand, settings, ops) if density.min() < 1 else trim


def counts_of(keep: Keep, density: float, size: int, gamma: float = 0.0) -> tuple[int, int]:
    """How many of the greatest are outliers, and how many lie within the inner bound.

    At least one entry stays at any density above 0.
    """
    if density >= 1 or keep not in ("largest", "middle"):
        return 0, size
    kept = max(1, int(density * size)) if density > 0 and size else 0
    if keep == "largest":
        return 0, kept
    outliers = min(int(gamma * size), size - kept)
    return outliers, outliers + kept


def _rescaled(trim: Trim, operand: Operand, settings: Settings, ops: ModuleType) -> Trim:
    """The trim with the scales that `rescale` asks for."""
    rescale: Rescale = settings.options.get("rescale", "none")
    if rescale == "none":
        return trim
    if rescale == "chance":
        scales = np.zeros_like(trim.odds) if trim.spread is not None else 1 / trim.odds
    else:
        sums = summed(ops.measure(piece, trim) for piece in operand)
        before, after = sums[:, 0], sums[:, 1]
        usable = (before > _TINY) & (after > _TINY)
        scales = np.where(usable, before / np.where(usable, after, 1), 1)
    changed = {**trim.__dict__, "scales": scales.astype(np.float32)}
    return Trim(**changed)


def _gammas(settings: Settings, models: int) -> Sequence[float]:
    return settings.options.get("gamma", (0.0,) * models)


def _check_spread(density: np.ndarray, spread: np.ndarray) -> None:
    for d, e in zip(density, spread, strict=True):
        if d < 1 and not 0 < d - e <= d + e < 1:
            raise MergeError(
                f"density {d:g} and epsilon {e:g} give chances outside (0, 1); "
                "density - epsilon must be above 0 and density + epsilon below 1"
            )
