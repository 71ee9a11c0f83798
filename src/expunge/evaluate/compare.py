"""What differs between two models, and whether it is more than the choice of items explains.

Dimensions: n items that both models were asked.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from expunge.errors import EvaluationError
from expunge.evaluate.drawing import document_of
from expunge.evaluate.numbers import Behind, Number
from expunge.evaluate.paired import (
    Pairs,
    makes,
    paired_statistic,
    statistic,
    unpaired_difference,
    value_of,
)
from expunge.evaluate.readings import Key, Reading, Row, SuiteReading, metrics_of

FEWEST = 6
"""Documents of other scores from which on a paired difference can be told from noise: were the two
models the same, all of n differences would have one sign in 2 · 2⁻ⁿ of cases, 6 % for five."""

Own = tuple[str, str]
"""Group and metric of items."""


@dataclass(frozen=True)
class Difference:
    """One number of two models, A and B."""

    name: str
    how: Literal["paired", "unpaired"]
    """`paired`: item by item; `unpaired`: from the intervals of two numbers without items."""

    a: float | None
    b: float | None
    difference: float | None
    """B - A."""

    low: float | None
    high: float | None
    n: int
    """Items compared."""

    within_noise: bool | None
    """Whether the interval holds 0; None where there is no interval, or one without 0 though the
    scores of fewer than FEWEST documents differ."""


@dataclass(frozen=True)
class Comparison:
    """Two models, number by number."""

    a: str
    b: str
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out, and what makes the two less alike than a comparison wishes."""

    def as_json(self) -> dict[str, Any]:
        """For a script."""
        return asdict(self)


def compare(first: Reading, second: Reading, *, common: bool = False) -> Comparison:
    """B - A of every number and every item's metric that both have.

    A number that items stand behind is compared item by item. The items of a suite must be
    the same; with `common` only those that both have are compared, and the notes say how many were
    left out. Aggregates of a collapsed model mean nothing and are left out.
    """
    found = Comparison(first.name, second.name)
    shared = [suite for suite in first.suites if suite in second.suites]
    if not shared:
        raise EvaluationError(
            f"{first.name} ({', '.join(first.suites)}) and {second.name} "
            f"({', '.join(second.suites)}) have no suite in common"
        )
    for one, other in ((first, second), (second, first)):
        alone = [suite for suite in one.suites if suite not in other.suites]
        found.notes.extend(f"only {one.name} was measured by {suite}" for suite in alone)
    for suite in shared:
        _compare_suite(found, suite, first.suites[suite], second.suites[suite], common)
    return found


def compare_readings(readings: Sequence[Reading], *, common: bool = False) -> list[Comparison]:
    """Each of several models against the first."""
    first, *others = readings
    if not others:
        raise EvaluationError(f"{first.name} is one model; name what it is to be compared with")
    return [compare(first, other, common=common) for other in others]


def _compare_suite(
    found: Comparison, suite: str, a: SuiteReading, b: SuiteReading, common: bool
) -> None:
    keys = _common_items(found, suite, a.items, b.items, common)
    found.notes.extend(_warnings(found, suite, a, b))
    barred = {n for side in (a, b) if side.facts.get("collapsed") for n in _aggregates(side)}
    own = [pair for pair in _own(a.items) if pair in set(_own(b.items)) - _barred(a) - _barred(b)]
    shown: set[Own] = set()
    for name in [name for name in a.numbers if name in b.numbers and name not in barred]:
        full, numbers = f"{suite}.{name}", (a.numbers[name], b.numbers[name])
        row = None
        for behind in _candidates(name, a, own):
            if makes(behind, a.items, numbers[0]) and makes(behind, b.items, numbers[1]):
                pairs = _pairs(found, full, behind, keys, (a.items, b.items), common)
                row = _paired(full, behind, pairs)
                own_groups = pairs.values
                if isinstance(behind.metric, str) and (len(own_groups) == 1 or not behind.groups):
                    shown |= {(group, behind.metric) for group in own_groups}
                break
        found.differences.append(row or _unpaired(full, *numbers))
    for group, metric in [pair for pair in own if pair not in shown]:
        own_name = ".".join(part for part in (group, metric) if part)
        if own_name in {**a.numbers, **b.numbers}:
            continue  # of a number made otherwise, two rows of one name would contradict
        name = f"{suite}.{own_name}"
        behind = Behind(metric, (group,))
        pairs = _pairs(found, name, behind, keys, (a.items, b.items), common)
        found.differences.append(
            _paired(name, behind, pairs) or _unpaired(name, *[Number(None, 0)] * 2)
        )


