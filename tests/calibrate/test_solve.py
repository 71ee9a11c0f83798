"""The balance is found on any line that rises, and where there is none that is said."""

from dataclasses import dataclass
from statistics import NormalDist

import pytest

from expunge.calibrate.solve import solve_balance


@dataclass
class Found:
    auc: float
    gap: float


def line(zero: float, steep: float, seen: list[float]):
    def read(t: float) -> Found:
        seen.append(t)
        gap = steep * (t - zero)
        return Found(round(NormalDist().cdf(gap), 3), gap)

    return read


@pytest.mark.parametrize("zero", [0.03, 0.2, 0.5, 0.77, 0.96])
@pytest.mark.parametrize("steep", [3, 12, 60])
def test_a_rising_line_is_balanced_in_few_steps(zero, steep):
    seen: list[float] = []
    ends = (-steep * zero, steep * (1 - zero))
    found = solve_balance(line(zero, steep, seen), ends=ends, tolerance=0.02, steps=12)
    assert found.bracketed
    assert abs(found.auc - 0.5) <= 0.02
    assert len(seen) <= 8


def test_a_good_guess_of_the_ends_needs_one_step():
    seen: list[float] = []
    solve_balance(line(0.3, 10, seen), ends=(-3, 7), tolerance=0.02, steps=9)
    assert seen == [pytest.approx(0.3)]


def test_it_begins_where_it_is_told_to():
    seen: list[float] = []
    found = solve_balance(line(0.3, 10, seen), ends=(-3, 7), tolerance=0.02, steps=9, start=0.04)
    assert seen[0] == 0.04
    assert abs(found.auc - 0.5) <= 0.02


def test_a_line_that_never_comes_to_the_balance_says_so_and_gives_its_nearest():
    found = solve_balance(line(-0.5, 2, []), tolerance=0.02, steps=5)
    assert not found.bracketed
    assert found.t < 0.05


def test_an_auc_of_one_is_no_reason_to_stay():
    """Where the AUC says nothing, the gap still tells how far it is."""
    seen: list[float] = []
    found = solve_balance(line(0.11, 400, seen), tolerance=0.05, steps=20)
    assert abs(found.t - 0.11) < 0.01


def test_it_stops_at_its_steps():
    seen: list[float] = []

    def read(t: float) -> Found:
        seen.append(t)
        return Found(float(t > 0.123), t - 0.123)

    solve_balance(read, tolerance=1e-6, steps=4)
    assert len(seen) == 4
