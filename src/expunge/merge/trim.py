"""Which entries of each delta stay: exact bounds by counting, chances, and rescaling.

Dimensions: M models, n numbers of a tensor, rows = M, or 1 where models share one score.

A bound is a magnitude and an index: the k-th greatest magnitude, the lower index coming first among
equals. It is found without sorting: the bits of a positive float32 order as it does, so one count
by the high 16 bits finds the bin of the k-th, a second by the low 15 bits its exact value, and only
where equal numbers straddle the bound is their place looked up.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import numpy as np

from expunge.errors import MergeError
from expunge.merge.codec import BINS, LOW_BITS
from expunge.merge.fused import ALWAYS, NEVER, Trim
from expunge.merge.operands import Operand, blame, summed

Keep = Literal["all", "largest", "middle", "random", "ranked", "variance"]
Rescale = Literal["none", "chance", "l1"]
Counts = Sequence[tuple[int, int]]
"""For each row: how many of the greatest lie beyond the outer bound, and within the inner one."""

_INFINITE = 0x7F800000 >> LOW_BITS
_TINY = 1e-7  # sums below it are not divided by


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
    if bounds is None:
        counts = [
            counts_of(keep, float(d), operand.size, gamma)
            for d, gamma in zip(density, _gammas(settings, models), strict=True)
        ]
        if keep == "variance":
            share = float(settings.options["select_topk"])
            counts = [(0, _varied(operand, share, ops))] if share < 1 else [(0, operand.size)]
        bounds = find_bounds([operand], counts, ops, shared=keep == "variance")[0]
    trim = Trim(
        bounds=bounds,
        keys=np.array([settings.key(number) for number in range(models)], np.uint64),
        odds=density if drawn else np.ones(models, np.float32),
        scales=np.ones(models, np.float32),
        spread=spread,
        shared=keep == "variance",
        columns=operand.columns,
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


def find_bounds(
    operands: Sequence[Operand], counts: Counts, ops: ModuleType, *, shared: bool = False
) -> list[np.ndarray]:
    """The bounds of `counts` over all operands as one: (rows, 2, 2) int64 for each operand."""
    size = sum(operand.size for operand in operands)
    sought = np.array(counts, np.int64)  # (rows, 2)
    places = [np.empty((len(sought), 2, 2), np.int64) for _ in operands]
    for bounds in places:
        bounds[:, 0], bounds[:, 1] = NEVER, ALWAYS
        bounds[sought >= size], bounds[sought <= 0] = ALWAYS, NEVER
    open_bounds = (sought > 0) & (sought < size)
    if not open_bounds.any():
        return places
    bins, rest = _from_the_top(_bins(operands, shared, ops), sought)
    asked = np.where(open_bounds, bins, BINS)
    pieces = (piece for operand in operands for piece in operand)
    low = summed(ops.low_bits(piece, shared, asked) for piece in pieces).astype(np.int64)
    lows, rest, ties = _within(low, rest)
    bits = (bins << LOW_BITS) | lows
    for row, which in np.argwhere(open_bounds):
        for bounds in places:
            bounds[row, which] = bits[row, which], ALWAYS[1]
        if rest[row, which] < ties[row, which]:
            cuts = _cuts(operands, shared, row, int(bits[row, which]), int(rest[row, which]), ops)
            for bounds, cut in zip(places, cuts, strict=True):
                bounds[row, which, 1] = cut
    return places


def _bins(operands: Sequence[Operand], shared: bool, ops: ModuleType) -> np.ndarray:
    total = np.zeros(1, np.int64)
    for operand in operands:
        for piece in operand:
            found = ops.bins(piece, shared)
            if found[:, _INFINITE:].any():
                raise MergeError(blame(operand))
            total = total + found
    return total


def _from_the_top(hist: np.ndarray, sought: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bin in which the k-th greatest lies, and its number within it: (rows, bounds) each."""
    above = hist[:, ::-1].cumsum(1)  # (rows, BINS)
    bins, rest = np.zeros_like(sought), np.zeros_like(sought)
    for (row, which), number in np.ndenumerate(sought):
        step = min(int(np.searchsorted(above[row], number)), hist.shape[1] - 1)
        bins[row, which] = hist.shape[1] - 1 - step
        rest[row, which] = number - (above[row, step - 1] if step else 0)
    return bins, rest


def _within(hist: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The low bits of the bound, its number among those equal to it, and how many those are."""
    lows, left, ties = (np.zeros_like(rest) for _ in range(3))
    for place, number in np.ndenumerate(rest):
        low, within = _from_the_top(hist[place][None], np.array([[number]]))
        lows[place], left[place] = low[0, 0], within[0, 0]
        ties[place] = hist[place][low[0, 0]]
    return lows, left, ties


def _cuts(
    operands: Sequence[Operand], shared: bool, row: int, bits: int, number: int, ops: ModuleType
) -> list[int]:
    """For each operand: the index before which numbers equal to the bound lie within it."""
    cuts = []
    for operand in operands:
        cut = 0
        for piece in operand if number > 0 else ():
            wanted = np.full((row + 1, 1), BINS << LOW_BITS, np.int64)
            wanted[row, 0] = bits
            running = ops.equal(piece, shared, wanted)[row, 0].cumsum()
            if running[-1] < number:
                number -= int(running[-1])
                cut = ALWAYS[1]
                continue
            tile = int(np.searchsorted(running, number))
            before = int(running[tile - 1]) if tile else 0
            cut = piece.start + ops.place_of(piece, shared, tile, row, bits, number - before)
            number = 0
            break
        cuts.append(cut)
    return cuts


def _varied(operand: Operand, share: float, ops: ModuleType) -> int:
    """How many entries are a share of those in which the models differ at all."""
    none = np.zeros((1, 1), np.int64)
    same = sum(int(ops.low_bits(piece, True, none)[0, 0, 0]) for piece in operand)
    return int((operand.size - same) * max(share, 0.0))


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
