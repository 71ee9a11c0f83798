"""Do two samples come from one distribution? The test of Kolmogorov and Smirnov, exactly.

Dimensions: m and n values.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import comb

import numpy as np

from expunge.errors import EvaluationError


def ks_test(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The largest distance of two empirical distributions, and its two-sided p-value.

        D = max_x |F_m(x) - F_n(x)|,    p = P(D' ≥ D) under every order of m + n values alike

    An order is a lattice path from (0, 0) to (m, n), and p the share of those that somewhere come
    as far from the diagonal as D: counted in whole numbers, so that p is exact however small. Ties
    count as in scipy's exact mode: D is taken where the values differ. NaN or an empty sample is an
    `EvaluationError`. Time grows with m · n; some thousands each are fine.

    Source: Hodges 1958, The significance probability of the Smirnov two-sample test.
    """
    a, b = np.sort(np.asarray(first, float)), np.sort(np.asarray(second, float))
    if not len(a) or not len(b):
        raise EvaluationError("the two-sample test needs values on both sides")
    if np.isnan(a).any() or np.isnan(b).any():
        raise EvaluationError("the two-sample test was given NaN")
    values = np.concatenate([a, b])
    m, n = len(a), len(b)
    up_to = [np.searchsorted(x, values, side="right") for x in (a, b)]
    gap = int(np.abs(n * up_to[0] - m * up_to[1]).max())  # m n D
    total = comb(m + n, n)
    return gap / (m * n), (total - _paths_within(m, n, gap)) / total


def _paths_within(m: int, n: int, gap: int) -> int:
    """Lattice paths to (m, n) with |n i - m j| < gap at every point (i, j)."""
    row = [1] + [0] * n  # (j): paths to (i, j)
    for i in range(m + 1):
        low = max(0, (n * i - gap) // m + 1)
        high = min(n, -((-n * i - gap) // m) - 1)
        if low > high:
            return 0
        inside = accumulate(row[low : high + 1])
        row = [0] * low + list(inside) + [0] * (n - high)
    return row[n]
