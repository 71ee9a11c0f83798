"""Stored numbers to float32 and back, one tile at a time, inside compiled kernels.

Dimensions: M models, width numbers of a tile, at most TILE. A kernel is given addresses of stored
numbers, so that one compiled version serves any number of models.
"""

import numpy as np
from llvmlite import ir
from numba import carray, prange, types  # pyright: ignore[reportPrivateImportUsage]
from numba.extending import intrinsic

from expunge.merge.draws import uniform
from expunge.merge.jit import compiled

FLOAT32, BFLOAT16, FLOAT16, DELTA = 0, 1, 2, 3
"""How the bytes of one model are read; DELTA is a float32 difference from the base."""

TILE, BLOCK, LANES = 16384, 512, 64
"""Numbers that a kernel holds decoded at once; that it works on before it asks for more of the next
tile; that one turn of a sum takes side by side."""

NOTHING, _LINE = (0, 0), 64
"""To be asked for, where nothing is; bytes of a cache line."""

BINS, LOW_BITS = 1 << 16, 15
"""A magnitude (31 bits of a float32) is its high 16 bits, the bin, and its low 15."""

WINDOW, INFINITY = 1 << 18, 0x7F800000
"""Magnitudes that are counted each by itself; the bits of an infinite one."""


@intrinsic
def _pointer(typing_context, address, like):
    """The address as a pointer to numbers of the type of `like`."""
    pointer = types.CPointer(like)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, like), generate


