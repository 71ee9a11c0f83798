"""Sums over the differences of models, in compiled parallel loops over tiles of stored weights.

Dimensions: M models, n weights of one slice, in order; `start` is the place of the first of them in
its tensor. `base` and `models` are addresses; see codec. Sums are taken in float64, in lanes side
by side so that none waits for the one before it, by tile and then in order, so that the number of
threads cannot change a bit.
"""

import numpy as np
from numba import prange

from expunge.merge.codec import (
    BLOCK,
    LANES,
    NOTHING,
    TILE,
    ask,
    read_tile,
    stored,
)
from expunge.merge.draws import drawn_bits, scaled
from expunge.merge.jit import compiled
from expunge.merge.kernels import trim_tile


@compiled(parallel=True)
def measure(
    base, base_kind, models, kinds, n, start,
    limits, cuts, keys, odds, chances, kept, shared, scales,
    squared, sums,
):  # fmt: skip
    """sums (tiles, M, 2): Σ|δ_i| and Σ|τ_i| of each tile; or 0 and Σ τ_i² where `squared`."""
    for tile in prange((n + TILE - 1) // TILE):
        b = np.empty(TILE, np.float32)
        d = np.empty((len(models), TILE), np.float32)
        v = np.empty(TILE, np.float32)
        low, high = tile * TILE, min(n, (tile + 1) * TILE)
        width = high - low
        read_tile(base, base_kind, models, kinds, low, high, b, d)
        if not squared:
            for i in range(len(models)):
                sums[tile, i, 0] = _sum(d[i, :width], NOTHING, NOTHING)
        trim_tile(
            d, width, start + low, limits, cuts, keys, odds, chances, kept, low, shared, scales, v
        )
        for i in range(len(models)):
            row, near = d[i, :width], stored(models[i], kinds[i], high)
            also = stored(base, base_kind, high) if i == 0 else NOTHING
            sums[tile, i, 1] = _product(row, row, near, also) if squared else _sum(row, near, also)


@compiled()
def _sum(row, near, also):
    """Σ|x|; asks meanwhile for what is needed next."""
    lanes = np.zeros(LANES, np.float64)
    whole = len(row) // LANES * LANES
    for begin in range(0, whole, LANES):
        ask(near, begin, begin + LANES)
        ask(also, begin, begin + LANES)
        for lane in range(LANES):
            lanes[lane] += abs(np.float64(row[begin + lane]))
    for j in range(whole, len(row)):
        lanes[0] += abs(np.float64(row[j]))
    return lanes.sum()


@compiled(parallel=True)
def measure_drawn(base, base_kind, models, kinds, n, start, keys, odds, sums):
    """The sums of `measure` where numbers are drawn by the odds of their model alone."""
    for tile in prange((n + TILE - 1) // TILE):
        b = np.empty(TILE, np.float32)
        d = np.empty((len(models), TILE), np.float32)
        low, high = tile * TILE, min(n, (tile + 1) * TILE)
        read_tile(base, base_kind, models, kinds, low, high, b, d)
        for i in range(len(models)):
            row, near = d[i, : high - low], stored(models[i], kinds[i], high)
            also = stored(base, base_kind, high) if i == 0 else NOTHING
            _sum_drawn(row, keys[i], start + low, odds[i], sums[tile, i], near, also)


@compiled()
def _sum_drawn(row, key, first, chance, sums, near, also):
    """sums (2,): Σ|x|, and that of the x which are drawn."""
    lanes, drawn = np.zeros(LANES, np.float64), np.zeros(LANES, np.float64)
    pairs = np.empty(BLOCK // 2 + 1, np.uint64)
    for start in range(0, len(row), BLOCK):
        part = row[start : start + BLOCK]
        ask(near, start, start + len(part))
        ask(also, start, start + len(part))
        bits = drawn_bits(key, first + start, len(part), pairs)
        whole = len(part) // LANES * LANES
        for begin in range(0, whole, LANES):
            for lane in range(LANES):
                x = abs(np.float64(part[begin + lane]))
                lanes[lane] += x
                drawn[lane] += x if scaled(bits[begin + lane]) < chance else np.float64(0)
        for j in range(whole, len(part)):
            x = abs(np.float64(part[j]))
            lanes[0] += x
            drawn[0] += x if scaled(bits[j]) < chance else np.float64(0)
    sums[0], sums[1] = lanes.sum(), drawn.sum()


@compiled(parallel=True)
def products(base, base_kind, models, kinds, n, sums):
    """sums (tiles, M, M): the inner products of the δ_i in each tile, in float64."""
    for tile in prange((n + TILE - 1) // TILE):
        b = np.empty(TILE, np.float32)
        d = np.empty((len(models), TILE), np.float32)
        low, high = tile * TILE, min(n, (tile + 1) * TILE)
        read_tile(base, base_kind, models, kinds, low, high, b, d)
        for i in range(len(models)):
            for k in range(i, len(models)):
                near = stored(models[k], kinds[k], high) if i == 0 else NOTHING
                also = stored(base, base_kind, high) if i == k == 0 else NOTHING
                one, two = d[i, : high - low], d[k, : high - low]
                sums[tile, i, k] = sums[tile, k, i] = _product(one, two, near, also)


@compiled()
def _product(one, two, near, also):
    """Σ x y."""
    lanes = np.zeros(LANES, np.float64)
    whole = len(one) // LANES * LANES
    for begin in range(0, whole, LANES):
        ask(near, begin, begin + LANES)
        ask(also, begin, begin + LANES)
        for lane in range(LANES):
            lanes[lane] += np.float64(one[begin + lane]) * np.float64(two[begin + lane])
    for j in range(whole, len(one)):
        lanes[0] += np.float64(one[j]) * np.float64(two[j])
    return lanes.sum()
