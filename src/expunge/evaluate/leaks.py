"""Which documents a model still gives away: its items by document, the worst first."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from expunge.errors import EvaluationError
from expunge.evaluate.drawing import document_of
from expunge.evaluate.readings import Reading, Row, metrics_of
from expunge.registry import did_you_mean

LOW_LEAKS = frozenset({"nll", "rank", "distance", "truth_ratio"})
"""Metrics of which a low value says that the item is still there."""

SHOWN = ("group", "id", "prompt", "truth", "generation")


def leaks(
    reading: Reading,
    *,
    suite: str | None = None,
    metric: str | None = None,
    group: str = "forget",
    low: bool = False,
    top: int = 10,
) -> dict[str, Any]:
    """The documents whose items leak most, and how much of a suite was looked at.

    A document is as leaky as its worst item; among equals the mean decides. The items are those of
    groups that are called `group` or begin with `group.`; of LOW_LEAKS, or with `low`, low values
    are worst. Items without the metric are counted, not ranked.
    """
    name, rows = _rows(reading, suite, group)
    known = list(dict.fromkeys(key for row in rows for key in metrics_of(row)))
    chosen = _metric(metric, known, f"{reading.name}, {name}")
    sign = -1 if low or chosen in LOW_LEAKS else 1
    documents: dict[str, list[Row]] = {}
    for row in rows:
        if row.get(chosen) is not None:
            documents.setdefault(document_of(row), []).append(row)
    ranked = [_document(key, own, chosen, sign) for key, own in documents.items()]
    ranked.sort(key=lambda one: (-sign * one["worst"], -sign * one["mean"], one["document"]))
    return {
        "model": reading.name,
        "suite": name,
        "group": group,
        "metric": chosen,
        "worst_is": "high" if sign > 0 else "low",
        "documents": ranked[:top],
        "of": len(ranked),
        "items": len(rows),
        "not_measured": sum(row.get(chosen) is None for row in rows),
    }


def _document(document: str, rows: Sequence[Row], metric: str, sign: int) -> dict[str, Any]:
    items = sorted(rows, key=lambda row: -sign * row[metric])
    return {
        "document": document,
        "worst": items[0][metric],
        "mean": fmean(row[metric] for row in items),
        "items": [
            {metric: row[metric], **{name: row.get(name) for name in SHOWN}}
            | ({"leaks": row["leaks"]} if row.get("leaks") else {})  # personal data that it says
            for row in items
        ],
    }


def _rows(reading: Reading, suite: str | None, group: str) -> tuple[str, list[Row]]:
    """The suite that is looked at, and its items of the group."""
    found = {
        name: [row for (own, _), row in one.items.items() if _is_in(own, group)]
        for name, one in reading.suites.items()
    }
    if suite is not None and suite not in found:
        raise EvaluationError(
            f"{reading.name} was not measured by {suite!r}.{did_you_mean(suite, found)} "
            f"It has: {', '.join(found)}"
        )
    names = [name for name, rows in found.items() if rows and suite in (None, name)]
    if not names:
        asked = [one for name, one in reading.suites.items() if suite in (None, name)]
        groups = {own for one in asked for own, _ in one.items}
        raise EvaluationError(
            f"{reading.name} has no items of {group!r}. Its groups: {_listed(groups)}; choose with "
            "--group"
        )
    if len(names) > 1:
        raise EvaluationError(f"{reading.name}: say which: --suite {' or '.join(names)}")
    return names[0], found[names[0]]


def _is_in(own: str, group: str) -> bool:
    return own == group or own.startswith(f"{group}.")


def _metric(asked: str | None, known: Sequence[str], where: str) -> str:
    """The metric asked for; without one `score`, or the only one that there is."""
    if not known:
        raise EvaluationError(f"{where}: none of these items was measured")
    if asked is None and ("score" in known or len(known) == 1):
        return "score" if "score" in known else known[0]
    if asked is None:
        raise EvaluationError(f"{where}: say which: --metric {' or '.join(known)}")
    if asked not in known:
        raise EvaluationError(
            f"{where}: items have no metric {asked!r}.{did_you_mean(asked, known)} "
            f"They have: {_listed(known)}"
        )
    return asked


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
