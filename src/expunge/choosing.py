"""Calibrations that are asked for of a finished run: made, kept in RUN/calibration/, and picked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge import models, runs
from expunge.calibrate.outcome import CALIBRATION, candidate_of
from expunge.calibrate.section import Calibrate
from expunge.calibrating import Calibrating
from expunge.config import parse_section
from expunge.errors import CalibrationError, RecipeError
from expunge.inputs import check_groups
from expunge.recipe import Recipe


def changed(recipe: Recipe, name: str, changes: Mapping[str, Any]) -> Calibrate:
    """The recipe's calibration of that name, or a plain one, with some fields changed; what the
    recipe's branches or data cannot give is refused."""
    start = recipe.calibrate.get(name)
    fields = {} if start is None else start.model_dump(mode="json", exclude_unset=True)
    made = {**fields, **changes}
    if isinstance(changes.get("floors"), Mapping):
        made["floors"] = {**fields.get("floors", {}), **changes["floors"]}
    config = parse_section(made, Calibrate, origin="calibrate")
    try:
        runs.check_name(name)
        recipe.check_calibration("calibrate", config)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if name in {"original", *recipe.models} - {*recipe.calibrate}:
        raise RecipeError(f"'{name}' is another model of the run; give the calibration a new name")
    return config


def calibrate_run(
    pipeline: Calibrating, name: str, config: Calibrate, seed: int
) -> tuple[dict[str, Any], CalibrationError | None]:
    """Calibrate the branches of a run and keep what was found in RUN/calibration/; where no
    candidate meets the floors, also the error that says so."""
    check_groups(pipeline.recipe, name, config, models.outline(pipeline.original.base))
    done = pipeline.calibration(name, config, seed)
    found = runs.read_json(done / CALIBRATION)
    path = _kept(pipeline.folder.root, name, seed)
    runs.write_json(path, {**found, "stage": done.name})
    return found, pipeline.unmet(found, name, seed)


def pick_point(
    pipeline: Calibrating, name: str, seed: int, number: int, out: Path, *, output: str
) -> str:
    """Write a point of a run's last calibration into `out`; returns its label.

    One that the run made itself is taken where expunge calibrate kept none. A calibration of other
    branches, folds or data than the run has now is a `CalibrationError`: its points are no more.
    """
    path, own = _kept(pipeline.folder.root, name, seed), pipeline.recipe.calibrate.get(name)
    if path.is_file():
        found = runs.read_json(path)
    elif own is not None:
        done = pipeline.calibration(name, own, seed)
        found = {**runs.read_json(done / CALIBRATION), "stage": done.name}
    else:
        raise CalibrationError(
            f"{pipeline.folder.root} holds no calibration '{name}' of seed {seed}; expunge "
            "calibrate makes it"
        )
    candidate = candidate_of(found, number)
    config = parse_section(found["settings"], Calibrate, origin=str(path))
    if pipeline.calibration_stage(name, config, seed) != found["stage"]:
        raise CalibrationError(
            f"the calibration '{name}' of seed {seed} was made of other branches, folds or data "
            f"than the recipe of {pipeline.folder.root} names now; expunge calibrate makes it anew"
        )
    if found["points"][number]["role"] == "baseline":
        pipeline.check_paper(candidate, found.get("paper") or {}, config, seed)
    pipeline.write_point(config, seed, candidate, out, output=output)
    return candidate.label


def _kept(root: Path, name: str, seed: int) -> Path:
    return root / "calibration" / f"{name}-seed-{seed}.json"
