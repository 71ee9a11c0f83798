"""How wrong a plan was: predicted and actual seconds and memory of each stage of a run."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from expunge import runs
from expunge.plan.budget import run_in_time
from expunge.plan.folder import mark_of
from expunge.plan.predict import FILE
from expunge.plan.work import survey
from expunge.recipe import Recipe
from expunge.runner import run_recipes
from expunge.unlearn.checkpoints import SHORTENED


def run_as_planned(
    recipe: Recipe, out: Path, budget: float | None, start: float
) -> tuple[dict[int, Path], list[dict[str, Any]]]:
    """Run every stage, within a budget if one is given; the reports, and the plan's errors."""
    if budget is None:
        folders = run_recipes([recipe], out)[recipe.name]
    else:
        folders = run_in_time(recipe, out, budget, start)
    return folders, add_outcome(recipe, out)


def add_outcome(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """Add to plan.json what each stage took, and return the rows; none without a plan.

    A stage that was shortened is compared with the predicted time of the steps it took.
    """
    if not (out / FILE).exists():
        return []
    said = runs.read_json(out / FILE)
    budget = said["budget"]
    with TemporaryDirectory(prefix=".expunge-plan-") as scratch:
        seen = {
            stage.label: stage for stage in survey(recipe, out, Path(scratch), mark_of(budget)).seen
        }
    rows = []
    for stage in said["stages"]:
        there = seen.get((stage["stage"], stage["seed"]))
        if stage["how"] == "finished" or there is None or not there.finished:
            continue
        if not budget and there.folder.name.rpartition("-")[2] != stage["key"]:
            continue  # the recipe was changed after the plan
        rows.append(_row(stage, there.folder))
    runs.write_json(out / FILE, {**said, "outcome": rows})
    return rows


def _row(stage: dict[str, Any], folder: Path) -> dict[str, Any]:
    did = runs.read_json(folder / runs.PROVENANCE)
    seconds, share = stage["seconds"], 1.0
    if (folder / SHORTENED).exists():
        cut = runs.read_json(folder / SHORTENED)
        share = cut["steps"] / cut["of"]
        seconds = stage["fixed"] + share * (seconds - stage["fixed"])
    actual = did["wall_seconds"]
    memory = did.get("peak_device_bytes") or did["peak_rss_bytes"]
    return {
        "stage": stage["stage"],
        "seed": stage["seed"],
        "predicted s": round(seconds, 1),
        "actual s": actual,
        "error %": _error(seconds, actual),
        "predicted GB": round(stage["memory_bytes"] / 1e9, 2),
        "actual GB": round(memory / 1e9, 2),
        "memory error %": _error(stage["memory_bytes"], memory),
        "steps done %": round(100 * share),
    }


def _error(predicted: float, actual: float) -> float | None:
    return round(100 * (predicted - actual) / actual, 1) if actual else None
