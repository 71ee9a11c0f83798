"""The report's files: results.json, report.md, and report.html, which needs nothing beside it."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from expunge import runs
from expunge.report.results import Results
from expunge.report.tables import COLLAPSED, column_names, lines, markdown_table, term_label
from expunge.report.verdict import verdict

SHOWN = 12
"""Items of each term on the page, evenly spread; the run folder has them all."""

Items = Mapping[str, Sequence[Mapping[str, Any]]]
"""Model name to rows {id, half, task, kind, prompt, truth, generation, score}; more is ignored."""


@dataclass(frozen=True)
class Example:
    """One item, with what each model generated for it."""

    id: str
    prompt: str
    truth: str
    answers: tuple[tuple[str, str, str], ...]
    """(model, generation, score as text)."""


@dataclass(frozen=True)
class Group:
    """The items of one term that the page shows."""

    title: str
    count: int
    examples: tuple[Example, ...]


def write_report(
    results: Results, items: Items, folder: Path, *, recipe_text: str | None = None
) -> None:
    """Write results.json, report.md and report.html into `folder`, each whole or not at all."""
    runs.make_folder(folder)
    runs.write_json(folder / "results.json", results.model_dump(mode="json"))
    runs.write_text(folder / "report.md", markdown_report(results))
    runs.write_text(folder / "report.html", html_page(results, items, recipe_text=recipe_text))


def markdown_report(results: Results) -> str:
    """The verdict and the table as Markdown."""
    facts = f"Recipe {results.recipe}, seed {results.seed}, commit {results.commit}."
    return "\n\n".join(
        ["# What was forgotten, what was kept", " ".join(verdict(results)), facts, ""]
    ) + markdown_table(results)


def html_page(results: Results, items: Items, *, recipe_text: str | None = None) -> str:
    """One self-contained page; whatever a model wrote is shown as text, never as markup."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("expunge.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        results=results,
        sentences=verdict(results),
        columns=column_names(results),
        lines=lines(results),
        collapsed=COLLAPSED,
        groups=groups(results, items),
        stages=[
            (
                str(stage.get("stage", "stage")),
                str(stage.get("wall_seconds", "?")),
                json.dumps(stage, indent=1, ensure_ascii=False),
            )
            for stage in results.stages
        ],
        recipe_text=recipe_text,
    )


def groups(results: Results, items: Items) -> list[Group]:
    """The items by term, each with the answers of all models side by side, in the story's order."""
    answers: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)
    by_term: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = defaultdict(dict)
    for model in results.ordered_models():
        for row in items.get(model, ()):
            if row["generation"] is None:  # outside the sample that was generated
                continue
            place = (row["half"], row["id"])
            by_term[f"{row['half']}/{row['task']}/{row['kind']}"].setdefault(place, row)
            answers[place].append((model, row["generation"], _score(row.get("score"))))
    found = []
    for term, rows in by_term.items():
        chosen = _spread(list(rows.items()), SHOWN)
        examples = tuple(
            Example(str(row["id"]), row["prompt"], row["truth"], tuple(answers[place]))
            for place, row in chosen
        )
        found.append(Group(term_label(term), len(rows), examples))
    return found


def _spread(rows: list[Any], limit: int) -> list[Any]:
    """At most `limit` of the rows, evenly spaced from the first."""
    if len(rows) <= limit:
        return rows
    return [rows[number * len(rows) // limit] for number in range(limit)]


def _score(value: float | bool | None) -> str:
    return "–" if value is None else f"{float(value):.2f}"
