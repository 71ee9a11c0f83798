"""The balance line of a surface, by hand."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from expunge.calibrate import landscape
from expunge.calibrate.candidate import End
from expunge.calibrate.landscape import MEASURES, Landscape, balance_line, surface


def line(value: float, *points: tuple[float, float]) -> list[dict]:
    at = {"method": "ties", "dial": "density", "value": value}
    return [{**at, "t": t, "auc": auc} for t, auc in points]


def test_the_line_is_crossed_between_two_places():
    rows = line(0.8, (0.0, 0.1), (0.5, 0.3), (1.0, 0.7)) + line(0.4, (0.0, 0.4), (1.0, 0.9))
    found = balance_line(rows)
    assert [one["value"] for one in found] == [0.8, 0.4]
    assert found[0]["t"] == pytest.approx(0.75)
    assert found[1]["t"] == pytest.approx(0.2)


def test_a_line_that_stays_on_one_side_has_no_balance():
    assert balance_line(line(0.8, (0.0, 0.6), (1.0, 1.0)))[0]["t"] is None


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_place_that_is_balanced_is_the_crossing(place):
    points = [(t, 0.5 + (t - place)) for t in (0.0, 0.5, 1.0)]
    assert balance_line(line(1.0, *points))[0]["t"] == place


def test_methods_that_merge_factors_are_left_out_where_the_branches_differ_in_rank(monkeypatch):
    """A sum of updates does not mind; the control is that all are there where ranks are alike."""
    found = SimpleNamespace(as_json=lambda: dict.fromkeys(MEASURES, 0.5))
    monkeypatch.setattr(landscape, "screen", lambda *_: found)
    ends, config, given = (End(branch="deep"), End(branch="shallow")), Landscape(), Any
    for even, methods in ((False, {"linear"}), (True, {"linear", "ties"})):
        resident: Any = SimpleNamespace(
            reader=nullcontext, can_merge=lambda c, even=even: even or c.method == "linear"
        )
        rows = surface(resident, given, config, *ends)  # pyright: ignore
        assert {row["method"] for row in rows} == methods
