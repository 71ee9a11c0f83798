"""Every method table of the program, as rows for `expunge methods` and docs/methods.md."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from expunge.companions.making import COMPANIONS
from expunge.edit.methods import EDITS
from expunge.evaluate import attacks, revival
from expunge.evaluate.metrics import METRICS
from expunge.guard.methods import GUARDS
from expunge.merge.methods import METHODS
from expunge.registry import lookup
from expunge.report.methods_page import MethodRow
from expunge.report.methods_page import method_rows as rows_of
from expunge.unlearn.departure import DEPARTURE_LOSSES
from expunge.unlearn.forget import FORGET_LOSSES
from expunge.unlearn.masks import MASKS
from expunge.unlearn.objectives import OBJECTIVES
from expunge.unlearn.preference import PREFERENCE_LOSSES
from expunge.unlearn.retain import RETAIN_LOSSES
from expunge.unlearn.schedule import SCHEDULES
from expunge.unlearn.steps import STEP_RULES
from expunge.unlearn.weighting import WEIGHTINGS

_CARD = ("source", "fidelity", "differs", "needs", "cost", "test")


def _is_attack(function: Callable[..., Any]) -> bool:
    """Whether a metric is an attack: on membership, or on weights to bring texts back."""
    return function.__module__ in (attacks.__name__, revival.__name__)


TABLES: dict[str, Mapping[str, Any]] = {
    "objective": OBJECTIVES,
    "forget loss": FORGET_LOSSES,
    "retain loss": RETAIN_LOSSES,
    "token weighting": WEIGHTINGS,
    "preference loss": PREFERENCE_LOSSES,
    "departure loss": DEPARTURE_LOSSES,
    "set beside forget and retain": COMPANIONS,
    "step rule": STEP_RULES,
    "weight mask": MASKS,
    "schedule": SCHEDULES,
    "merge": METHODS,
    "edit": EDITS,
    "guard": GUARDS,
    "attack": {name: row for name, row in METRICS.items() if _is_attack(row.fn)},
    "metric": {name: row for name, row in METRICS.items() if not _is_attack(row.fn)},
}


def every_method() -> list[MethodRow]:
    """The rows of every table."""
    return rows_of(TABLES)


def method_rows() -> list[dict[str, str]]:
    """One dict a method: name, kind, source, fidelity, needs, cost, test, and its docstring."""
    return [{**vars(row), "needs": str(row.needs)} for row in every_method()]


def methods_table() -> Table:
    """The same for a terminal."""
    table = Table("name", "kind", "what it does", box=None, pad_edge=False)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for row in method_rows():
        table.add_row(*(row[c] for c in ("name", "kind", "summary")))
    return table


def rows_called(name: str) -> list[dict[str, str]]:
    """The rows of every table that have this name; none is a `RecipeError`."""
    rows = method_rows()
    lookup({row["name"]: row for row in rows}, name, "method")
    return [row for row in rows if row["name"] == name]


def method_card(row: dict[str, str]) -> str:
    """Everything that is known of a method, as text."""
    told = [f"{label}: {row[label]}" for label in _CARD if row[label]]
    equation = "\n".join(f"    {line}" for line in row["equation"].splitlines())
    parts = [f"{row['name']} ({row['kind']})", row["summary"], equation, row["notes"]]
    return "\n\n".join(part for part in [*parts, "\n".join(told)] if part)
