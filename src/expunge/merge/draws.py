"""Numbers drawn at random: functions of a key and an index alone, whatever is drawn before.

SplitMix64 gives 64 bits for every two indices, the low half to the even one.
"""

import numpy as np

from expunge.merge.jit import compiled

_GOLDEN, _MIX1, _MIX2 = (
    np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@compiled()
def uniform(key, index):
    """A float32 in [0, 1) with 24 random bits."""
    pair = _mixed(key, np.uint64(index) >> np.uint64(1))
    half = (np.uint64(index) & np.uint64(1)) << np.uint64(5)
    return scaled(np.uint32((pair >> half) & np.uint64(0xFFFFFFFF)))


@compiled()
def drawn_bits(key, first, width, pairs):
    """32 random bits for each of `width` indices from `first` on, which `scaled` makes the numbers
    of `uniform`; they lie in `pairs` (width // 2 + 1,) uint64."""
    odd = np.int64(first) & np.int64(1)
    place = np.uint64(first) >> np.uint64(1)
    for p in range((odd + width + 1) // 2):
        pairs[p] = _mixed(key, place + np.uint64(p))
    return pairs.view(np.uint32)[odd : odd + width]


@compiled()
def scaled(bits):
    """The upper 24 of 32 bits as a float32 in [0, 1)."""
    return np.float32(np.int32(bits >> np.uint32(8))) * np.float32(2.0**-24)


@compiled()
def _mixed(key, place):
    z = key + (place + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))
