"""What a calibration looks for: pure functions of a reading, the greater the better."""

from collections.abc import Callable
from dataclasses import dataclass

from expunge.calibrate.reading import Reading


def balanced(reading: Reading) -> float:
    """The harmonic mean of the task aggregate and the membership balance, one and two-sided.

    2 / (1/a + 1/b),   b = min over attacks of 1 - 2 |AUC - 1/2| and 1 - 2 |AUC₂ - 1/2|
    """
    a, b = reading.aggregate, max(0.0, reading.membership_balance)
    return 2 * a * b / (a + b) if a + b else 0.0


def final(reading: Reading) -> float:
    """The mean of the task aggregate and the MIA score of the worst attack."""
    return (reading.aggregate + reading.mia) / 2


def aggregate(reading: Reading) -> float:
    """The task aggregate alone; membership is still solved for."""
    return reading.aggregate


def membership(reading: Reading) -> float:
    """The MIA score of the worst attack."""
    return reading.mia


def two_sided(reading: Reading) -> float:
    """What the two-sided attack does not tell apart: 1 - 2 |AUC₂ - 1/2|."""
    return 1 - 2 * abs(reading.two_sided - 0.5)


def distribution(reading: Reading) -> float:
    """1 - the greatest Kolmogorov-Smirnov distance over the attacks."""
    return 1 - reading.ks


@dataclass(frozen=True)
class Row:
    """One row: what is maximised."""

    fn: Callable[[Reading], float]


OBJECTIVES = {
    "balanced": Row(balanced),
    "final": Row(final),
    "aggregate": Row(aggregate),
    "membership": Row(membership),
    "two_sided": Row(two_sided),
    "distribution": Row(distribution),
}
