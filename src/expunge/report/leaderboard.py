"""docs/leaderboard.md, made of the rows of docs/leaderboard.json."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from expunge.report.commits import joined
from expunge.report.standings import Standing
from expunge.report.tables import COLLAPSED, FAILED, NOT_MEASURED, markdown, number

TARGET = "target"
"""What the methods start from; it stands in the table and is not ranked."""


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
that fail and collapse on no seed. Left when relearned: a copy is trained on some of the forgotten
documents; of the tokens of the others it then guesses so much more than of those of never-seen
documents; a dash where that was not tried. The NLL of unseen documents, which are like the
forgotten ones, should stay where the target has it: a method may look balanced because it has lost
those as well. Time and memory are those of making the model
from the target, without evaluation; time is that of a shared machine. COLLAPSED stands in place of
the final score of a model that no longer writes language; a seed on which a method collapses is in
no mean of task aggregate and final score, and counts as 0 in the order of methods.
"""

_HEADER = [
    *("method", "seeds", "final ↑", "Pareto", "task aggregate ↑", "forget completion ↓"),
    *("forget knowledge ↓", "retain completion ↑", "retain knowledge ↑", "MIA AUC → 0.5"),
    *("MIA score ↑", "MMLU ↑", "left when relearned → 0", "NLL of unseen documents ↓"),
    *("NLL of other text ↓", "minutes", "peak GB", "settings", "trials", "note", "commit"),
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
                *("mia_auc", "mia_score", "mmlu", "left", "nll_nonmembers", "nll_neutral"),
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
