"""How sure the verdict is: each half before and after, with intervals, and what limits them.

Dimensions: n items that both models were asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from expunge.evaluate.compare import FEWEST
from expunge.evaluate.drawing import document_of
from expunge.evaluate.numbers import Behind, Number, mean_of, wilson
from expunge.evaluate.paired import Pairs, paired_statistic
from expunge.report.pieces import Items, Material
from expunge.report.results import HALVES, KINDS, ModelResults, Semeval
from expunge.report.story import models_compared

WIDE = 0.2
"""An interval of a share that is wider than this leaves much open."""


@dataclass(frozen=True)
class Change:
    """One half and kind, before and after."""

    half: str
    kind: str
    before: Number
    after: Number
    difference: Number
    """After - before, item by item; None of items that are not at hand."""

    evidence: int = 0
    """How many documents score other than before."""

    @property
    def unchanged(self) -> bool:
        """Whether no item scores other than before."""
        one = self.difference
        return one.n > 0 and (one.value, one.low or 0, one.high or 0) == (0, 0, 0)

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval of the difference holds 0; None where there is none, or one without
        0 though fewer than FEWEST documents score other than before."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return None
        inside = low <= 0 <= high
        return inside if inside or self.evidence >= FEWEST else None


def half_number(semeval: Semeval, half: str, kind: str) -> Number:
    """The mean of the terms of one half and kind over the tasks, with its interval (`mean_of`).

    So results.json is enough, without the items.
    """
    return mean_of(
        [
            _term_number(semeval, term, value)
            for term, value in semeval.terms.items()
            if value is not None and term.startswith(f"{half}/") and term.endswith(f"/{kind}")
        ]
    )


def _term_number(semeval: Semeval, term: str, value: float) -> Number:
    """One term with its interval: one item that is neither 0 nor 1 leaves all of 0 to 1 open.

    Results of older versions have intervals that are 0 wide where all items are alike; those of
    hits and misses are made anew, and those of one item are none.
    """
    interval, n = semeval.intervals.get(term), semeval.counts.get(term) or 0
    if n and value in (0, 1) and (interval is None or interval.low == interval.high):
        return Number(value, n, *wilson(value * n, n))
    if n == 1:
        return Number(value, n, 0.0, 1.0)
    if interval is None:
        return Number(value, n)
    return Number(value, n, interval.low, interval.high)


def changes(material: Material) -> list[Change]:
    """What the verdict compares, each the mean over the tasks, with its interval.

    The difference is taken item by item, the items drawn again within each task.
    """
    names = models_compared(material.results)
    if names is None:
        return []
    before, after = (material.results.models[name] for name in names)
    found = [
        Change(
            half,
            kind,
            half_number(before.semeval, half, kind),
            half_number(after.semeval, half, kind),
            *_difference(material.items, names, half, kind),
        )
        for half in HALVES
        for kind in KINDS
    ]
    return [one for one in found if one.before.value is not None or one.after.value is not None]


def doubts(material: Material) -> list[str]:
    """Sentences on what the numbers leave open; none where nothing does."""
    names = models_compared(material.results)
    if names is None:
        return []
    return list(_doubts(material, material.results.models[names[1]], names[1]))


def _doubts(material: Material, after: ModelResults, name: str) -> Iterator[str]:
    for change in changes(material):
        what = f"{change.half} {'completion' if change.kind == 'sc' else 'knowledge'}"
        low, high = change.after.low, change.after.high
        if change.unchanged:
            items = (
                "the 1 item scores"
                if change.difference.n == 1
                else (f"each of {change.difference.n} items scores")
            )
            yield f"The {what} did not change: {items} as before."
        elif change.within_noise:
            yield (
                f"The change of {what} is no more than the choice of {change.difference.n} items "
                f"explains ({_signed(change.difference)})."
            )
        if low is not None and high is not None and high - low > WIDE:
            yield f"The {what} lies anywhere from {low:.2f} to {high:.2f}: {change.after.n} items."
    mia, mmlu = after.semeval.mia, after.semeval.mmlu
    if mia and mia.low is not None and mia.high is not None and mia.high - mia.low > WIDE:
        of = f": {mia.n} documents" if mia.n else ""
        yield f"The membership AUC lies anywhere from {mia.low:.2f} to {mia.high:.2f}{of}."
    if mmlu is None or mmlu.accuracy is None:
        yield "General knowledge (MMLU) was not measured, so there is no final score."
    elif mmlu.sampled:
        yield f"MMLU was asked on a sample of {mmlu.n} questions."
    counts, given = after.semeval.counts, after.semeval.given
    left = sum((given.get(term) or 0) - (counts.get(term) or 0) for term in given)
    if left > 0:
        yield f"{left} of {sum(n or 0 for n in given.values())} items were left out by sampling."
    if after.collapse.collapsed is None:
        yield f"Whether the {name} model collapsed was not measured."
    if after.prompts_cut:
        yield f"{after.prompts_cut} prompts were longer than the context, and were cut."


def _difference(items: Items, names: tuple[str, str], half: str, kind: str) -> tuple[Number, int]:
    """The difference, and how many documents stand behind it (`Pairs.evidence`)."""
    before, after = (_scores(items, name, half, kind) for name in names)
    values, owners = {}, {}
    for task in before:
        both = [(id, score) for id, score in before[task].items() if id in after.get(task, {})]
        if both:
            values[task] = np.array([(score, after[task][id]) for id, score in both])
            owners[task] = [(task, document_of({"id": id, "group": task})) for id, _ in both]
    if not values:
        return Number(None, 0), 0
    pairs, means = Pairs(values, owners), Behind("score", tuple(values), "means")
    found = paired_statistic(means, pairs, name=f"{half}.{kind}.change")
    return found, pairs.evidence(means)


def _scores(items: Items, model: str, half: str, kind: str) -> dict[str, dict[str, float]]:
    """Task to id to score."""
    found: dict[str, dict[str, float]] = {}
    for row in items.get(model, ()):
        if (row["half"], row["kind"]) == (half, kind) and row.get("score") is not None:
            found.setdefault(row["task"], {})[row["id"]] = float(row["score"])
    return found


def _signed(number: Number) -> str:
    return f"{number.value:+.2f}, interval {number.low:+.2f} to {number.high:+.2f}"
