"""A calibration in words and on the page, without a model."""

from types import SimpleNamespace
from typing import Any

import pytest

from expunge import runs
from expunge.report import calibration_page
from expunge.report.calibration import calibration_rows, calibration_sentences

NUMBERS = {"auc": 0.6, "two_sided": 0.5, "ks": 0.2, "ks_p": 0.5}
SURE = {
    f"{name}_{end}": value
    for name in ("auc", "two_sided")
    for end, value in (("low", 0.25), ("high", 0.75))
}


def found(*, balanced: bool, beyond: int = 0) -> dict[str, Any]:
    sides = {
        side: {"auc": 0.6, "membership": {"loss": NUMBERS | SURE}}
        for side in ("calibration", "test")
    }
    folds = [{"membership": {"loss": {**NUMBERS, "two_sided": value}}} for value in (0.3, 0.5)]
    cross = {"folds": folds, "auc_mean": 0.5, "auc_deviation": 0.1, "t_deviation": 0.12}
    return {
        "chosen": 0,
        "settings": {},
        "points": [{"balanced": balanced, "role": "trial", **sides}],
        "cross": {**cross, "beyond": beyond},
        "screening": {"candidates": 0},
    }


def test_both_folds_are_told_with_intervals():
    said = calibration_sentences(found(balanced=True))
    assert [line for line in said if "[0.25, 0.75]" in line and "0.60" in line] == said[:2]
    assert ["on the calibration fold" in said[0], "on the test fold" in said[1]] == [True, True]


@pytest.mark.parametrize("balanced", [True, False])
def test_what_was_not_balanced_is_said_to_be_so(balanced):
    said = " ".join(calibration_sentences(found(balanced=balanced)))
    assert ("Point 0 is not balanced" in said) != balanced
    crossed = found(balanced=balanced)
    crossed["points"][0]["bracketed"] = True
    said = " ".join(calibration_sentences(crossed))
    assert ("its line crosses 1/2 between places that were tried" in said) != balanced


def test_a_baseline_that_is_left_out_is_told():
    without = found(balanced=True)
    assert any("The paper's merge" in line for line in calibration_sentences(without))
    without["points"].append({"role": "baseline"})
    assert not any("The paper's merge" in line for line in calibration_sentences(without))


def test_a_calibration_against_stand_ins_says_so():
    plain = found(balanced=True)
    made = {**plain, "settings": {"standins": True}}
    assert any("Stand-ins made of the members" in line for line in calibration_sentences(made))
    assert not any("Stand-ins" in line for line in calibration_sentences(plain))


def test_a_cross_calibration_tells_what_the_two_sided_attack_and_the_distance_say():
    said = calibration_sentences(found(balanced=True))[-1]
    assert "AUC 0.50 ± 0.10, two-sided 0.40 ± 0.14, KS 0.20 ± 0.00, t ±" in said


def test_a_row_has_the_widest_ends_of_the_attacks_intervals_on_both_folds():
    def side(low: float, high: float) -> dict[str, Any]:
        attacks = {"loss": NUMBERS | SURE, "zlib": {**NUMBERS, "auc_low": low, "auc_high": high}}
        numbers = {"aggregate": 0.5, "neutral_nll": 3.0, "terms": {}, "documents": 8}
        return {"auc": 0.6, "two_sided": 0.5, "ks": 0.2, **numbers, "membership": attacks}

    point = {"point": 0, "role": "target", "front": True, "official": None, "short": {}}
    point |= {
        "candidate": {},
        "refused": None,
        "calibration": side(0.2, 0.7),
        "test": side(0.3, 0.8),
    }
    given = {"chosen": 1, "points": [point]}
    (row,) = calibration_rows(given)
    assert row["AUC"] == "0.60 [0.20, 0.75] / 0.60 [0.25, 0.80]"
    del point["calibration"]["membership"]["loss"]["auc_low"]  # one that was made before
    assert calibration_rows(given)[0]["AUC"] == "0.60 / 0.60 [0.25, 0.80]"


def test_folds_that_balance_beyond_what_was_read_are_told():
    assert "t ± 0.120." in calibration_sentences(found(balanced=True))[-1]
    assert (
        "0.120 or more: 1 balance beyond"
        in calibration_sentences(found(balanced=True, beyond=1))[-1]
    )


def test_a_calibration_that_is_a_stage_and_was_asked_for_again_is_shown_once(tmp_path):
    stage = tmp_path / "stages" / "calibrated-a"
    runs.write_json(stage / "calibration.json", {"name": "calibrated"})
    for name, of in (("calibrated", "calibrated-a"), ("other", "other-b")):
        path = tmp_path / "calibration" / f"{name}-seed-42.json"
        runs.write_json(path, {"name": name, "stage": of})
    results = SimpleNamespace(stages=[{}], seed=42)
    material: Any = SimpleNamespace(results=results, run=tmp_path, stage_folder=lambda _: stage)
    shown = [one["name"] for one in calibration_page._found(material)]
    assert shown == ["calibrated", "other"]
