"""The two-sample test against orders counted by hand."""

import math

import numpy as np
import pytest

from expunge.errors import EvaluationError
from expunge.evaluate.two_sample import ks_test


def test_small_samples_by_hand():
    """Of the 20 orders of 3 + 3 values only the two wholly separate ones reach a distance of 1."""
    assert ks_test([1, 2, 3], [4, 5, 6]) == (1.0, 2 / 20)
    assert ks_test([1, 3, 5], [2, 4, 6]) == (1 / 3, 1.0)
    # Of the 6 orders of 2 + 2, D = 1 in aabb and bbaa, and 1/2 in the other four.
    assert ks_test([1, 2], [3, 4]) == (1.0, 2 / 6)
    assert ks_test([1, 3], [2, 4]) == (0.5, 1.0)
    # Of the 4 orders of 1 + 3 the lone value is first or last in two (D = 1), else D = 2/3.
    assert ks_test([0], [1, 2, 3]) == (1.0, 0.5)


def test_equal_samples_cannot_be_told_apart_and_distant_ones_can():
    values = list(np.linspace(0, 1, 200))
    assert ks_test(values, values) == (0.0, 1.0)
    statistic, p = ks_test(values, [v + 2 for v in values])
    assert statistic == 1.0
    assert p == pytest.approx(2 / math.comb(400, 200), rel=1e-12)  # 2e-119, no zero


def test_the_test_sees_only_the_order_of_values():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30), rng.normal(size=40) + 0.5
    assert ks_test(a, b) == ks_test(b, a) == ks_test(rng.permutation(a), b)
    assert ks_test(a, b) == ks_test(np.exp(a), np.exp(b)) == ks_test(-a, -b)


def test_it_agrees_with_scipy_ties_included():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 8, rng.integers(1, 30)), rng.integers(0, 9, rng.integers(1, 30))
        found, expected = ks_test(a, b), stats.ks_2samp(a, b, method="exact")
        assert found == pytest.approx((expected.statistic, expected.pvalue), abs=1e-10)


@pytest.mark.parametrize("sides", [([], [1.0]), ([1.0], []), ([math.nan], [1.0])])
def test_nothing_to_compare_is_refused(sides):
    with pytest.raises(EvaluationError, match="two-sample test"):
        ks_test(*sides)