def _common_items(
    found: Comparison, suite: str, a: Mapping[Key, Row], b: Mapping[Key, Row], common: bool
) -> list[Key]:
    """The items that both have, in the order of A; refused where they are not the same text."""
    alone = [key for key in a if key not in b], [key for key in b if key not in a]
    counts = [
        f"{len(keys)} only in {name} (first: {' '.join(keys[0])})"
        for name, keys in zip((found.a, found.b), alone, strict=True)
        if keys
    ]
    if counts and not common:
        raise EvaluationError(
            f"{suite} was not asked the same items: {', '.join(counts)}; "
            "--common compares those that both have"
        )
    keys = [key for key in a if key in b]
    if counts:
        found.notes.append(f"{suite}: items left out: {', '.join(counts)}; {len(keys)} in both")
    for key in keys:
        for part in ("prompt", "truth", "text", "answer"):
            texts = a[key].get(part), b[key].get(part)
            if None not in texts and texts[0] != texts[1]:
                raise EvaluationError(
                    f"{suite}: item {key[1]!r} of {key[0]} has another {part} in {found.b} than in "
                    f"{found.a}; the two were measured on different data"
                )
    return keys


def _candidates(name: str, a: SuiteReading, own: Sequence[Own]) -> list[Behind]:
    """What may stand behind a number: what its suite says, or items of its name."""
    if name in a.behind:
        return [a.behind[name]]
    named = [pair for pair in own if name in (pair[0], ".".join(pair))]
    return [Behind(metric, (group,)) for group, metric in named]


def _pairs(
    found: Comparison,
    name: str,
    behind: Behind,
    keys: Sequence[Key],
    items: tuple[Mapping[Key, Row], Mapping[Key, Row]],
    common: bool,
) -> Pairs:
    """What both say of each item behind a number, by group; one that only one model has is refused,
    or, with `common`, left out."""
    own = [key for key in keys if not behind.groups or key[0] in behind.groups]
    both = [(key, [value_of(behind, side[key]) for side in items]) for key in own]
    halves = [key for key, values in both if (values[0] is None) != (values[1] is None)]
    if halves:
        count = f"{len(halves)} of {len(own)} items (first: {halves[0][1]})"
        if not common:
            raise EvaluationError(
                f"{name}: {count} were measured in only one of {found.a} and {found.b}; "
                "--common compares the others"
            )
        found.notes.append(f"{name}: left out, measured in only one: {count}")
    groups: dict[str, list[Any]] = {group: [] for group in behind.groups}
    owners: dict[str, list[Hashable]] = {group: [] for group in behind.groups}
    for key, values in both:
        if None not in values:
            groups.setdefault(key[0], []).append(values)
            owners.setdefault(key[0], []).append(document_of(items[0][key]))
    made = {group: np.array(values, float) for group, values in groups.items() if values}
    return Pairs(made, owners)


def _paired(name: str, behind: Behind, pairs: Pairs) -> Difference | None:
    """The difference, item by item; None where a group has too few items that both were asked."""
    values, fewest = pairs.values, 2 if behind.how == "two_sided" else 1
    if not values or len(values) < len(behind.groups) or min(map(len, values.values())) < fewest:
        return None
    before, after = statistic(behind, values).tolist()
    drawn = paired_statistic(behind, pairs, name=name)
    return _difference(name, "paired", before, after, drawn, pairs.evidence(behind))


def _unpaired(name: str, a: Number, b: Number) -> Difference:
    return _difference(name, "unpaired", a.value, b.value, unpaired_difference(a, b))


def _difference(
    name: str,
    how: Literal["paired", "unpaired"],
    a: float | None,
    b: float | None,
    drawn: Number,
    evidence: int = FEWEST,
) -> Difference:
    noise = None
    if drawn.low is not None and drawn.high is not None:
        inside = drawn.low <= 0 <= drawn.high
        noise = inside if inside or evidence >= FEWEST else None
    return Difference(name, how, a, b, drawn.value, drawn.low, drawn.high, drawn.n, noise)


def _own(items: Mapping[Key, Row]) -> list[Own]:
    """The metrics of each group, in order."""
    return list(dict.fromkeys((key[0], m) for key, row in items.items() for m in metrics_of(row)))


def _aggregates(side: SuiteReading) -> Sequence[str]:
    return side.facts.get("aggregates", ())


def _barred(side: SuiteReading) -> set[Own]:
    """Metrics of items of a collapsed model whose mean is an aggregate under another name."""
    if not side.facts.get("collapsed"):
        return set()
    return {
        (group, metric)
        for group, metric in _own(side.items)
        for name in _aggregates(side)
        if name in side.numbers and f"{name}.".startswith(f"{group}.")
        if makes(Behind(metric, (group,)), side.items, side.numbers[name])
    }


def _warnings(found: Comparison, suite: str, a: SuiteReading, b: SuiteReading) -> list[str]:
    """Collapsed models, and settings in which the two were not measured alike."""
    notes = [
        f"{suite}: {name} has collapsed ({'; '.join(side.facts.get('reasons', ()))}); "
        f"left out: {', '.join(_aggregates(side)) or 'nothing'}"
        for name, side in ((found.a, a), (found.b, b))
        if side.facts.get("collapsed")
    ]
    if a.settings is not None and b.settings is not None:
        other = [k for k in {**a.settings, **b.settings} if a.settings.get(k) != b.settings.get(k)]
        if other:
            notes.append(f"{suite}: measured with other settings: {', '.join(other)}")
    return notes
