"""Readings: what was measured of one model, read back from a folder of results or of a run."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge import runs
from expunge.errors import EvaluationError
from expunge.evaluate.numbers import Behind, Number
from expunge.evaluate.run import ITEMS, RESULTS, read_items, read_run
from expunge.evaluate.semeval_suite import entry_behind, entry_group, entry_numbers
from expunge.evaluate.suite import BESIDE
from expunge.registry import did_you_mean

NO_METRICS = frozenset({"tokens", "answer_tokens", "complete", "averaged_truth_ratio"})
"""Numbers of an item that say how long it is, how far it was generated, or one of its metrics in
another form."""

Row = Mapping[str, Any]
Key = tuple[str, str]
"""Group and id of an item."""


@dataclass(frozen=True)
class SuiteReading:
    """What one suite measured of one model."""

    numbers: dict[str, Number]
    items: dict[Key, Row]
    facts: Mapping[str, Any]
    settings: Mapping[str, Any] | None = None
    """None where they are not known."""

    behind: Mapping[str, Behind] = field(default_factory=dict)
    """The items that a number is made of, where its name does not say."""


@dataclass(frozen=True)
class Reading:
    """What was measured of one model, by suite."""

    name: str
    suites: dict[str, SuiteReading]


def read_place(place: str) -> list[Reading]:
    """The models that a place holds: a FOLDER of results, of a run, or one MODEL of it.

    FOLDER:MODEL names one model of the run of a recipe; FOLDER alone stands for all of them, in
    the order of its results. A results.json stands for its folder.
    """
    folder, model = _folder(place), None
    if not folder.is_dir() and ":" in place:
        named, _, model = place.rpartition(":")
        folder = _folder(named)
    if not folder.is_dir():
        raise EvaluationError(f"there is no folder of results at {folder}")
    content = _content(folder)
    if "models" in content:
        return _run_readings(folder, content["models"], model)
    if model is not None:
        raise EvaluationError(f"{folder} holds one model, so {model!r} cannot be chosen from it")
    return [_evaluated(place, folder)]


def read_one(place: str) -> Reading:
    """The one model of a place; several are an `EvaluationError` that names them."""
    found = read_place(place)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise EvaluationError(f"{place} holds several models; name one: {names}")
    return found[0]


def metrics_of(row: Row) -> list[str]:
    """The names of what was measured of an item: its finite or infinite numbers, True as 1."""
    return [
        name
        for name, value in row.items()
        if isinstance(value, int | float) and name not in NO_METRICS and name != "id"
    ]


def by_key(rows: list[dict[str, Any]], origin: str) -> dict[Key, Row]:
    """Items by group and id; one that is there twice is an `EvaluationError`."""
    found: dict[Key, Row] = {}
    for number, row in enumerate(rows):
        if "id" not in row:
            raise EvaluationError(f"{origin}: item {number} has no id")
        key = (str(row.get("group", "")), str(row["id"]))
        if key in found:
            raise EvaluationError(f"{origin}: {key[0]} holds the item {key[1]!r} twice")
        found[key] = row
    return found


def _folder(named: str) -> Path:
    path = Path(named).expanduser()
    return path.parent if path.name == RESULTS and path.is_file() else path


def _content(folder: Path) -> dict[str, Any]:
    if not (folder / RESULTS).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{RESULTS}"))
        hint = f"; name one of its folders: {', '.join(inner[:8])}" if inner else ""
        raise EvaluationError(
            f"{folder} holds no {RESULTS}{hint or '; expunge evaluate MODEL --out writes one'}"
        )
    content = runs.read_json(folder / RESULTS)
    if not isinstance(content, dict) or not ("models" in content or "suites" in content):
        raise EvaluationError(f"{folder / RESULTS} holds neither suites nor the models of a run")
    if "models" in content:
        _check(folder, "models", content["models"], ("semeval.terms", "nll"))
    else:
        _check(folder, "suites", content["suites"], ("numbers", "facts"))
    return content


def _check(folder: Path, name: str, content: Any, wanted: Sequence[str]) -> None:
    """Refuse what is no mapping of entries that hold a mapping at each of the `wanted` places."""
    for key, entry in content.items() if isinstance(content, dict) else [("", None)]:
        for place in wanted:
            found = entry
            for part in place.split("."):
                found = found.get(part) if isinstance(found, dict) else None
            if not isinstance(found, dict):
                raise EvaluationError(
                    f"{folder / RESULTS} is not what expunge writes: {name} {key!r} has no {place}"
                )


def _number(folder: Path, name: str, fields: Any) -> Number:
    known = ("value", "n", "low", "high")
    if (
        not isinstance(fields, dict)
        or not {"value", "n"} <= set(fields) <= set(known)
        or any(isinstance(v, str | bool | list | dict) for v in fields.values())
    ):
        raise EvaluationError(f"{folder / RESULTS}: {name} is not a number with {', '.join(known)}")
    return Number(**fields)


def _evaluated(name: str, folder: Path) -> Reading:
    """The one model that `expunge evaluate MODEL --out` measured."""
    results, rows = read_run(folder)
    suites = {}
    for suite, measured in results["suites"].items():
        own = [row for row in rows if row.get("suite") == suite]
        suites[suite] = SuiteReading(
            {key: _number(folder, key, number) for key, number in measured["numbers"].items()},
            by_key(own, f"{folder / ITEMS}, {suite}"),
            measured["facts"],
            measured.get("settings"),
            {key: _behind(folder, key, one) for key, one in measured.get("behind", {}).items()},
        )
    return Reading(name, suites)


def _behind(folder: Path, name: str, fields: Any) -> Behind:
    if not isinstance(fields, dict) or not (
        {"metric", "groups", "how"}
        <= set(fields)
        <= {one.name for one in dataclasses.fields(Behind)}
    ):
        raise EvaluationError(f"{folder / RESULTS}: behind {name} no items are named")
    told: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return Behind(**told)


def _run_readings(folder: Path, models: Row, only: str | None) -> list[Reading]:
    """Models of a run; one that was not scored is left out, unless it is asked for."""
    scored = [name for name, entry in models.items() if entry["semeval"]["terms"]]
    if only is not None and only not in scored:
        raise EvaluationError(
            f"{folder} has no scored model {only!r}.{did_you_mean(only, scored)} "
            f"It has: {', '.join(scored)}"
        )
    return [_run_reading(folder, name, models[name]) for name in scored if only in (None, name)]


def _run_reading(folder: Path, name: str, entry: Row) -> Reading:
    """One model of a run; its items are those of the stage whose scores the results hold."""
    root = folder if (folder / "stages").is_dir() else folder.parent
    pattern = re.compile(rf"evaluate-{re.escape(name)}-[0-9a-f]+")
    for stage in sorted((root / "stages").glob("evaluate-*")):
        if pattern.fullmatch(stage.name) and _holds(runs.read_json(stage / "scores.json"), entry):
            break
    else:
        raise EvaluationError(f"the items of {name} in {folder} are not on disk any more")
    rows = [{"group": entry_group(row), **row} for row in read_items(stage / ITEMS)]
    beside = (
        read_items(stage / BESIDE) if (stage / BESIDE).is_file() else []
    )  # older runs have none
    items = by_key(rows + beside, str(stage / ITEMS))
    scores = runs.read_json(stage / "scores.json")
    facts = {**scores["collapse"], "aggregates": ["task_aggregate", "final"]}
    suite = SuiteReading(entry_numbers(scores), items, facts, behind=entry_behind(scores))
    return Reading(f"{folder}:{name}", {"semeval": suite})


def _holds(scores: Row, entry: Row) -> bool:
    """Whether the scores of a stage are those of an entry of results.json."""
    return scores["nll"] == {key: entry["nll"].get(key) for key in scores["nll"]} and all(
        entry["semeval"]["terms"].get(term) == value
        for term, value in scores["semeval"]["terms"].items()
    )
