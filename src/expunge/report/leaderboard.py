"""docs/leaderboard.json: one row for each method and seed; docs/leaderboard.md, made of it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import Field, JsonValue, ValidationError

from expunge import runs
from expunge.config import Section, first_fault
from expunge.errors import RunError
from expunge.report.commits import joined, made_by
from expunge.report.results import Results, Share
from expunge.report.story import mean_term
from expunge.report.tables import COLLAPSED, FAILED, NOT_MEASURED, markdown, number

TARGET = "target"
"""What the methods start from; it stands in the table and is not ranked."""


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

    nll_neutral: float | None = None
    """NLL of ordinary text, nats a token."""

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
        nll_neutral=found.nll.neutral,
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


def leaderboard_page(rows: Sequence[Standing]) -> str:
    """The whole page: a table for each board, the best final score first."""
    boards = list(dict.fromkeys(row.board for row in rows))
    parts = [_board(board, [row for row in rows if row.board == board]) for board in boards]
    return "\n".join([_HEAD, *(parts or ["Nothing measured yet.\n"])])


def leaderboard_table(rows: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    """Header and body of one board: methods by final score, collapsed ones last."""
    by_method: dict[str, list[Standing]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    front = pareto_front({name: _goals(found) for name, found in by_method.items()})
    ordered = sorted(by_method, key=lambda name: _order(name, by_method[name]))
    return _HEADER, [_cells(name, by_method[name], name in front) for name in ordered]


def pareto_front(goals: Mapping[str, tuple[float, ...] | None]) -> set[str]:
    """The names that no other is as good as in every goal and better in one; the greater the
    better. Those without goals are left out."""
    known = {name: goal for name, goal in goals.items() if goal is not None}

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(
            other != mine and all(o >= m for o, m in zip(other, mine, strict=True))
            for other in known.values()
        )

    return {name for name, goal in known.items() if not beaten(goal)}


_HEAD = """\
<!-- Written by `make docs` from docs/leaderboard.json; edit neither by hand. -->
# Leaderboard

