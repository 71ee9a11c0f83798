"""The k-th greatest magnitude of a tensor, or of a whole model, without sorting.

Dimensions: rows = M models, or 1 where they share one score; S bounds sought.

A bound is a magnitude and an index: the k-th greatest magnitude, the lower index coming first among
equals. The bits of a positive float32 order as it does. So what lies beyond a narrow window of bit
patterns is counted, and within it each pattern by itself: that gives the bound to the last bit if
it lies within. Where to put the window is guessed from a sample of the rows. Where the guess
was wrong, or no sample is worth taking, all magnitudes are first counted by their high 16 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from expunge.errors import MergeError
from expunge.merge.codec import INFINITY, LOW_BITS, WINDOW
from expunge.merge.fused import ALWAYS, NEVER, descend
from expunge.merge.operands import Operand, Slice, blame, summed

Counts = Sequence[tuple[int, int]]
"""For each row: how many of the greatest lie beyond the outer bound, and within the inner one."""

_LEAST_SAMPLE, _SAMPLE, _WORTH_SAMPLING = 1 << 17, 1 << 20, 1 << 19
_GROUPS, _FINEST = 16, 4  # in which numbers are counted apart: of a model, and of one slice


def find_bounds(
    operands: Sequence[Operand], counts: Counts, ops: ModuleType, *, shared: bool = False
) -> list[np.ndarray]:
    """The bounds of `counts` over all operands as one: (rows, 2, 2) int64 for each operand.

    Each is [outer, inner][bits, index]. NaN and infinity are a `MergeError` naming the tensor.
    """
    size = sum(operand.size for operand in operands)
    sought = np.array(counts, np.int64)  # (rows, 2)
    places = [np.empty((len(sought), 2, 2), np.int64) for _ in operands]
    for bounds in places:
        bounds[:, 0], bounds[:, 1] = NEVER, ALWAYS
        bounds[sought >= size], bounds[sought <= 0] = ALWAYS, NEVER
    asked = np.argwhere((sought > 0) & (sought < size))
    if len(asked) == 0:
        return places
    search = Search(operands, asked[:, 0], sought[tuple(asked.T)], shared, ops)
    for (row, which), (bits, cuts) in zip(asked, search.bounds(), strict=True):
        for bounds, cut in zip(places, cuts, strict=True):
            bounds[row, which] = bits, cut
    return places


def find_varied_bounds(operand: Operand, share: float, ops: ModuleType) -> np.ndarray:
    """The bounds of the greatest variances, a share of those that are not 0: (1, 2, 2) int64.

    How many are not 0 is counted in the same pass over them. Raises as `find_bounds`.
    """
    count = operand.size
    if share < 1:
        search = Search([operand], np.zeros(1, np.int64), np.ones(1, np.int64), True, ops)
        lows = search.guessed(share)
        counted = search.counted(np.zeros(1, np.int64) if lows is None else lows)
        count = int((operand.size - counted.nought) * max(share, 0.0))
        found = None if lows is None or count < 1 else search.located(0, lows[0], count, counted)
        if found is not None:
            bits, (cut,) = found
            return np.array([[NEVER, (bits, cut)]])
    return find_bounds([operand], [(0, count)], ops, shared=True)[0]


@dataclass(frozen=True)
class Counted:
    """What was counted of some windows."""

    beyond: np.ndarray
    """How many lie beyond each: (S,)."""

    nought: int
    """How many are 0, in the row of the first."""

    hists: np.ndarray
    """How many equal each pattern within: (groups, S, WINDOW), by groups of numbers in order."""

    begins: list[tuple[int, int]]
    """Of each group the span, and the place in it, with which it begins."""


class Search:
    """The search for some bounds: `rows` (S,) in which they lie, `counts` (S,) down to them."""

    def __init__(
        self,
        operands: Sequence[Operand],
        rows: np.ndarray,
        counts: np.ndarray,
        shared: bool,
        ops: ModuleType,
    ) -> None:
        self.operands, self.rows, self.counts = operands, rows, counts
        self.shared, self.ops = shared, ops
        self.spans = [(n, span) for n, operand in enumerate(operands) for span in operand.spans]
        self.groups = min(_GROUPS, _FINEST * len(self.spans))

    def bounds(self) -> list[tuple[int, list[int]]]:
        """For each bound: its bits, and the index before which equals are within, by operand."""
        lows = self.guessed()
        found = None if lows is None else self.within(lows)
        if found is None:
            hist = summed(self.ops.bins(self.piece(span), self.shared) for span in self.spans)
            found = self.within(self.centred(hist, self.counts))
            assert found is not None
        return found

    def guessed(self, share: float | None = None) -> np.ndarray | None:
        """Where the windows should begin, by a sample; None where that is not worth it.

        A `share` of what is not 0 stands in place of the counts.
        """
        operand = self.operands[0]
        if len(self.operands) > 1 or operand.size < _WORTH_SAMPLING:
            return None
        sample = operand.sample(min(_SAMPLE, max(_LEAST_SAMPLE, operand.size // 16)))
        hist = self.ops.bins(sample, self.shared)
        counts = np.rint(self.counts * (sample.n / operand.size)).astype(np.int64)
        if share is not None:
            counts = ((sample.n - hist[:, 0]) * share).astype(np.int64)
        return self.centred(hist, np.clip(counts, 1, sample.n))

    def centred(self, hist: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The beginnings of windows around the k-th greatest of a count by bins: (S,)."""
        lows = []
        for row, number in zip(self.rows, counts, strict=True):
            which, within, equal = descend(hist[None], row, number)
            share = 1 - within / equal  # of the bin, from its least
            lows.append(int((which + share) * (1 << LOW_BITS)) - WINDOW // 2)
        return np.clip(lows, 0, INFINITY - WINDOW)

    def within(self, lows: np.ndarray) -> list[tuple[int, list[int]]] | None:
        """What `bounds` says, or None if a bound lies outside its window."""
        counted, found = self.counted(lows), []
        for s, (low, count) in enumerate(zip(lows, self.counts, strict=True)):
            place = self.located(s, low, count, counted)
            if place is None:
                return None
            found.append(place)
        return found

    def located(
        self, s: int, low: int, count: int, counted: Counted
    ) -> tuple[int, list[int]] | None:
        """The bound of the count-th greatest within one window; None if it lies outside."""
        count -= counted.beyond[s]
        step, left, equal = descend(counted.hists, s, count)
        if count < 1 or left > equal:
            return None
        cuts = [ALWAYS[1]] * len(self.operands)
        if left < equal:
            running = counted.hists[:, s, step].cumsum()
            group = int(np.searchsorted(running, left))
            left -= int(running[group - 1]) if group else 0
            cuts = self.cuts(int(self.rows[s]), int(low) + step, left, counted.begins[group])
        return int(low) + step, cuts

    def counted(self, lows: np.ndarray) -> Counted:
        """All numbers, counted by the windows that begin at `lows` (S,)."""
        beyond, nought, hists = np.zeros(len(lows), np.int64), 0, np.empty(0)
        begins: dict[int, tuple[int, int]] = {}
        for number, (which, span) in enumerate(self.spans):
            piece = self.piece((which, span))
            above, none, bad, firsts, parts = self.ops.window(piece, self.shared, self.rows, lows)
            if bad:
                raise MergeError(blame(self.operands[which]))
            beyond, nought = beyond + above, nought + none
            if len(self.spans) == 1:
                return Counted(beyond, nought, parts, [(number, first) for first in firsts])
            if number == 0:
                hists = np.zeros((self.groups, len(lows), WINDOW), np.int64)
            for part, (first, hist) in enumerate(zip(firsts, parts, strict=True)):
                group = (number * len(parts) + part) * self.groups // (len(self.spans) * len(parts))
                begins.setdefault(group, (number, first))
                hists[group] += hist
        known = [begins.get(group, (0, 0)) for group in range(self.groups)]
        return Counted(beyond, nought, hists, known)

    def cuts(self, row: int, bits: int, number: int, begin: tuple[int, int]) -> list[int]:
        """For each operand: the index just after the `number`-th of its magnitudes `bits`.

        begin: the span, and the place in it, from which they are numbered.
        """
        span, first = begin
        for which, bounds in self.spans[span:]:
            piece = self.piece((which, bounds))
            end, number = self.ops.place_of(piece, self.shared, row, bits, number, first)
            if number == 0:
                after = len(self.operands) - which - 1
                return [ALWAYS[1]] * which + [piece.start + end] + [0] * after
            first = 0
        raise AssertionError("counted, and not found")

    def piece(self, span: tuple[int, tuple[int, int]]) -> Slice:
        """The numbers of one span."""
        which, (low, high) = span
        return self.operands[which].slice(low, high)
