"""Merging on the CPU without temporaries: compiled parallel loops over tiles of stored weights.

Dimensions: M models, n weights of one slice, in order; `start` is the place of the first of them in
its tensor. `base` and `models` are addresses; see codec. Every sum is taken by tile and then in
order, so the number of threads cannot change a bit.
"""

import numpy as np
from numba import prange

from expunge.merge.codec import (
    BLOCK,
    TILE,
    ask,
    changed,
    decode_tile,
    encode_tile,
    read_tile,
    stored,
    variance,
)
from expunge.merge.draws import drawn_bits, scaled
from expunge.merge.jit import compiled


@compiled()
def _keep(row, shared, scores, begin, end, outer, inner, scale):
    """row[begin:end] stays, times scale, where its score lies above `inner` and not above `outer`.

    NaN stays, to be found in what is stored. (Two loops, for one over two names of one array is not
    vectorised; nor is one that loads a number in a branch.)
    """
    part = row[begin:end]
    if outer == np.inf and inner < 0:
        if scale != 1:
            for j in range(len(part)):
                part[j] = part[j] * scale
    elif shared:
        own = scores[begin:end]
        for j in range(len(part)):
            tau = part[j] * scale
            part[j] = np.float32(0) if (own[j] > outer) | (own[j] <= inner) else tau
    else:
        for j in range(len(part)):
            tau, score = part[j] * scale, abs(part[j])
            part[j] = np.float32(0) if (score > outer) | (score <= inner) else tau


@compiled()
def trim_tile(d, width, first, limits, cuts, keys, odds, chances, kept, place, shared, scales, v):
    """δ_i → τ_i in place: what lies between the limits and is drawn, times its scale.

    limits (rows, 2, 2): the greatest magnitude that is not beyond the outer bound, and not within
    the inner one; each before and after the place in cuts (rows, 2), for the lower index comes
    first among equals. Drawing is by the odds of a model, or by those of each number where
    `chances` (M, n) gives them; a scale of 0 then means that each is divided by its own. Or it is
    done already, and `kept` (M, n) holds 1 for what stays.
    """
    if shared:
        variance(d, width, v)
    for i in range(len(d)):
        row, r = d[i], 0 if shared else i
        each = scales[i] == 0
        scale = np.float32(1) if each else scales[i]
        drawn = len(kept) == 0 and len(chances) == 0 and odds[i] < 1
        out_cut = min(max(cuts[r, 0] - first, 0), width)
        in_cut = min(max(cuts[r, 1] - first, 0), width)
        begin = 0
        for end in (min(out_cut, in_cut), max(out_cut, in_cut), width):
            outer = limits[r, 0, 0 if begin < out_cut else 1]
            inner = limits[r, 1, 0 if begin < in_cut else 1]
            _keep(row, shared, v, begin, end, outer, inner, np.float32(1) if drawn else scale)
            begin = end
        if drawn:
            _draw(row, width, keys[i], first, odds[i], scale)
        elif len(kept) > 0:
            _drop(row, width, kept[i, place : place + width])
        elif len(chances) > 0:
            _draw_each(row, width, keys[i], first, chances[i, place : place + width], each)


