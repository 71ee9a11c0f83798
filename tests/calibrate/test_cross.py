"""Cross-calibration on lines whose balance is known by hand."""

import numpy as np
import pytest

from expunge.calibrate.cross import Line, around, balanced_at, cross_calibrated
from expunge.evaluate.membership import auc

POINTS = [0.0, 0.5, 1.0]


def rising(offsets, others) -> Line:
    """Members rise by 10 t from their offsets; non-members stay."""
    members = np.array([[10 * t + o for o in offsets] for t in POINTS])
    return Line(POINTS, {"loss": (members, np.array([others] * len(POINTS)))})


def test_the_balance_lies_where_members_pass_the_others():
    line = rising([0.0, 0.0], [3.0, 3.0])
    assert balanced_at(line) == pytest.approx(0.3, abs=1e-6)


def test_no_place_on_a_line_is_better_for_the_worst_attack_than_the_balance():
    rng = np.random.default_rng(0)
    scores = {}
    for name, ahead in (("loss", 0.0), ("zlib_total", 0.4), ("min_k_plus_plus", 3.0)):
        members, others = rng.normal(size=(2, 300))
        scores[name] = (
            np.array([members + 8 * t - 4 + ahead for t in POINTS]),
            np.array([others] * len(POINTS)),
        )
    line = Line(POINTS, scores)

    def aucs(t: float) -> np.ndarray:
        return np.array([auc(m.tolist(), n.tolist()) for m, n in line.at(t).values()])

    def worst(t: float) -> float:
        return float(np.abs(aucs(t) - 0.5).max())

    places = np.linspace(0, 1, 101)
    balanced = worst(balanced_at(line))
    assert balanced == pytest.approx(min(map(worst, places)), abs=0.01)
    mean = min(places, key=lambda t: abs(aucs(t).mean() - 0.5))  # two of three outvote the third
    assert worst(mean) > balanced + 0.05


def test_documents_between_two_points_are_interpolated():
    found = rising([0.0, 1.0], [5.0, 5.0]).at(0.25)["loss"]
    assert found[0].tolist() == [2.5, 3.5]
    assert found[1].tolist() == [5.0, 5.0]


def test_folds_that_disagree_show_it_and_folds_that_agree_do_not():
    agree = cross_calibrated(rising([0.0] * 4, [3.0] * 4), [0, 0, 1, 1], [0, 0, 1, 1], folds=2)
    assert agree["t_deviation"] == pytest.approx(0, abs=1e-9)
    apart = rising([0.0, 0.0, 4.0, 4.0], [5.0] * 4)  # balanced at 0.5 and at 0.1
    found = cross_calibrated(apart, [0, 0, 1, 1], [0, 0, 1, 1], folds=2)
    assert sorted(f["t"] for f in found["folds"]) == pytest.approx([0.1, 0.5], abs=1e-6)
    assert found["t_deviation"] == pytest.approx(0.2 * 2**0.5, abs=1e-6)
    assert found["auc_mean"] == 0.5  # one fold at 1, the other at 0: luck, as the deviation says
    assert found["auc_deviation"] == pytest.approx(0.5 * 2**0.5)  # of two folds: n - 1 = 1
    assert found["beyond"] == 0


def test_folds_that_balance_past_the_ends_are_counted():
    """Their t is that of the end, and scatters by less than it would."""
    apart = rising([0.0, 0.0, 90.0, 90.0], [5.0] * 4)
    found = cross_calibrated(apart, [0, 0, 1, 1], [0, 0, 1, 1], folds=2)
    assert sorted(f["t"] for f in found["folds"]) == pytest.approx([0.0, 0.5], abs=1e-6)
    assert found["beyond"] == 1


def test_a_fold_without_a_side_is_left_out():
    line = rising([0.0] * 4, [3.0] * 6)
    found = cross_calibrated(line, [0, 0, 1, 1], [0, 0, 1, 1, 2, 2], folds=3)
    assert [f["fold"] for f in found["folds"]] == [0, 1]
    line = rising([0.0] * 12, [3.0] * 12)
    one = cross_calibrated(line, [0] * 10 + [1, 2], [0] * 9 + [1] * 2 + [2], folds=3)
    assert len(one["folds"]) == 1 and one["auc_deviation"] is one["t_deviation"] is None


def test_tasks_that_are_balanced_apart_are_so_in_every_fold():
    """One task of members passes at 0.1, the other at 0.5: the worst of both is least midway."""
    line = rising([0.0, 4.0] * 4, [5.0, 5.1] * 4)
    folds = [0, 0, 0, 0, 1, 1, 1, 1]
    apart = Line(line.points, line.scores, (["a", "b"] * 4, ["a", "b"] * 4))
    found = cross_calibrated(apart, folds, folds, folds=2)
    assert {*found["folds"][0]["membership"]} == {"loss", "loss of a", "loss of b"}
    for fold in found["folds"]:
        aucs = [fold["membership"][f"loss of {task}"]["auc"] for task in "ab"]
        assert sum(aucs) / 2 == pytest.approx(0.5)
    with_one = Line(line.points, line.scores, (["a", "a"] * 4, ["a", "b"] * 4))
    assert cross_calibrated(with_one, folds, folds, folds=2)["folds"]  # control
    short = Line(line.points, line.scores, (["a", "b", "a", "a"] * 2, ["a", "b"] * 4))
    assert not cross_calibrated(short, folds, folds, folds=2)["folds"]  # one member of b a fold


def test_a_line_on_one_side_gives_its_nearer_end():
    assert balanced_at(rising([9.0, 9.0], [1.0, 1.0])) == 0.0
    assert balanced_at(rising([-90.0, -90.0], [1.0, 1.0])) == 1.0


def test_the_points_about_a_place_stay_within_the_line():
    assert around(0.5) == pytest.approx([0.38, 0.44, 0.5, 0.56, 0.62])
    assert around(0.02) == pytest.approx([0.0, 0.02, 0.08, 0.14])
