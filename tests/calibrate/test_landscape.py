"""The balance line of a surface, by hand."""

import pytest

from expunge.calibrate.landscape import balance_line


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
