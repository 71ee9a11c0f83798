"""The operations of a merge on the CPU: each hands one slice to its kernel.

Dimensions: M models, rows = M (or 1 where models share one score), n numbers of a slice.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from expunge.merge import codec, counting, kernels
from expunge.merge.codec import BINS, LOW_BITS, TILE
from expunge.merge.operands import Slice

_count: Any = counting
_merge: Any = kernels
NEVER, ALWAYS = (0xFFFFFFFF, 0), (0, 1 << 62)
"""Bounds that no number and every number lies within."""


@dataclass(frozen=True)
class Trim:
    """Which entries of each δ_i stay, and by what they are multiplied."""

    bounds: np.ndarray
    """(rows, 2, 2) int64: magnitude bits and index of the outer and the inner bound."""

    keys: np.ndarray
    """(M,) uint64: seeds of what is drawn."""

    odds: np.ndarray
    """(M,) float32: the chance of each entry to stay."""

    scales: np.ndarray
    """(M,) float32; 0 divides each entry by its own chance."""

    spread: np.ndarray | None = None
    """(M,) float32: how far the chance departs from `odds`, by rank within the row; or None."""

    shared: bool = False
    """One score for all models, the variance of their deltas, instead of each one's magnitude."""

    columns: int = 1
    """Length of a row."""


@dataclass(frozen=True)
class Election:
    """How the τ_i become one δ."""

    weights: np.ndarray
    """(M,) float32."""

    elect: bool = False
    """Only entries with the majority's sign take part."""

    weighted: bool = False
    """The majority is counted after weighting."""

    divide: int = 0
    """By nothing (0), by how many took part (1), or by the |w| that took part (2)."""

    times: float = 1.0


@dataclass(frozen=True)
class Rounding:
    """How a merged slice is stored."""

    kind: int
    stochastic: bool = False
    key: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of a stored number."""
        return 4 if self.kind == codec.FLOAT32 else 2


@dataclass
class Tally:
    """What happened to the numbers of a merge."""

    bad: int = 0
    """Not finite once stored."""

    moved: int = 0
    """Have a merged delta other than 0."""

    changed: int = 0
    """Of those, whose stored value changed."""


def use_threads(count: int) -> None:
    """Let the kernels use as many threads as torch does."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # pyright: ignore


def bins(piece: Slice, shared: bool) -> np.ndarray:
    """How many magnitudes (or variances) have each high half: (rows, BINS) int64."""
    rows = 1 if shared else len(piece.models)
    hists = np.zeros((_parts(piece.n), rows, BINS), np.uint32)
    _count.count_bins(*_inputs(piece), piece.n, shared, hists)
    return hists.sum(0, dtype=np.int64)


def low_bits(piece: Slice, shared: bool, wanted: np.ndarray) -> np.ndarray:
    """Of the magnitudes in the bins `wanted` (rows, bounds): the low half, (rows, bounds, 2^15)."""
    hists = np.zeros((_parts(piece.n), *wanted.shape, 1 << LOW_BITS), np.uint32)
    _count.count_low(*_inputs(piece), piece.n, shared, wanted.astype(np.uint32), hists)
    return hists.sum(0, dtype=np.int64)


def equal(piece: Slice, shared: bool, wanted: np.ndarray) -> np.ndarray:
    """How many magnitudes of each tile have the bits `wanted` (rows, bounds): + (tiles,) int64."""
    counts = np.zeros((*wanted.shape, -(-piece.n // TILE)), np.int64)
    _count.count_equal(*_inputs(piece), piece.n, shared, wanted.astype(np.uint32), counts)
    return counts


def place_of(piece: Slice, shared: bool, tile: int, row: int, wanted: int, number: int) -> int:
    """The place in the slice just after the `number`-th such magnitude of a tile."""
    low, high = tile * TILE, min(piece.n, (tile + 1) * TILE)
    return _count.place_of(*_inputs(piece), low, high, shared, row, np.uint32(wanted), number)


def measure(piece: Slice, trim: Trim) -> np.ndarray:
    """Σ|δ_i|, Σ|τ_i| and Σ τ_i² of one slice: (M, 3) float64."""
    sums = np.zeros((-(-piece.n // TILE), len(piece.models), 3))
    _merge.measure(*_inputs(piece), piece.n, piece.start, *_trim(piece, trim), sums)
    return sums.sum(0)


def elect(
    piece: Slice, trim: Trim, election: Election, rounding: Rounding, tally: Tally
) -> np.ndarray:
    """base + times · elected(τ), stored: (n · itemsize,) uint8."""
    out = np.empty(piece.n * rounding.itemsize, np.uint8)
    counts = np.zeros((-(-piece.n // TILE), 3), np.int64)
    _merge.elect(
        *_inputs(piece),
        piece.n,
        piece.start,
        *_trim(piece, trim),
        election.weights,
        election.elect,
        election.weighted,
        election.divide,
        np.float32(election.times),
        out,
        rounding.kind,
        rounding.stochastic,
        np.uint64(rounding.key),
        counts,
    )
    bad, moved, changed = counts.sum(0)
    tally.bad += int(bad)
    tally.moved += int(moved)
    tally.changed += int(changed)
    return out


def products(piece: Slice) -> np.ndarray:
    """Inner products of the models' deltas over one slice: (M, M) float64."""
    sums = np.zeros((-(-piece.n // TILE), len(piece.models), len(piece.models)))
    _merge.products(*_inputs(piece), piece.n, sums)
    return sums.sum(0)


def combine(piece: Slice, weights: np.ndarray, rounding: Rounding, tally: Tally) -> np.ndarray:
    """Σ w_i x_i, stored: (n · itemsize,) uint8."""
    out = np.empty(piece.n * rounding.itemsize, np.uint8)
    bad = np.zeros(-(-piece.n // TILE), np.int64)
    _merge.combine(
        _addresses(piece),
        piece.kinds,
        piece.n,
        piece.start,
        weights.astype(np.float32),
        out,
        rounding.kind,
        rounding.stochastic,
        np.uint64(rounding.key),
        bad,
    )
    tally.bad += int(bad.sum())
    return out


def _inputs(piece: Slice) -> tuple[int, int, np.ndarray, np.ndarray]:
    return piece.base.ctypes.data, piece.base_kind, _addresses(piece), piece.kinds


def _addresses(piece: Slice) -> np.ndarray:
    return np.array([raw.ctypes.data for raw in piece.models], np.int64)


def _parts(n: int) -> int:
    return min(counting.chunks(), max(1, n // TILE))


def _trim(piece: Slice, trim: Trim) -> tuple[object, ...]:
    if trim.spread is None:
        chances = np.empty((0, 0), np.float32)
    else:
        chances = np.empty((len(piece.models), piece.n), np.float32)
        _count.rank_chances(*_inputs(piece), trim.columns, trim.odds, trim.spread, chances)
    return trim.bounds, trim.keys, trim.odds, chances, trim.shared, trim.scales
