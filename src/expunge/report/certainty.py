"""How sure the verdict is: each half before and after, with intervals, and what limits them.

Dimensions: n items that both models were asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from expunge.evaluate.compare import FEWEST
from expunge.evaluate.numbers import Number, bootstrap
from expunge.report.pieces import Items, Material
from expunge.report.results import HALVES, KINDS, ModelResults, mean_term, models_compared

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

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval of the difference holds 0; None where there is none."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None or self.difference.n < FEWEST:
            return None
        return low <= 0 <= high


def changes(material: Material) -> list[Change]:
    """What the verdict compares, each the mean over the tasks, with its interval over the items.

    m = (1/T) Σ_t mean(scores of task t),    items drawn again within each task
    """
    names = models_compared(material.results)
    if names is None:
        return []
    before, after = (material.results.models[name] for name in names)
    found = [
        Change(
            half,
            kind,
            _number(before, material.items, names[0], half, kind),
            _number(after, material.items, names[1], half, kind),
            _difference(material.items, names, half, kind),
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
        if change.within_noise:
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


def _number(model: ModelResults, items: Items, name: str, half: str, kind: str) -> Number:
    """The mean of the terms, with an interval where the items are at hand."""
    value = mean_term(model.semeval, half, kind)
    scores = _scores(items, name, half, kind)
    tasks = {task: list(found.values()) for task, found in scores.items()}
    if value is None or not tasks:
        return Number(value, 0)
    drawn = bootstrap(tasks, lambda means: fmean(means.values()), name=f"{half}.{kind}")
    return Number(value, drawn.n, drawn.low, drawn.high)


def _difference(items: Items, names: tuple[str, str], half: str, kind: str) -> Number:
    before, after = (_scores(items, name, half, kind) for name in names)
    tasks = {
        task: [after[task][id] - score for id, score in found.items() if id in after[task]]
        for task, found in before.items()
        if task in after
    }
    tasks = {task: values for task, values in tasks.items() if values}
    if not tasks:
        return Number(None, 0)
    return bootstrap(tasks, lambda means: fmean(means.values()), name=f"{half}.{kind}.change")


def _scores(items: Items, model: str, half: str, kind: str) -> dict[str, dict[str, float]]:
    """Task to id to score."""
    found: dict[str, dict[str, float]] = {}
    for row in items.get(model, ()):
        if (row["half"], row["kind"]) == (half, kind) and row.get("score") is not None:
            found.setdefault(row["task"], {})[row["id"]] = float(row["score"])
    return found


def _signed(number: Number) -> str:
    return f"{number.value:+.2f}, interval {number.low:+.2f} to {number.high:+.2f}"