`expunge leaderboard recipes/leaderboard.yaml --out DIR --rows docs/leaderboard.json` runs it, and
goes on where it was cut off; `--on recipes/synthetic-tiny.yaml` takes that recipe's model and data
in place of the board's. A heading below is the recipe whose target the methods start from. Every
method starts from the same target and is given the same budget: at most the trials of `tuning` in
that file, on the recipe that it names (the board itself, where none), compared on a sample of the
items and one seed by the mean of task aggregate, MIA score and the plain mean of the twelve terms,
collapsed ones last and those whose training fails passed over; the settings that won are in the
table.
Each figure is the mean over the seeds ± their standard deviation; a seed on which training fails
with these settings is FAILED and in no mean. ★ marks the Pareto front of forgetting (mean of the
six forget terms, inverted), retention (mean of the six retain terms) and MIA score, among methods
that fail and collapse on no seed. Relearned is what training on some of the forgotten documents
brings back of the others, beyond what never-seen documents gain, as a share of their tokens that
the model guesses; a dash where that was not tried. Time and memory are those of making the model
from the target, without evaluation; time is that of a shared machine. COLLAPSED stands in place of
the final score of a model that no longer writes language; a seed on which a method collapses is in
no mean of task aggregate and final score, and counts as 0 in the order of methods.
"""

_HEADER = [
    *("method", "seeds", "final ↑", "Pareto", "task aggregate ↑", "forget completion ↓"),
    *("forget knowledge ↓", "retain completion ↑", "retain knowledge ↑", "MIA AUC → 0.5"),
    *("MIA score ↑", "MMLU ↑", "relearned ↓", "NLL of other text ↓", "minutes", "peak GB"),
    *("settings", "trials", "note", "commit"),
]


def _board(board: str, rows: list[Standing]) -> str:
    header, body = leaderboard_table(rows)
    machines = ", ".join(dict.fromkeys(row.machine for row in rows if row.machine))
    return f"## {board}\n\nMade on {machines or 'a machine that is not noted'}.\n\n" + markdown(
        header, body
    )


def _cells(name: str, rows: list[Standing], on_front: bool) -> list[str]:
    settings = {
        f"{place.rsplit('.', 1)[-1]} {value}" for r in rows for place, value in r.settings.items()
    }
    return [
        name,
        ", ".join(str(row.seed) for row in sorted(rows, key=lambda row: row.seed)),
        _final(rows),
        "★" if on_front else "",
        _spread(_sound(rows), "task_aggregate"),
        *(
            _spread(rows, field)
            for field in (
                *("forget_sc", "forget_qa", "retain_sc", "retain_qa"),
                *("mia_auc", "mia_score", "mmlu", "recovered", "nll_neutral"),
            )
        ),
        _mean(rows, "seconds", 60, 1),
        _mean(rows, "peak_bytes", 1e9, 1),
        ", ".join(sorted(settings)) or NOT_MEASURED,
        str(max(row.trials for row in rows)),
        "; ".join(filter(None, [rows[0].note, *(row.failed for row in rows)])) or NOT_MEASURED,
        joined(row.commit or NOT_MEASURED for row in rows),
    ]


def _final(rows: list[Standing]) -> str:
    more = ""
    fates = {FAILED: [bool(row.failed) for row in rows], COLLAPSED: [row.collapsed for row in rows]}
    for fate, met in fates.items():
        count = sum(map(bool, met))
        if count == len(rows):
            return f"**{fate}**"
        more += f" (**{fate}** in {count} of {len(rows)} seeds)" if count else ""
    return _spread(_sound(rows), "final") + more


def _sound(rows: list[Standing]) -> list[Standing]:
    """The seeds whose aggregates mean something."""
    return [row for row in rows if not row.collapsed]


def _spread(rows: list[Standing], field: str) -> str:
    values = [value for row in rows if (value := getattr(row, field)) is not None]
    if not values:
        return NOT_MEASURED
    return number(fmean(values)) + (f" ± {number(stdev(values))}" if len(values) > 1 else "")


def _mean(rows: list[Standing], field: str, unit: float, digits: int) -> str:
    values = [value for row in rows if (value := getattr(row, field)) is not None]
    return f"{fmean(values) / unit:.{digits}f}" if values else NOT_MEASURED


def _order(name: str, rows: list[Standing]) -> tuple[bool, bool, float]:
    finals = [0.0 if row.collapsed else row.final for row in rows if row.final is not None]
    destroyed = all(row.collapsed or row.failed for row in rows)
    return name == TARGET, destroyed, -fmean(finals) if finals else 0.0


def _goals(rows: list[Standing]) -> tuple[float, ...] | None:
    """Forgetting, retention and MIA score, the greater the better; none where a seed collapsed or
    failed."""
    fields = ("forget_sc", "forget_qa", "retain_sc", "retain_qa", "mia_score")
    if rows[0].method == TARGET or any(row.collapsed for row in rows):
        return None
    if any(getattr(row, field) is None for row in rows for field in fields):
        return None
    mean = {field: fmean(getattr(row, field) for row in rows) for field in fields}
    forgetting = 1 - (mean["forget_sc"] + mean["forget_qa"]) / 2
    return forgetting, (mean["retain_sc"] + mean["retain_qa"]) / 2, mean["mia_score"]


def _made(results: Results, seed: int) -> list[dict[str, Any]]:
    """The stages that made the model from the target: not data, target or evaluation."""
    return [
        stage
        for stage in results.stages
        if not str(stage["stage"]).startswith(("evaluate-", "relearn-", "data", "target"))
    ]


def _machine(stage: Mapping[str, Any]) -> str:
    return f"{stage['accelerator'] or stage['machine']}, {stage['cpus']} CPUs"
