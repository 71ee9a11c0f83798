"""Membership AUC and document losses."""

import math

import numpy as np
import pytest

from expunge.errors import EvaluationError
from expunge.evaluate.membership import auc, mia


@pytest.mark.parametrize(
    ("members", "others", "value"),
    [
        ([3, 4], [1, 2], 1.0),
        ([1, 2], [3, 4], 0.0),
        ([1, 1], [1, 1], 0.5),
        ([2, 1], [1, 0], 3.5 / 4),  # 2>1 2>0 1=1 1>0
        ([float("-inf"), 2], [0], 0.5),
    ],
)
def test_auc_by_hand(members, others, value):
    assert auc(members, others) == value


def test_auc_equals_all_pairs_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 30).astype(float)
    pairs = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert auc(a.tolist(), b.tolist()) == pytest.approx(pairs)


def test_low_losses_give_members_away_and_so_do_high_ones():
    known = mia([1.0, 1.1], [3.0, 3.1], seed=0, resamples=50)
    over = mia([9.0, 9.1], [3.0, 3.1], seed=0, resamples=50)
    assert (known["auc"], known["score"], known["n"]) == (1, 0, 4)
    assert (over["auc"], over["score"]) == (0, 0)
    assert mia([1.0, 3.0], [1.0, 3.0], seed=0, resamples=50)["score"] == 1


def test_the_interval_holds_the_auc_and_is_reproducible():
    rng = np.random.default_rng(1)
    members, others = rng.normal(0, 1, 60).tolist(), rng.normal(1, 1, 60).tolist()
    found = mia(members, others, seed=3, resamples=300)
    assert found["low"] < found["auc"] < found["high"] < found["low"] + 0.3
    assert found == mia(members, others, seed=3, resamples=300)


def test_one_sided_or_broken_scores_are_refused():
    with pytest.raises(EvaluationError, match="no non-member documents"):
        mia([1.0], [], seed=0)
    with pytest.raises(EvaluationError, match="1 of 2 member scores are NaN"):
        mia([1.0, math.nan], [1.0], seed=0)
