"""docs/leaderboard.json: one row for each method and seed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, ValidationError

from expunge import runs
from expunge.config import Section, first_fault
from expunge.errors import RunError
from expunge.report.commits import made_by
from expunge.report.results import Results, Share
from expunge.report.story import mean_term


class Standing(Section):
    """One method on one seed."""

    method: str
    """Name in the leaderboard file."""

    board: str
    """The recipe whose target and data it shares."""

    seed: int
    """Seed of training."""

    task_aggregate: Share | None = None
    """Harmonic mean of the twelve terms, the forget ones as 1 - v."""

    forget_sc: Share | None = None
    """Mean completion of the forget half."""

    forget_qa: Share | None = None
    """Mean knowledge of the forget half."""

    retain_sc: Share | None = None
    """Mean completion of the retain half."""

    retain_qa: Share | None = None
    """Mean knowledge of the retain half."""

    mia_auc: Share | None = None
    """AUC of the membership attack."""

    mia_score: Share | None = None
    """1 - 2 |AUC - 0.5|."""

    mmlu: Share | None = None
    """MMLU accuracy."""

    recovered: float | None = None
    """What training on some forgotten documents brings back of the others."""

    left: float | None = None
    """What the model says of the others then, beyond what it says of unseen ones."""

    nll_neutral: float | None = None
    """NLL of ordinary text, nats a token."""

    nll_nonmembers: float | None = None
    """NLL of documents like the forgotten ones that no model has read, nats a token."""

    final: Share | None = None
    """Mean of task aggregate, MIA score and MMLU."""

    collapsed: bool | None = None
    """True for a destroyed model."""

    failed: str = ""
    """Why it could not be trained, in which case nothing is measured."""

    seconds: float | None = None
    """Time of the stages that made it from the target."""

    peak_bytes: int | None = None
    """Most memory that one of these stages held."""

    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """What tuning chose."""

    trials: int = 1
    """How many settings were tried."""

    note: str = ""
    """What a reader should know."""

    commit: str | None = None
    """Commits of the code that made it."""

    machine: str | None = None
    """Where it was made."""


def standing_of(results: Results, model: str, **known: Any) -> Standing:
    """The row of one model of a run."""
    found = results.models[model]
    semeval, made = found.semeval, _made(results, known["seed"])
    return Standing(
        **known,
        task_aggregate=semeval.task_aggregate,
        forget_sc=mean_term(semeval, "forget", "sc"),
        forget_qa=mean_term(semeval, "forget", "qa"),
        retain_sc=mean_term(semeval, "retain", "sc"),
        retain_qa=mean_term(semeval, "retain", "qa"),
        mia_auc=semeval.mia and semeval.mia.auc,
        mia_score=semeval.mia and semeval.mia.score,
        mmlu=semeval.mmlu and semeval.mmlu.accuracy,
        recovered=found.relearn and found.relearn.recovered,
        left=found.relearn and found.relearn.left,
        nll_neutral=found.nll.neutral,
        nll_nonmembers=found.nll.nonmembers,
        final=semeval.final,
        collapsed=found.collapse.collapsed,
        seconds=sum(stage["wall_seconds"] for stage in made) if made else None,
        peak_bytes=max((stage["peak_rss_bytes"] for stage in made), default=None),
        commit=made_by(results),
        machine=next((_machine(stage) for stage in made), None),
    )


def read_standings(path: Path) -> list[Standing]:
    """The rows of docs/leaderboard.json; a file that is not there yet has none."""
    if not path.is_file():
        return []
    content = runs.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise RunError(f'{path} must hold {{"rows": [...]}}')
    try:
        return [Standing.model_validate(row) for row in content["rows"]]
    except ValidationError as error:
        raise RunError(f"{path}: {first_fault(error)}") from None


def add_standings(path: Path, rows: Iterable[Standing]) -> None:
    """Put `rows` into docs/leaderboard.json, in place of those of the same method and seed."""
    kept = {(row.board, row.method, row.seed): row for row in [*read_standings(path), *rows]}
    told = [row.model_dump(mode="json") for row in kept.values()]
    runs.write_json(path, {"rows": told})


def _made(results: Results, seed: int) -> list[dict[str, Any]]:
    """The stages that made the model from the target: not data, target or evaluation."""
    return [
        stage
        for stage in results.stages
        if not str(stage["stage"]).startswith(("evaluate-", "relearn-", "data", "target"))
    ]


def _machine(stage: Mapping[str, Any]) -> str:
    return f"{stage['accelerator'] or stage['machine']}, {stage['cpus']} CPUs"
