"""The landscape of merges: what is measured along the line between two branches, and across it.

Dimensions: T places along a line, D values of a dial (density or scale).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import Field, field_validator

from expunge.calibrate.candidate import Candidate, End
from expunge.calibrate.reading import Material, screen
from expunge.calibrate.resident import Resident
from expunge.config import Section
from expunge.merge.methods import METHODS

MEASURES = ("aggregate", "forgetting", "retention", "auc", "two_sided", "ks", "neutral_nll")
"""Numbers of a reading that make a surface; the terms are screened, not generated."""


class Landscape(Section):
    """Where a landscape is measured."""

    methods: tuple[str, ...] = ("linear", "ties")
    """Merge methods, a surface for each."""

    places: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Places between the branches: 0 is the first, 1 the second."""

    densities: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0)
    """Shares kept, for methods that trim."""

    scales: tuple[float, ...] = (0.8, 1.0, 1.2)
    """Sums of the weights, for methods that do not."""

    attacks: tuple[str, ...] = ("loss",)
    """Membership attacks; the AUC is midway between the greatest and the least of them."""

    per_term: int = Field(default=8, ge=1)
    """Items of each term, at most."""

    documents: int = Field(default=32, ge=4)
    """Members, and non-members, at most."""

    @field_validator("places", "densities", "scales", "methods")
    @classmethod
    def _some(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if not given:
            raise ValueError("at least one is needed")
        return given


def surface(
    resident: Resident, given: Material, config: Landscape, over: End, under: End
) -> list[dict[str, Any]]:
    """A row for each place of each line: method, dial, its value, t and MEASURES: (T · D) each.

    Methods that merge factors have none where the ends differ in rank.
    """
    rows = []
    for method in config.methods:
        if not resident.can_merge(Candidate(over=over, under=under, t=0.5, method=method)):
            continue
        row = METHODS["task_arithmetic" if method == "linear" else method]
        dial = "density" if "density" in row.options else "scale"
        for value in config.densities if dial == "density" else config.scales:
            for t in config.places:
                fields: dict[str, Any] = {dial: value}
                candidate = Candidate(over=over, under=under, t=t, method=method, **fields)
                with resident.reader(candidate) as reader:
                    found = screen(reader, given, config.attacks).as_json()
                said = {"method": method, "dial": dial, "value": value, "t": t}
                rows.append(said | {name: found[name] for name in MEASURES})
    return rows


def balance_line(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where each line of a surface crosses AUC = 1/2, between two of its places: null if nowhere.

    t = t_a + (1/2 - AUC_a) (t_b - t_a) / (AUC_b - AUC_a)
    """
    lines: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["dial"], row["value"]), []).append(row)
    return [
        {"method": method, "dial": dial, "value": value, "t": _crossing(line)}
        for (method, dial, value), line in lines.items()
    ]


def _crossing(line: Sequence[Mapping[str, Any]]) -> float | None:
    ordered = sorted(line, key=lambda row: row["t"])
    for a, b in pairwise(ordered):
        off = a["auc"] - 0.5, b["auc"] - 0.5
        if off[0] == 0:
            return float(a["t"])
        if off[0] * off[1] < 0:
            return float(a["t"] + off[0] * (b["t"] - a["t"]) / (off[0] - off[1]))
    return float(ordered[-1]["t"]) if ordered[-1]["auc"] == 0.5 else None