@compiled()
def _draw(row, width, key, first, chance, scale):
    """Keep each number by one chance, times scale."""
    pairs = np.empty(BLOCK // 2 + 1, np.uint64)
    for begin in range(0, width, BLOCK):
        part = row[begin : min(width, begin + BLOCK)]
        bits = drawn_bits(key, first + begin, len(part), pairs)
        for j in range(len(part)):
            tau = part[j] * scale
            part[j] = tau if scaled(bits[j]) < chance else np.float32(0)


@compiled()
def _drop(row, width, kept):
    """Keep each number where `kept` is not 0."""
    for j in range(width):
        tau = row[j]
        row[j] = tau if kept[j] != 0 else np.float32(0)


@compiled()
def _draw_each(row, width, key, first, chances, divided):
    """Keep each number by its own chance, and divide it by that where wanted."""
    pairs = np.empty(BLOCK // 2 + 1, np.uint64)
    if divided:
        for j in range(width):
            row[j] = row[j] / chances[j]
    for begin in range(0, width, BLOCK):
        part, chance = row[begin : min(width, begin + BLOCK)], chances[begin : begin + BLOCK]
        bits = drawn_bits(key, first + begin, len(part), pairs)
        for j in range(len(part)):
            tau = part[j]
            part[j] = tau if scaled(bits[j]) < chance[j] else np.float32(0)


@compiled()
def _elect(d, begin, end, weights, elect, weighted, divide, vote, share, out):
    """out = Σ w τ, or the share of it that has the elected sign, divided as `divide` says.

    divide: 0 by nothing, 1 by how many took part, 2 by the |w| that took part.
    """
    vote, share, out = vote[begin:end], share[begin:end], out[begin:end]
    if elect and len(d) == 2:
        _elect_of_two(d[0, begin:end], d[1, begin:end], weights, weighted, divide, out)
        return
    out[:] = 0
    if elect:
        vote[:] = 0
        for i in range(len(d)):
            row, w = d[i, begin:end], weights[i] if weighted else np.float32(1)
            for j in range(len(row)):
                vote[j] += w * row[j]
    if divide > 0:
        share[:] = 0
    for i in range(len(d)):
        row, w = d[i, begin:end], weights[i]
        side = w if weighted else np.float32(1)
        part = abs(w) if divide == 2 else np.float32(1)
        if elect:
            for j in range(len(row)):
                out[j] += w * row[j] if _agree(side * row[j], vote[j]) else np.float32(0)
        else:
            for j in range(len(row)):
                out[j] += w * row[j]
        if divide > 0:
            for j in range(len(row)):
                ballot = side * row[j]
                takes_part = not elect or (_agree(ballot, vote[j]) & (ballot != 0))
                share[j] += part if takes_part else np.float32(0)
    if divide > 0:
        for j in range(len(out)):
            out[j] = out[j] / share[j] if share[j] > 0 else out[j]


@compiled()
def _elect_of_two(one, two, weights, weighted, divide, out):
    """The same numbers for two models, in one pass in place of eight."""
    nought = np.float32(0)
    w1, w2 = weights[0], weights[1]
    side1, side2 = (w1, w2) if weighted else (np.float32(1), np.float32(1))
    part1, part2 = (abs(w1), abs(w2)) if divide == 2 else (np.float32(1), np.float32(1))
    for j in range(len(out)):
        ballot1, ballot2 = side1 * one[j], side2 * two[j]
        vote = ballot1 + ballot2
        agree1, agree2 = _agree(ballot1, vote), _agree(ballot2, vote)
        sum1, sum2 = w1 * one[j], w2 * two[j]
        total = (nought + (sum1 if agree1 else nought)) + (sum2 if agree2 else nought)
        share1 = part1 if agree1 & (ballot1 != 0) else nought
        share2 = part2 if agree2 & (ballot2 != 0) else nought
        share = share1 + share2
        out[j] = total / share if (divide > 0) & (share > 0) else total


@compiled()
def _agree(ballot, vote):
    """Whether a ballot that is not 0 has the elected sign: plus where the vote is 0."""
    return (ballot >= 0) == (vote >= 0)


@compiled(parallel=True)
def elect(
    base, base_kind, models, kinds, n, start,
    limits, cuts, keys, odds, chances, kept, shared, scales,
    weights, election, weighted, divide, times,
    out, out_kind, stochastic, key, tally,
):  # fmt: skip
    """out = base + times · elected(τ), stored; tally (tiles, 3): bad, moved, changed."""
    for tile in prange((n + TILE - 1) // TILE):
        b = np.empty(TILE, np.float32)
        d = np.empty((len(models), TILE), np.float32)
        v = np.empty(TILE, np.float32)
        vote, share = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        before = np.empty(4 * TILE, np.uint8)
        low, high = tile * TILE, min(n, (tile + 1) * TILE)
        width = high - low
        read_tile(base, base_kind, models, kinds, low, high, b, d)
        trim_tile(
            d, width, start + low, limits, cuts, keys, odds, chances, kept, low, shared, scales, v
        )
        for begin in range(0, width, BLOCK):
            end = min(width, begin + BLOCK)
            ask(stored(base, base_kind, high), begin, end)
            for i in range(len(models)):
                ask(stored(models[i], kinds[i], high), begin, end)
            _elect(d, begin, end, weights, election, weighted, divide, vote, share, v)
        merged = d[0]
        for j in range(width):
            v[j] = v[j] * times
            merged[j] = b[j] + v[j]
        tally[tile, 0] = encode_tile(
            merged, width, out_kind, stochastic, key, start + low, out, low
        )
        tally[tile, 1], tally[tile, 2] = changed(v, b, width, out_kind, out, low, before)


@compiled(parallel=True)
def combine(models, kinds, n, start, weights, out, out_kind, stochastic, key, bad):
    """out = Σ w_i x_i, stored; bad (tiles,) counts what overflows."""
    for tile in prange((n + TILE - 1) // TILE):
        x = np.empty(TILE, np.float32)
        total = np.zeros(TILE, np.float32)
        low, high = tile * TILE, min(n, (tile + 1) * TILE)
        for i in range(len(models)):
            decode_tile(models[i], kinds[i], low, high, x)
            w = weights[i]
            for j in range(high - low):
                total[j] += w * x[j]
        bad[tile] = encode_tile(total, high - low, out_kind, stochastic, key, start + low, out, low)
