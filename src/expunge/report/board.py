"""docs/results.json: one row for each measured model, kept from run to run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from expunge import runs
from expunge.config import Section, first_fault
from expunge.errors import RunError
from expunge.evaluate.balance import furthest
from expunge.report.commits import made_by
from expunge.report.results import Mia, Mmlu, ModelResults, Results, Share, story_order
from expunge.report.story import mean_term


class BoardRow(Section):
    """One model of one run, as a row of docs/results.json."""

    system: str
    """Name of the model within its run."""

    board: str
    """Name of the model and data that systems are compared on."""

    seed: int | None = None
    """Seed of the run."""

    task_aggregate: Share | None = None
    """Harmonic mean of the twelve terms."""

    task_low: Share | None = None
    """Lower end of the bootstrap interval of the task aggregate, over the items."""

    task_high: Share | None = None
    """Upper end of the bootstrap interval of the task aggregate."""

    mia_score: Share | None = None
    """1 - 2 |AUC - 0.5|."""

    mia_auc: Share | None = None
    """AUC of the membership attack."""

    mia_low: Share | None = None
    """Lower end of the bootstrap interval of the AUC."""

    mia_high: Share | None = None
    """Upper end of the bootstrap interval of the AUC."""

    two_sided: Share | None = None
    """The AUC of one who looks both ways: the loss's, of a fold that furthest from 1/2."""

    ks: Share | None = None
    """The Kolmogorov-Smirnov distance: the loss's, of a fold the greatest over the attacks."""

    mmlu: Share | None = None
    """MMLU accuracy."""

    mmlu_sampled: bool | None = None
    """True where only a sample of each subject was asked."""

    partial: bool = False
    """True where the aggregate is over other terms than the twelve."""

    final: Share | None = None
    """Mean of task aggregate, MIA score and MMLU."""

    collapsed: bool | None = None
    """True for a destroyed model."""

    forget_sc: Share | None = None
    """Mean completion over the tasks of the forget half."""

    forget_qa: Share | None = None
    """Mean knowledge over the tasks of the forget half."""

    retain_sc: Share | None = None
    """Mean completion over the tasks of the retain half."""

    retain_qa: Share | None = None
    """Mean knowledge over the tasks of the retain half."""

    nll_members: float | None = None
    """Mean NLL of the members, nats a token."""

    nll_nonmembers: float | None = None
    """Mean NLL of the non-members, nats a token."""

    recipe: str
    """Name of the recipe."""

    commit: str | None = None
    """Commits of the code that made it."""

    created: str | None = None
    """When the results were put together, in UTC."""


def rows_of(results: Results, *, board: str | None = None) -> list[dict[str, Any]]:
    """One row of docs/results.json for each model; the board is the recipe where not named.

    The documents that only judged are a board of their own.
    """
    board = board or results.recipe
    made = []
    for name, model in results.ordered_models().items():
        made.append(_row(results, name, model, board))
        if "test" in model.folds:
            judged = model.model_copy(update={"semeval": model.folds["test"].semeval})
            row = _row(results, name, judged, f"{board}, test documents")
            nll = {"nll_members": None, "nll_nonmembers": None}  # of all documents
            made.append(row.model_copy(update=_worst(model.folds["test"].membership) | nll))
    return [row.model_dump(mode="json") for row in made]


def read_rows(docs_json: Path) -> list[dict[str, Any]]:
    """The rows of docs/results.json; a file that is not there yet has none."""
    if not docs_json.is_file():
        return []
    content = runs.read_json(docs_json)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise RunError(f'{docs_json} must hold {{"rows": [...]}}')
    return [_checked(row, str(docs_json)) for row in content["rows"]]


def add_rows(docs_json: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put `rows` into docs/results.json, in place of those of the same system, board and seed."""
    kept = {_identity(row): row for row in read_rows(docs_json)}
    kept |= {_identity(row): row for row in (_checked(row, "a new row") for row in rows)}
    systems = story_order(sorted({row["system"] for row in kept.values()}))
    ordered = sorted(
        kept.values(),
        key=lambda row: (row["board"], systems.index(row["system"]), row["seed"] or 0),
    )
    runs.write_json(docs_json, {"rows": ordered})


def _worst(membership: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The worst two-sided AUC and KS distance over the attacks of a fold; nothing without any."""
    attacks = membership.values()
    if not attacks:
        return {}
    return {
        "two_sided": furthest(found["two_sided"] for found in attacks),
        "ks": max(found["ks"] for found in attacks),
    }


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["system"], row["board"], row["seed"]


def _checked(row: Any, origin: str) -> dict[str, Any]:
    try:
        return BoardRow.model_validate(row).model_dump(mode="json")
    except ValidationError as error:
        raise RunError(f"{origin}: {first_fault(error)}") from None


def _row(results: Results, name: str, model: ModelResults, board: str) -> BoardRow:
    mia, mmlu = model.semeval.mia or Mia(), model.semeval.mmlu or Mmlu()
    interval = model.semeval.intervals.get("task_aggregate")
    return BoardRow(
        system=name,
        board=board,
        seed=results.seed,
        task_aggregate=model.semeval.task_aggregate,
        task_low=interval and interval.low,
        task_high=interval and interval.high,
        mia_score=mia.score,
        mia_auc=mia.auc,
        mia_low=mia.low,
        mia_high=mia.high,
        two_sided=mia.two_sided,
        ks=mia.ks,
        mmlu=mmlu.accuracy,
        mmlu_sampled=mmlu.sampled,
        partial=model.semeval.partial,
        final=model.semeval.final,
        collapsed=model.collapse.collapsed,
        forget_sc=mean_term(model.semeval, "forget", "sc"),
        forget_qa=mean_term(model.semeval, "forget", "qa"),
        retain_sc=mean_term(model.semeval, "retain", "sc"),
        retain_qa=mean_term(model.semeval, "retain", "qa"),
        nll_members=model.nll.members,
        nll_nonmembers=model.nll.nonmembers,
        recipe=results.recipe,
        commit=made_by(results),
        created=results.created,
    )
