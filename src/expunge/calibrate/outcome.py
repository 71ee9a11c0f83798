"""What a calibration found, as it is written to calibration.json.

`points` are all candidates that were screened whole, numbered as `expunge pick` takes them.
"""

from collections.abc import Sequence
from typing import Any

from expunge.calibrate.candidate import Candidate
from expunge.calibrate.reading import Reading
from expunge.calibrate.search import Point
from expunge.errors import CalibrationError

CALIBRATION = "calibration.json"

AIMS = ("forgetting", "retention", "balance")
"""What the front is about, the greater the better."""


def front(readings: Sequence[Reading]) -> list[int]:
    """Numbers of the readings that no other is at least as good as in all aims, and better in one.

    Aims: forgetting (1 - mean forget term), retention (mean retain term), membership balance.
    """
    values = [(r.forgetting, r.retention, r.membership_balance) for r in readings]
    return [
        n
        for n, mine in enumerate(values)
        if not any(
            all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine
            for other in values
        )
    ]


def rows(points: Sequence[Point], tests: dict[int, Reading]) -> list[dict[str, Any]]:
    """Each point with what it showed on the calibration fold, and on the test fold if asked."""
    best = set(front([point.reading for point in points]))
    return [
        {
            "point": number,
            "role": point.role,
            "label": point.candidate.label,
            "candidate": point.candidate.model_dump(mode="json"),
            "front": number in best,
            "balanced": point.balanced,
            "bracketed": point.bracketed,
            "short": dict(point.short),
            "refused": point.refused and point.refused.why,
            "calibration": point.reading.as_json(),
            "official": point.official and point.official.as_json(),
            "test": tests[number].as_json() if number in tests else None,
        }
        for number, point in enumerate(points)
    ]


def candidate_of(found: dict[str, Any], number: int) -> Candidate:
    """A point's candidate; a number that is none is a `CalibrationError`."""
    points = found["points"]
    if not 0 <= number < len(points):
        raise CalibrationError(
            f"there is no point {number}; expunge calibrate lists 0 to {len(points) - 1}"
        )
    return Candidate.model_validate(points[number]["candidate"])
