"""results.json: everything that one run measured, in one stable, versioned form.

What was not measured is null, never 0. `docs/results-format.md` describes every field.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, JsonValue, ValidationError

from expunge import runs
from expunge.config import Section, first_fault
from expunge.errors import RunError
from expunge.evaluate.numbers import Number, wilson
from expunge.evaluate.semeval import final_of, mia_score_of
from expunge.report.measures import Interval, Mia, Mmlu, Nll, Relearned, Share

FORMAT = 1
"""Grows by one when a reader of the old form would misread the new one."""

HALVES, TASKS, KINDS = ("forget", "retain"), ("Task1", "Task2", "Task3"), ("sc", "qa")
TERMS = tuple(f"{half}/{task}/{kind}" for half in HALVES for task in TASKS for kind in KINDS)
"""The twelve terms of SemEval-2025 Task 4: sc is completion, qa is knowledge."""


class Semeval(Section):
    """The official scores of SemEval-2025 Task 4."""

    terms: dict[str, Share | None] = Field(default_factory=dict)
    """HALF/TASK/KIND to its mean score, as generated (the forget terms are not inverted)."""

    counts: dict[str, int | None] = Field(default_factory=dict)
    """Items scored for each term."""

    given: dict[str, int | None] = Field(default_factory=dict)
    """Items that there are for each term; more than were scored where a sample was."""

    intervals: dict[str, Interval | None] = Field(default_factory=dict)
    """95 % interval of each term and of `task_aggregate`; null where one item tells none."""

    task_aggregate: Share | None = None
    """Harmonic mean of the twelve terms, the forget ones as 1 - v."""

    partial: bool = False
    """True where the aggregate is over other terms than the twelve."""

    mia: Mia | None = None
    """Membership inference."""

    mmlu: Mmlu | None = None
    """General knowledge."""

    final: Share | None = None
    """Mean of the task aggregate, the MIA score and the MMLU accuracy."""

    @property
    def numbers(self) -> dict[str, Number]:
        """`mmlu`, `mia_score`, `final`; their intervals follow from those of the parts."""
        mia, mmlu, bounds = self.mia, self.mmlu, self.intervals.get("task_aggregate")
        known = auc = Number(None, 0)
        if mia is not None:
            auc = Number(mia.auc, mia.n or 0, mia.low, mia.high)
        if mmlu is not None and mmlu.accuracy is not None:
            ends = wilson(mmlu.accuracy * mmlu.n, mmlu.n) if mmlu.n else ()
            known = Number(mmlu.accuracy, mmlu.n or 0, *ends)
        ends = () if bounds is None else (bounds.low, bounds.high)
        task = Number(self.task_aggregate, sum(n or 0 for n in self.counts.values()), *ends)
        score = mia_score_of(auc)
        return {"mmlu": known, "mia_score": score, "final": final_of(task, score, known)}

    def interval(self, name: str) -> Interval | None:
        """Of a term, of `task_aggregate`, or of one of `numbers`."""
        found = self.numbers.get(name)
        if found is None:
            return self.intervals.get(name)
        if found.low is None or found.high is None:
            return None
        return Interval(low=found.low, high=found.high)


class Collapse(Section):
    """Is the model still a language model? Beside the verdict, each measure under its own name."""

    model_config = ConfigDict(extra="allow")

    collapsed: bool | None = None
    """True for a destroyed model, whatever it scores."""

    reasons: tuple[str, ...] = ()
    """Which limits were crossed, in words."""


class Fold(Section):
    """What was measured on one side of the documents."""

    semeval: Semeval = Semeval()
    """The official scores, over this side's items and documents."""

    membership: dict[str, dict[str, float]] = Field(default_factory=dict)
    """By attack: auc, two_sided (both with _low and _high), ks, ks_p, gap."""


class ModelResults(Section):
    """What was measured on one model."""

    semeval: Semeval = Semeval()
    """The official scores."""

    collapse: Collapse = Collapse()
    """Whether the model is destroyed, and the measures that say so."""

    nll: Nll = Nll()
    """How likely the model finds each kind of text."""

    relearn: Relearned | None = None
    """Whether what is forgotten is gone or hidden; null where the recipe does not ask, and of a
    guard."""

    prompts_cut: int | None = None
    """Prompts that were longer than the context, and were cut from the left."""

    texts_cut: dict[str, int] = Field(default_factory=dict)
    """`answers` (their prompts too), `members`, … → texts whose loss was read of a part alone."""

    folds: dict[str, Fold] = Field(default_factory=dict)
    """`calibration` and `test`, where the recipe splits its documents."""

    @property
    def is_measured(self) -> bool:
        """Whether there is anything of it."""
        return self != ModelResults()


class Results(Section):
    """One run: every model of it, every stage that made them."""

    format: int = FORMAT
    """Version of this form."""

    recipe: str
    """Name of the recipe."""

    seed: int | None = None
    """Seed of the run."""

    commit: str | None = None
    """Commit of the code; a trailing + means that it was modified."""

    created: str | None = None
    """When the results were put together, in UTC."""

    models: dict[str, ModelResults]
    """`original`, `target`, `strong`, `weak`, `merged`, or the name of another merge."""

    stages: list[dict[str, JsonValue]] = Field(default_factory=list)
    """Provenance of each stage, in order."""

    def ordered_models(self) -> dict[str, ModelResults]:
        """The models in the order of the story: before, branches, merged, other merges."""
        return {name: self.models[name] for name in story_order(self.models)}

    def measured_models(self) -> dict[str, ModelResults]:
        """Those of them of which something was measured."""
        return {name: model for name, model in self.ordered_models().items() if model.is_measured}


def read_results(path: Path | str) -> Results:
    """Read a results.json; one of a newer format, or not one at all, is a `RunError`."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"there are no results at {path}")
    content = runs.read_json(path)
    number = content.get("format") if isinstance(content, dict) else None
    if not isinstance(number, int):
        raise RunError(f"{path} is not a results file: it names no format")
    if number > FORMAT:
        raise RunError(
            f"{path} has format {number}, written by a newer expunge; this one reads up to {FORMAT}"
        )
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        raise RunError(f"{path} is not a results file: {first_fault(error)}") from None


def story_order(names: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """Model names from before to after; names that the story does not know come last."""
    story = ("original", "target", "strong", "weak", "merged")
    return sorted(names, key=lambda name: story.index(name) if name in story else len(story))
