"""Balance by hand: what a plain AUC hides, a two-sided one and the KS distance show."""

import numpy as np
import pytest

from expunge.errors import EvaluationError
from expunge.evaluate.balance import CHEAP, balance, separation_gap, shape, two_sided_auc
from expunge.evaluate.membership import auc


def test_half_far_above_and_half_far_below_is_balanced_only_for_who_looks_one_way():
    others = [-1.0, -0.5, 0.0, 0.5, 1.0]
    members = [9.0, 10.0, -9.0, -10.0]
    assert auc(members, others) == 0.5
    assert two_sided_auc(members, others) == 1.0
    found = balance({"loss": (members, others)})["loss"]
    assert found["auc"] == 0.5
    assert found["ks"] == 0.5
    assert found["gap"] == 0


def test_the_two_sided_attack_by_hand():
    # μ = 2; members are 1 and 2 from it; others, each from the mean of the other two: 3, 0, 3
    # 1 > 0 only; 2 > 0 only: 2 of 6
    assert two_sided_auc([3.0, 0.0], [0.0, 2.0, 4.0]) == pytest.approx(2 / 6)


def test_both_sides_alike_are_told_apart_by_neither_attack():
    rng = np.random.default_rng(0)
    values = [
        two_sided_auc(rng.normal(size=40).tolist(), rng.normal(size=60).tolist())
        for _ in range(200)
    ]
    assert np.mean(values) == pytest.approx(0.5, abs=0.015)


def test_the_gap_goes_on_where_the_auc_has_ended():
    others = [0.0, 1.0]
    near, far = [3.0, 4.0], [30.0, 31.0]
    assert auc(near, others) == auc(far, others) == 1
    assert separation_gap(near, others) == pytest.approx(6)  # both spreads are 1/2
    assert separation_gap(far, others) > separation_gap(near, others)
    assert separation_gap(others, near) == pytest.approx(-6)


def test_intervals_hold_their_values():
    rng = np.random.default_rng(1)
    given = {"loss": (rng.normal(size=30).tolist(), rng.normal(size=30).tolist())}
    found = balance(given, resamples=200)["loss"]
    assert found["auc_low"] < found["auc"] < found["auc_high"]
    assert found["two_sided_low"] < found["two_sided_high"]


def test_attacks_that_need_no_more_than_scores():
    assert set(CHEAP) == {"loss", "zlib", "zlib_total", "min_k", "min_k_plus_plus"}


def test_too_few_non_members_have_no_other_mean():
    with pytest.raises(EvaluationError, match="a member and two non-members"):
        two_sided_auc([1.0], [1.0])


def test_the_shape_of_losses_has_an_interval_where_it_is_drawn():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0, 3, 40).tolist(), rng.normal(0, 1, 30).tolist()
    plain = shape(members, others)
    assert set(plain) == {"two_sided", "ks"}
    found = shape(members, others, resamples=200)
    low, high = found.pop("two_sided_interval").values()
    assert found == plain
    assert 0.5 < low < plain["two_sided"] < high < 1
    assert shape(members, others[:1], resamples=200) == {}