@intrinsic
def _prefetch(typing_context, address):
    """Ask for the cache line at an address, without waiting for it."""

    def generate(context, builder, signature, arguments):
        byte, number = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(ask, [builder.inttoptr(arguments[0], byte), number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@compiled()
def stored(address, kind, place):
    """Where the number at a place is stored, and how many bytes each takes."""
    size = 2 if kind in (BFLOAT16, FLOAT16) else 4
    return address + size * place, size


@compiled()
def ask(near, begin, end):
    """Have numbers begin … end from `near` (see stored) on their way while others are worked on.

    A kernel asks for its next tile a little at a time. Left to itself it would read a tile, then
    work on it while memory rests.
    """
    address, size = near
    for line in range(address + size * begin, address + size * end, _LINE):
        _prefetch(line)  # pyright: ignore[reportCallIssue]


@compiled()
def decode_tile(source, kind, low, high, out):
    """out[: high - low] = weights low … high of those at the address `source`, as float32."""
    if kind == BFLOAT16:
        half = carray(_pointer(source + 2 * low, np.uint16(0)), high - low)  # pyright: ignore
        bits = out.view(np.uint32)
        for j in range(high - low):
            bits[j] = np.uint32(half[j]) << np.uint32(16)
    elif kind == FLOAT16:
        half = carray(_pointer(source + 2 * low, np.uint16(0)), high - low)  # pyright: ignore
        bits = out.view(np.uint32)
        for j in range(high - low):
            h = np.uint32(half[j])
            bits[j] = (h & np.uint32(0x7FFF)) << np.uint32(13)
            magnitude = out[j] * np.float32(2.0**112)  # exact, subnormals too
            out[j] = magnitude
            if (h & np.uint32(0x7C00)) == np.uint32(0x7C00):  # infinite or NaN
                bits[j] |= np.uint32(0x7F800000)
            bits[j] |= (h & np.uint32(0x8000)) << np.uint32(16)
    else:
        full = carray(_pointer(source + 4 * low, np.float32(0)), high - low)  # pyright: ignore
        for j in range(high - low):
            out[j] = full[j]


@compiled(parallel=True)
def scatter(source, words, step, out):
    """out (count, words) = every step-th piece, of so many 8-byte words, from `source` on."""
    for piece in prange(len(out)):
        given = carray(_pointer(source + 8 * words * step * piece, np.uint64(0)), words)  # pyright: ignore
        for j in range(words):
            out[piece, j] = given[j]


@compiled()
def read_tile(base, base_kind, models, kinds, low, high, b, d):
    """b = the base, d[i] = δ_i of the weights low … high."""
    decode_tile(base, base_kind, low, high, b)
    _subtract(models, kinds, low, high, b, d)


@compiled()
def read_deltas(base, base_kind, models, kinds, low, high, b, d):
    """d[i] = δ_i of the weights low … high; b is for the base, where one is needed for that."""
    if (kinds != DELTA).any():
        decode_tile(base, base_kind, low, high, b)
    _subtract(models, kinds, low, high, b, d)


@compiled()
def deltas_at(source, low, high):
    """δ of the weights low … high where they are stored as such, without a copy."""
    return carray(_pointer(source + 4 * low, np.float32(0)), high - low)  # pyright: ignore


@compiled()
def _subtract(models, kinds, low, high, b, d):
    """d[i] = the weights low … high less those of the base, b, unless they are δ_i already."""
    for i in range(len(models)):
        row = d[i]
        if kinds[i] == BFLOAT16:  # in one loop, as most are
            half = carray(_pointer(models[i] + 2 * low, np.uint16(0)), high - low)  # pyright: ignore
            for j in range(high - low):
                row[j] = np.uint32(np.uint32(half[j]) << np.uint32(16)).view(np.float32) - b[j]
            continue
        decode_tile(models[i], kinds[i], low, high, row)
        if kinds[i] != DELTA:
            for j in range(high - low):
                row[j] = row[j] - b[j]


@compiled()
def variance(d, width, out):
    """out[j] = the variance of the δ_i[j] over models; a loop a model, for those are vectorised."""
    v, m = out[:width], np.float32(len(d))
    if len(d) == 2:
        one, two = d[0, :width], d[1, :width]
        for j in range(len(v)):
            mean = (one[j] + two[j]) / m
            first, second = one[j] - mean, two[j] - mean
            v[j] = (first * first + second * second) / m
        return
    means = np.zeros(width, np.float32)
    for i in range(len(d)):
        row = d[i, :width]
        for j in range(len(row)):
            means[j] += row[j]
    for j in range(len(v)):
        means[j], v[j] = means[j] / m, np.float32(0)
    for i in range(len(d)):
        row = d[i, :width]
        for j in range(len(row)):
            v[j] += (row[j] - means[j]) * (row[j] - means[j])
    for j in range(len(v)):
        v[j] /= m


@compiled()
def encode_tile(value, width, kind, stochastic, key, first, out, low):
    """Round float32 to the stored type, to nearest even or at random; returns how many overflow."""
    bits = value.view(np.uint32)
    bad = 0
    if kind == BFLOAT16:
        half = out[2 * low : 2 * (low + width)].view(np.uint16)
        most = np.uint32(0)
        for j in range(width):
            u = bits[j]
            if stochastic:
                add = np.uint32(uniform(key, first + j) * np.float32(65536))
            else:
                add = np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
            half[j] = np.uint16((u + add) >> np.uint32(16))
            most = max(most, u & np.uint32(0x7FFFFFFF))
        if most >= np.uint32(0x7F7F0000):  # some may have become infinite, or not be numbers
            for j in range(width):
                infinite = (half[j] & np.uint16(0x7F80)) == np.uint16(0x7F80)
                bad += infinite | ((bits[j] & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000))
    elif kind == FLOAT16:
        half = out[2 * low : 2 * (low + width)].view(np.uint16)
        for j in range(width):
            u = bits[j] & np.uint32(0x7FFFFFFF)
            sign = np.uint16((bits[j] >> np.uint32(16)) & np.uint32(0x8000))
            magnitude = abs(value[j])
            if u < np.uint32(0x38800000):  # below 2^-14: steps of 2^-24
                steps = np.float64(magnitude) * 2.0**24
                r = np.floor(steps + uniform(key, first + j)) if stochastic else np.rint(steps)
                code = np.uint32(r)
            else:
                if stochastic:
                    add = np.uint32(uniform(key, first + j) * np.float32(8192))
                else:
                    add = np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))
                code = (u + add - np.uint32(0x38000000)) >> np.uint32(13)
            bad += (code >= np.uint32(0x7C00)) | (u >= np.uint32(0x7F800000))
            half[j] = np.uint16(code) | sign
    else:
        full = out[4 * low : 4 * (low + width)].view(np.uint32)
        for j in range(width):
            full[j] = bits[j]
            bad += (bits[j] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return bad


@compiled()
def changed(delta, b, width, kind, out, low, stored):
    """How many weights have a delta, and in how many of them it shows once stored."""
    moved = kept = 0
    if kind == BFLOAT16:
        half = out[2 * low : 2 * (low + width)].view(np.uint16)
        bits = b.view(np.uint32)
        for j in range(width):
            moves = delta[j] != 0
            before = bits[j] + np.uint32(0x7FFF) + ((bits[j] >> np.uint32(16)) & np.uint32(1))
            moved += moves
            kept += moves & (np.uint32(half[j]) != before >> np.uint32(16))
        return moved, kept
    for j in range(width):
        moved += delta[j] != 0
    if kind == FLOAT16:
        half = out[2 * low : 2 * (low + width)].view(np.uint16)
        encode_tile(b, width, kind, False, np.uint64(0), 0, stored, 0)
        before = stored[: 2 * width].view(np.uint16)
        for j in range(width):
            kept += (delta[j] != 0) & (half[j] != before[j])
    else:
        full = out[4 * low : 4 * (low + width)].view(np.float32)
        for j in range(width):
            kept += (delta[j] != 0) & (full[j] != b[j])
    return moved, kept
