"""Merging on the CPU without temporaries: compiled parallel loops over tiles of stored weights.

Dimensions: M models, n weights of one slice, in order; `start` is the place of the first of them in
its tensor. `base` and `models` are addresses; see codec. Every sum is taken by tile and then in
order, so the number of threads cannot change a bit.
"""

import numpy as np
from numba import prange

from expunge.merge.codec import (
    TILE,
    changed,
    compiled,
    decode_tile,
    encode_tile,
    read_tile,
    uniform,
    variance,
)


@compiled()
def _trim(d, width, first, bounds, keys, odds, chances, place, shared, scales, v):
    """δ_i → τ_i in place: what lies between the bounds and is drawn, times its scale.

    bounds (rows, 2, 2): [outer, inner][bits, cut]: among the magnitudes from the greatest down,
    lower index first among equals, outer ones go and inner ones stay. Drawing is by the odds of a
    model, or by those of each number where `chances` (M, n) gives them; a scale of 0 then means
    that each is divided by its own.
    """
    if shared:
        variance(d, width, v)
    for i in range(len(d)):
        row = d[i]
        bits = v.view(np.uint32) if shared else row.view(np.uint32)
        r = 0 if shared else i
        out_bits, out_cut = np.uint32(bounds[r, 0, 0]), bounds[r, 0, 1]
        in_bits, in_cut = np.uint32(bounds[r, 1, 0]), bounds[r, 1, 1]
        each = scales[i] == 0
        scale = np.float32(1) if each else scales[i]
        for j in range(width):
            magnitude = bits[j] & np.uint32(0x7FFFFFFF)
            index = first + j
            outer = (magnitude > out_bits) | ((magnitude == out_bits) & (index < out_cut))
            inner = (magnitude > in_bits) | ((magnitude == in_bits) & (index < in_cut))
            row[j] = row[j] * scale if inner and not outer else np.float32(0)
        if len(chances) > 0:
            for j in range(width):
                chance = chances[i, place + j]
                drawn = uniform(keys[i], first + j) < chance
                row[j] = (row[j] / chance if each else row[j]) if drawn else np.float32(0)
        elif odds[i] < 1:
            for j in range(width):
                if uniform(keys[i], first + j) >= odds[i]:
                    row[j] = np.float32(0)


@compiled()
def _elect(d, width, weights, elect, weighted, divide, vote, share, out):
    """out = Σ w τ, or the share of it that has the elected sign, divided as `divide` says.

    divide: 0 by nothing, 1 by how many took part, 2 by the |w| that took part.
    """
    vote[:width] = 0
    share[:width] = 0
    out[:width] = 0
    for i in range(len(d)):
        row, w = d[i], weights[i] if weighted else np.float32(1)
        for j in range(width):
            vote[j] += w * row[j]
    for j in range(width):
        vote[j] = np.float32(1) if vote[j] >= 0 else np.float32(-1)
    for i in range(len(d)):
        row, w = d[i], weights[i]
        side = w if weighted else np.float32(1)
        part = abs(w) if divide == 2 else np.float32(1)
        for j in range(width):
            takes_part = not elect or side * row[j] * vote[j] > 0
            out[j] += w * row[j] if takes_part else np.float32(0)
            share[j] += part if takes_part else np.float32(0)
    if divide > 0:
        for j in range(width):
            out[j] = out[j] / share[j] if share[j] > 0 else out[j]


@compiled(parallel=True)
def measure(
    base, base_kind, models, kinds, n, start,
    bounds, keys, odds, chances, shared, scales,
    sums,
):  # fmt: skip
    """sums (tiles, M, 3): Σ|δ_i|, Σ|τ_i| and Σ τ_i² of each tile."""
    for tile in prange((n + TILE - 1) // TILE):
        b = np.empty(TILE, np.float32)
        d = np.empty((len(models), TILE), np.float32)
        v = np.empty(TILE, np.float32)
        low, high = tile * TILE, min(n, (tile + 1) * TILE)
        width = high - low
        read_tile(base, base_kind, models, kinds, low, high, b, d)
        for i in range(len(models)):
            for j in range(width):
                sums[tile, i, 0] += abs(np.float64(d[i, j]))
        _trim(d, width, start + low, bounds, keys, odds, chances, low, shared, scales, v)
        for i in range(len(models)):
            for j in range(width):
                kept = np.float64(d[i, j])
                sums[tile, i, 1] += abs(kept)
                sums[tile, i, 2] += kept * kept


@compiled(parallel=True)
def elect(
    base, base_kind, models, kinds, n, start,
    bounds, keys, odds, chances, shared, scales,
    weights, election, weighted, divide, times,
    out, out_kind, stochastic, key, tally,
):  # fmt: skip
    """out = base + times · elected(τ), stored; tally (tiles, 3): bad, moved, changed."""
    for tile in prange((n + TILE - 1) // TILE):
        b = np.empty(TILE, np.float32)
        d = np.empty((len(models), TILE), np.float32)
        v = np.empty(TILE, np.float32)
        vote, share = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        stored = np.empty(4 * TILE, np.uint8)
        low, high = tile * TILE, min(n, (tile + 1) * TILE)
        width = high - low
        read_tile(base, base_kind, models, kinds, low, high, b, d)
        _trim(d, width, start + low, bounds, keys, odds, chances, low, shared, scales, v)
        _elect(d, width, weights, election, weighted, divide, vote, share, v)
        merged = d[0]
        for j in range(width):
            v[j] = v[j] * times
            merged[j] = b[j] + v[j]
        tally[tile, 0] = encode_tile(
            merged, width, out_kind, stochastic, key, start + low, out, low
        )
        tally[tile, 1], tally[tile, 2] = changed(v, b, width, out_kind, out, low, stored)


@compiled(parallel=True)
def products(base, base_kind, models, kinds, n, sums):
    """sums (tiles, M, M): the inner products of the δ_i in each tile, in float64."""
    for tile in prange((n + TILE - 1) // TILE):
        b = np.empty(TILE, np.float32)
        d = np.empty((len(models), TILE), np.float32)
        low, high = tile * TILE, min(n, (tile + 1) * TILE)
        read_tile(base, base_kind, models, kinds, low, high, b, d)
        whole = (high - low) // 16 * 16
        for i in range(len(models)):
            for k in range(i, len(models)):
                one, two = d[i], d[k]
                lanes = np.zeros(16, np.float64)
                for j in range(0, whole, 16):
                    for lane in range(16):
                        lanes[lane] += np.float64(one[j + lane]) * np.float64(two[j + lane])
                for j in range(whole, high - low):
                    lanes[0] += np.float64(one[j]) * np.float64(two[j])
                sums[tile, i, k] = sums[tile, k, i] = lanes.sum()


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
