"""Counting magnitudes without sorting: compiled kernels over one slice.

Dimensions: M models, n weights of one slice, rows = M, or 1 where models share one score, the
variance of their deltas. `base` and `models` are addresses; see codec.
"""

import numpy as np
from numba import get_num_threads, prange

from expunge.merge.codec import (
    DELTA,
    INFINITY,
    LOW_BITS,
    TILE,
    WINDOW,
    deltas_at,
    read_deltas,
    variance,
)
from expunge.merge.jit import compiled

PASSED = 1024
"""Places that are passed over at once on the way to the k-th greatest."""

_SPARSE = 16
"""Of so many numbers one may lie within the window, before each is looked at by itself."""


def chunks() -> int:
    """Into how many parts a slice is split: a few a thread, and few enough for their memory."""
    return min(get_num_threads(), 16)


@compiled(parallel=True)
def count_bins(base, base_kind, models, kinds, n, shared, hists):
    """Add to hists (chunks, rows, BINS) the bins of |δ_i|; of their variance where `shared`."""
    tiles = (n + TILE - 1) // TILE
    parts = len(hists)
    for part in prange(parts):
        b = np.empty(TILE, np.float32)
        d = np.empty((len(models), TILE), np.float32)
        v = np.empty(TILE, np.float32)
        for tile in range(part * tiles // parts, (part + 1) * tiles // parts):
            low, high = tile * TILE, min(n, (tile + 1) * TILE)
            width = high - low
            read_deltas(base, base_kind, models, kinds, low, high, b, d)
            if shared:
                variance(d, width, v)
            for i in range(hists.shape[1]):
                bits = v.view(np.uint32) if shared else d[i].view(np.uint32)
                hist = hists[part, i]
                for j in range(width):
                    hist[(bits[j] & np.uint32(0x7FFFFFFF)) >> np.uint32(LOW_BITS)] += 1


@compiled(parallel=True)
def count_window(base, base_kind, models, kinds, n, shared, rows, lows, tallies, hists):
    """Count each of the WINDOW magnitudes from lows (S,) on by itself, and others in sum.

    Sets hists (chunks, S, WINDOW) and adds to tallies (chunks, S, 3): those beyond the window,
    those that are 0, those that are not finite. They are those of the models `rows` (S,).
    """
    tiles = (n + TILE - 1) // TILE
    parts = len(hists)
    for part in prange(parts):
        b = np.empty(TILE, np.float32)
        d = np.empty((len(models), TILE), np.float32)
        v = np.empty(TILE, np.float32)
        inside = np.empty(TILE, np.uint32)
        flags = np.zeros(TILE, np.uint8)
        hists[part] = 0
        for tile in range(part * tiles // parts, (part + 1) * tiles // parts):
            low, high = tile * TILE, min(n, (tile + 1) * TILE)
            formed = (kinds == DELTA).all() and not shared  # they lie there as they are counted
            if not formed:
                read_deltas(base, base_kind, models, kinds, low, high, b, d)
            if shared:
                variance(d, high - low, v)
            for s in range(len(rows)):
                if formed:
                    row = deltas_at(models[rows[s]], low, high)
                else:
                    row = v[: high - low] if shared else d[rows[s], : high - low]
                first = np.uint32(lows[s])
                within = _flag(row, first, flags, tallies[part, s])
                if within * _SPARSE > len(row):
                    found = _gather(row, first, inside)
                else:
                    found = _pick(row, first, flags, inside)
                _add(inside, found, hists[part, s])


@compiled()
def _add(inside, found, hist):
    """hist[k] += how many of inside[:found] are k."""
    for j in range(found):
        hist[inside[j]] += np.uint32(1)


@compiled()
def _flag(row, low, flags, tally):
    """How many magnitudes lie within the window from `low` on; flags[j] = 1 for those, else 0.

    Adds to tally (3,) how many lie above it, are 0, and are not finite.
    """
    bits = row.view(np.uint32)
    above = within = nought = wrong = np.int32(0)
    for j in range(len(bits)):
        magnitude = bits[j] & np.uint32(0x7FFFFFFF)
        here = np.uint32(magnitude - low) < np.uint32(WINDOW)
        flags[j] = here
        within += np.int32(here)
        above += np.int32(magnitude >= np.uint32(low + np.uint32(WINDOW)))
        nought += np.int32(magnitude == np.uint32(0))
        wrong += np.int32(magnitude >= np.uint32(INFINITY))
    tally[0] += above
    tally[1] += nought
    tally[2] += wrong
    return within


@compiled()
def _gather(row, low, inside):
    """inside[: the result] = the places of magnitudes within the window, without a branch.

    One that goes either way costs more, where many are within.
    """
    bits = row.view(np.uint32)
    found = 0
    for j in range(len(bits)):
        place = (bits[j] & np.uint32(0x7FFFFFFF)) - low  # wraps to a large number where it is less
        inside[found] = place
        found += place < np.uint64(WINDOW)
    return found


@compiled()
def _pick(row, low, flags, inside):
    """The same by their flags, eight at once: few are within."""
    bits = row.view(np.uint32)
    flags[len(bits) : len(bits) + 8] = 0
    words = flags.view(np.uint64)
    found = 0
    for k in range((len(bits) + 7) // 8):
        word, j = words[k], 8 * k
        while word != 0:
            if word & np.uint64(1):
                inside[found] = (bits[j] & np.uint32(0x7FFFFFFF)) - low
                found += 1
            word >>= np.uint64(8)
            j += 1
    return found


@compiled()
def descend(hists, row, number):
    """From the last place on downward, that of the k-th one of hists (groups, rows, places).

    Also its number among those of its place, and how many these are; where fewer than k are
    counted at all, place 0 and a number above that.
    """
    begin = end = hists.shape[2]
    while end > 0:
        begin = max(0, end - PASSED)
        block = hists[:, row, begin:end]
        there = _total(block)
        if there >= number:
            break
        number -= there
        end = begin
    for place in range(end - 1, begin - 1, -1):
        here = _total(hists[:, row, place : place + 1])
        if here >= number:
            return place, number, here
        number -= here
    return 0, number, 0


@compiled()
def _total(counts):
    """The sum of counts (groups, places)."""
    total = np.int64(0)
    for group in range(len(counts)):
        own = counts[group]
        for place in range(len(own)):
            total += np.int64(own[place])
    return total


@compiled()
def place_of(base, base_kind, models, kinds, n, shared, row, wanted, number, first):
    """The place just after the `number`-th magnitude that is `wanted`, and 0; or how many lack.

    They are numbered from the place `first` on, the beginning of a tile.
    """
    b = np.empty(TILE, np.float32)
    d = np.empty((len(models), TILE), np.float32)
    v = np.empty(TILE, np.float32)
    for low in range(first, n, TILE):
        high = min(n, low + TILE)
        read_deltas(base, base_kind, models, kinds, low, high, b, d)
        if shared:
            variance(d, high - low, v)
        bits = v[: high - low].view(np.uint32) if shared else d[row, : high - low].view(np.uint32)
        equal = 0
        for j in range(len(bits)):
            equal += (bits[j] & np.uint32(0x7FFFFFFF)) == wanted
        if equal < number:
            number -= equal
            continue
        for j in range(len(bits)):
            number -= (bits[j] & np.uint32(0x7FFFFFFF)) == wanted
            if number == 0:
                return low + j + 1, number
    return n, number
