"""Chances by rank of magnitude within a row, and draws by them: compiled kernels over one slice.

Dimensions: M models, n weights of one slice, whole rows of `columns`. `base` and `models` are
addresses; see codec.
"""

import numpy as np
from numba import prange

from expunge.merge.codec import BLOCK, NOTHING, ask, read_tile, stored
from expunge.merge.draws import drawn_bits, scaled
from expunge.merge.jit import compiled


@compiled(parallel=True)
def rank_chances(base, base_kind, models, kinds, columns, density, epsilon, chances):
    """chances (M, n): from density − ε for the least |δ| of a row to density + ε for the greatest.

    Ranks come from a radix sort of each row by those bits of its magnitudes in which they differ
    from zeros: differences of stored halves use a few, which is a pass or two.
    """
    by_rank = _chances_by_rank(density, epsilon, columns)
    for r in prange(chances.shape[1] // columns):
        b = np.empty(columns, np.float32)
        d = np.empty((len(models), columns), np.float32)
        order = np.empty((2, columns), np.int32)
        places = np.empty((3, (1 << 11) + 1), np.int32)
        read_tile(base, base_kind, models, kinds, r * columns, (r + 1) * columns, b, d)
        for i in range(len(models)):
            row = chances[i, r * columns : (r + 1) * columns]
            _by_rank(d[i].view(np.uint32), order, places, by_rank[i], row)


@compiled()
def _by_rank(bits, order, places, by_rank, out):
    """out[j] = by_rank[how many magnitudes are less, or equal and at a lower index]."""
    used = np.uint32(0)
    for j in range(len(bits)):
        used |= bits[j] & np.uint32(0x7FFFFFFF)
    begin, end = 0, 31
    while begin < 31 and not (used >> np.uint32(begin)) & np.uint32(1):
        begin += 1
    while end > begin and not (used >> np.uint32(end - 1)) & np.uint32(1):
        end -= 1
    passes = max(1, (end - begin + 10) // 11)
    digit_bits = (end - begin + passes - 1) // passes
    size = 1 << digit_bits
    mask = np.uint32(size - 1)
    places[:passes, : size + 1] = 0
    for j in range(len(bits)):
        magnitude = (bits[j] & np.uint32(0x7FFFFFFF)) >> np.uint32(begin)
        for p in range(passes):
            places[p, ((magnitude >> np.uint32(p * digit_bits)) & mask) + np.uint32(1)] += 1
    for p in range(passes):
        for k in range(size):
            places[p, k + 1] += places[p, k]
    for p in range(passes):
        shift, place = np.uint32(begin + p * digit_bits), places[p]
        source, target = order[(p + 1) % 2], order[p % 2]
        for j in range(len(bits)):
            which = j if p == 0 else source[j]
            digit = ((bits[which] & np.uint32(0x7FFFFFFF)) >> shift) & mask
            if p == passes - 1:
                out[which] = by_rank[place[digit]]
            else:
                target[place[digit]] = which
            place[digit] += 1


OCTAVES, BIN_BITS = 6, 15
"""Magnitudes of the upper octaves of a row are told apart by bins of 2^BIN_BITS bit patterns."""


@compiled(parallel=True)
def draw_by_rank(base, base_kind, models, kinds, columns, start, keys, density, epsilon, kept):
    """kept (M, n): 1 where a draw is below the chance of that number's rank within its row.

    The chances are those of rank_chances, but no row is sorted. A draw below the least chance or
    above the greatest is decided by itself. Another is by the bin of its number: where all in it
    are equal (differences of stored halves mostly are), the count of those before is the rank; else
    the bin bounds the rank, and where that does not decide, what is less is counted.
    """
    by_rank = _chances_by_rank(density, epsilon, columns)
    for r in prange(kept.shape[1] // columns):
        b, draws = np.empty((2, columns), np.float32)
        d = np.empty((len(models), columns), np.float32)
        before, open_places = np.empty((2, columns), np.int32)
        bins = np.empty((OCTAVES << (23 - BIN_BITS)) + 1, np.uint64)
        firsts = np.empty(len(bins) + 1, np.int32)
        read_tile(base, base_kind, models, kinds, r * columns, (r + 1) * columns, b, d)
        for i in range(len(models)):
            near = stored(models[i], kinds[i], (r + 1) * columns)
            also = stored(base, base_kind, (r + 1) * columns) if i == 0 else NOTHING
            _draw_row(draws, keys[i], start + r * columns, near, also)
            row = kept[i, r * columns : (r + 1) * columns]
            bits = d[i].view(np.uint32)
            _decide(bits, draws, by_rank[i], bins, firsts, before, open_places, row)


@compiled()
def _draw_row(draws, key, first, near, also):
    """One draw a number; asks meanwhile for the next row."""
    pairs = np.empty(BLOCK // 2 + 1, np.uint64)
    for begin in range(0, len(draws), BLOCK):
        part = draws[begin : begin + BLOCK]
        ask(near, begin, begin + len(part))
        ask(also, begin, begin + len(part))
        bits = drawn_bits(key, first + begin, len(part), pairs)
        for j in range(len(part)):
            part[j] = scaled(bits[j])


@compiled()
def _chances_by_rank(density, epsilon, columns):
    """From density − ε for rank 0 to density + ε for the last: (M, columns)."""
    found, last = np.empty((len(density), columns), np.float32), np.float32(max(1, columns - 1))
    for i in range(len(density)):
        low, span = np.float32(density[i] - epsilon[i]), np.float32(2 * epsilon[i])
        for j in range(columns):
            share = np.float32(j) / last if columns > 1 else np.float32(0.5)
            found[i, j] = low + share * span
    return found


@compiled()
def _decide(bits, draws, by_rank, bins, firsts, before, open_places, kept):
    """kept[j] = draws[j] < by_rank[how many magnitudes are less, or equal and at a lower index].

    bins: of each how many there are, in the upper half, and the bits below its own that are set in
    any of them; firsts: the rank of its first; before: how many of its bin stand before a number.
    """
    most = np.uint32(0)
    for j in range(len(bits)):
        most = max(most, bits[j] & np.uint32(0x7FFFFFFF))
    low = (most - min(most, np.uint32(OCTAVES << 23))) >> np.uint32(BIN_BITS)
    inside = np.uint32((1 << BIN_BITS) - 1)
    least, greatest = by_rank[0], by_rank[-1]
    for j in range(len(bits)):
        kept[j] = draws[j] < least
    bins[:] = 0
    bins[0] = 1  # holds all that is far less
    found = 0
    for j in range(len(bits)):
        magnitude = bits[j] & np.uint32(0x7FFFFFFF)
        k = max(magnitude >> np.uint32(BIN_BITS), low) - low
        seen = bins[k]
        before[j] = seen >> np.uint64(32)
        bins[k] = (seen + np.uint64(1 << 32)) | np.uint64(magnitude & inside)
        open_places[found] = j
        found += (draws[j] >= least) & (draws[j] < greatest)
    firsts[0] = 0
    for k in range(len(bins)):
        firsts[k + 1] = firsts[k] + np.int32(bins[k] >> np.uint64(32))
    for place in range(found):
        j = open_places[place]
        own = bits[j] & np.uint32(0x7FFFFFFF)
        k = max(own >> np.uint32(BIN_BITS), low) - low
        alike = np.uint32(bins[k]) == 0
        stays = draws[j] < by_rank[firsts[k] + before[j] * alike]  # without a branch, so far
        kept[j] = stays
        if (not alike) & (not stays) & (draws[j] < by_rank[firsts[k + np.uint32(1)] - 1]):
            kept[j] = draws[j] < by_rank[_rank(bits, j, own)]


@compiled()
def _rank(bits, place, own):
    """How many magnitudes are less than that at `place`, or equal and before it."""
    less = 0
    for j in range(place):
        less += (bits[j] & np.uint32(0x7FFFFFFF)) <= own
    for j in range(place + 1, len(bits)):
        less += (bits[j] & np.uint32(0x7FFFFFFF)) < own
    return less
