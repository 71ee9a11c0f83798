"""The operations of a merge on the CPU: each hands one slice to its kernel.

Dimensions: M models, rows = M (or 1 where models share one score), n numbers of a slice.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from expunge.memory import aligned
from expunge.merge import codec, counting, kernels, ranks, sums
from expunge.merge.codec import BINS, INFINITY, TILE, WINDOW
from expunge.merge.operands import Slice

_count: Any = counting
_merge: Any = kernels
_ranks: Any = ranks
_sums: Any = sums
Window = tuple[np.ndarray, int, int, list[int], np.ndarray]
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

    drawn: dict[int, np.ndarray] | None = None
    """By the start of a slice, what its draws by rank kept, (M, n) uint8; filled by `measure` for
    `elect`, which would draw the same. None where that would take too much memory."""

    @property
    def draws_alone(self) -> bool:
        """No bounds and no scales yet: entries stay by the odds of their model."""
        free = (self.bounds[:, 0] == NEVER).all() and (self.bounds[:, 1] == ALWAYS).all()
        return bool(free and self.spread is None and (self.scales == 1).all())


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
    return hists.sum(0, dtype=np.uint32).astype(np.int64)


def window(piece: Slice, shared: bool, rows: np.ndarray, lows: np.ndarray) -> Window:
    """Magnitudes of the models `rows` (S,) at and beyond a window that begins at `lows` (S,).

    How many lie beyond it (S,); how many are 0 of the first of them; how many are not finite; where
    the parts of the slice begin; how many equal each pattern in each part (parts, S, WINDOW).
    """
    parts, sought, tiles = _parts(piece.n), len(rows), -(-piece.n // TILE)
    tallies = np.zeros((parts, sought, 3), np.int64)
    hists = np.empty((parts, sought, WINDOW), np.uint32)
    _count.count_window(*_inputs(piece), piece.n, shared, rows, lows, tallies, hists)
    begins = [part * tiles // parts * TILE for part in range(parts)]
    beyond, nought, bad = tallies.sum(0).T
    return beyond, int(nought[0]), int(bad.sum()), begins, hists


def descend(hists: np.ndarray, row: int, number: int) -> tuple[int, int, int]:
    """The place of the k-th greatest, its number among those there, and how many these are.

    hists: counts by place, (groups, rows, places), groups to be added up. Where fewer than k are
    counted in all, the number exceeds how many there are.
    """
    return _count.descend(hists, row, number)


def place_of(
    piece: Slice, shared: bool, row: int, wanted: int, number: int, first: int = 0
) -> tuple[int, int]:
    """The place just after the `number`-th one `wanted`, and 0; or the end, and how many lack.

    They are numbered from `first` on, where a part of the slice begins.
    """
    base, kind, models, kinds = _inputs(piece)
    if not shared:  # the other models need not be read
        models, kinds, row = models[row : row + 1], kinds[row : row + 1], 0
    bits = np.uint32(wanted)
    return _count.place_of(base, kind, models, kinds, piece.n, shared, row, bits, number, first)


def measure(piece: Slice, trim: Trim) -> np.ndarray:
    """Σ|δ_i| and Σ|τ_i| of one slice: (M, 2) float64."""
    found = np.zeros((-(-piece.n // TILE), len(piece.models), 2))
    inputs = (*_inputs(piece), piece.n, piece.start)
    if trim.draws_alone:
        _sums.measure_drawn(*inputs, trim.keys, trim.odds, found)
    else:
        _sums.measure(*inputs, *_trim(piece, trim), False, found)
    return found.sum(0)


def energies(piece: Slice, trim: Trim) -> np.ndarray:
    """Σ τ_i² of one slice: (M,) float64."""
    found = np.zeros((-(-piece.n // TILE), len(piece.models), 2))
    _sums.measure(*_inputs(piece), piece.n, piece.start, *_trim(piece, trim), True, found)
    return found.sum(0)[:, 1]


def elect(
    piece: Slice, trim: Trim, election: Election, rounding: Rounding, tally: Tally
) -> np.ndarray:
    """base + times · elected(τ), stored: (n · itemsize,) uint8."""
    out = aligned(piece.n * rounding.itemsize)
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
    found = np.zeros((-(-piece.n // TILE), len(piece.models), len(piece.models)))
    _sums.products(*_inputs(piece), piece.n, found)
    return found.sum(0)


def combine(piece: Slice, weights: np.ndarray, rounding: Rounding, tally: Tally) -> np.ndarray:
    """Σ w_i x_i, stored: (n · itemsize,) uint8."""
    out = aligned(piece.n * rounding.itemsize)
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
    chances, kept = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint8)
    if trim.spread is not None and not trim.scales.all():
        chances = np.empty((len(piece.models), piece.n), np.float32)
        _ranks.rank_chances(*_inputs(piece), trim.columns, trim.odds, trim.spread, chances)
    elif trim.spread is not None:
        kept = _kept(piece, trim, trim.spread)
    limits, cuts = _limits(trim.bounds)
    return limits, cuts, trim.keys, trim.odds, chances, kept, trim.shared, trim.scales


def _kept(piece: Slice, trim: Trim, spread: np.ndarray) -> np.ndarray:
    """What draws by rank keep of a slice, drawn or remembered: (M, n) uint8."""
    drawn = trim.drawn if trim.drawn is not None else {}
    if piece.start not in drawn:
        kept = np.empty((len(piece.models), piece.n), np.uint8)
        _ranks.draw_by_rank(
            *_inputs(piece), trim.columns, piece.start, trim.keys, trim.odds, spread, kept
        )
        drawn[piece.start] = kept
    return drawn[piece.start]


def _limits(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds for comparing numbers, not bits: (rows, 2, before and after the cut) float32, cuts."""
    bits = np.minimum(bounds[..., 0], INFINITY)
    after = bits.astype(np.uint32).view(np.float32)
    before = np.maximum(bits - 1, 0).astype(np.uint32).view(np.float32)
    before = np.where(bits > 0, before, np.float32(-1))  # below every magnitude
    return np.stack([before, after], -1), np.ascontiguousarray(bounds[..., 1])
