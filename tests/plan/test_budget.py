"""A budget shortens training to end in time, and what it shortened is never taken for the whole."""

import json
import time
from pathlib import Path

import pytest

import expunge
from expunge import runs
from expunge.cells import Workers
from expunge.errors import RecipeError, RunError, TrainingError
from expunge.plan.budget import SAFETY, Budget, parse_budget, run_in_time
from expunge.plan.folder import BudgetRun
from expunge.plan.outcome import run_as_planned
from expunge.plan.predict import Prediction, plan
from expunge.recipe import kept_recipe, load_recipe
from expunge.unlearn import trainer


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1h", 3600), ("1h30m", 5400), ("45", 45), ("1H2M3S", 3723)],
)
def test_times_are_read(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "1d", "m30", "-5", "0", "0s", "1h 30m", "soon", "nan", "inf"])
def test_what_is_no_time_names_the_forms(text):
    with pytest.raises(RecipeError, match="write 90s, 30m, 1h, 1h30m or a number of seconds"):
        parse_budget(text)


def prediction(stage, seconds, fixed, steps=10):
    return Prediction(stage, None if stage == "target" else 1, stage, seconds, fixed, steps, 0, "")


def test_time_is_shared_by_the_predictions_and_lateness_is_passed_on(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("expunge.plan.budget.time.monotonic", lambda: now)
    stages = [
        prediction("target", 62, 2),
        prediction("evaluate-target", 10, 10, steps=0),
        prediction("strong", 34, 4),
        prediction("evaluate-strong", 10, 10, steps=0),
    ]
    budget = Budget(now + 60, stages)
    free = 60 - SAFETY * 26
    assert budget.deadline("target") == pytest.approx(now + 1 + free * 60 / 90)
    now += 40  # the target took all but 20 seconds
    left = 20 - SAFETY * 14
    assert budget.deadline("strong", 1) == pytest.approx(now + 2 + left)
    now += 100  # nothing is left but what cannot be shortened
    assert budget.deadline("strong", 1) == pytest.approx(now + 2)


def with_epochs(recipe, epochs):
    branches = {
        name: {**branch.model_dump(), "schedule": {"epochs": epochs}}
        for name, branch in recipe.branches.items()
    }
    return load_recipe(recipe, branches=branches, unscored=("target", "strong"), tune=None)


def affordable(recipe, folder) -> tuple[int, list[dict], Path]:
    """A run within 15 s, or within more where the machine is too busy for that, and its folder."""
    for budget in (15, 50, 150):
        start, out = time.monotonic(), folder / f"run-{budget}"
        try:
            rows = run_as_planned(recipe, out, float(budget), start)[1]
        except (RecipeError, TrainingError) as error:
            assert "is too little" in str(error) or "allows no step" in str(error)
        else:
            if time.monotonic() - start < 1.4 * budget:  # all but the end of a run is counted
                return budget, rows, out
    raise AssertionError("no run ends in time, not even within 150 s")


def finished(out, stage) -> list:
    """A budget in which no step fitted leaves a stage that was begun."""
    return [f for f in (out / "stages").glob(f"{stage}-*") if f.suffix != ".partial"]


def test_a_budget_shortens_a_stage_and_a_whole_run_does_not_take_it(recipe, tmp_path):
    long = with_epochs(recipe, 5000)
    budget, rows, out = affordable(long, tmp_path)
    (cut,) = finished(out, "strong")
    did = json.loads((cut / trainer.SHORTENED).read_text())
    assert 0 < did["steps"] < did["of"]
    assert len((cut / trainer.LOG).read_text().splitlines()) == did["steps"]
    row = next(row for row in rows if row["stage"] == "strong")
    assert row["steps done %"] < 100
    assert kept_recipe(out) == long  # for what looks at the run later
    assert runs.read_json(cut / runs.PROVENANCE)["inputs"]["budget"] == f"{budget} s"
    (merged,) = (out / "stages").glob("merged-*")

    expunge.run(long, out, budget=budget)  # finds what it had shortened
    assert finished(out, "strong") == [cut]
    assert list((out / "stages").glob("merged-*")) == [merged]
    short = with_epochs(recipe, 1)  # control: enough time for all steps
    run_in_time(short, out, 600.0, time.monotonic())
    (whole,) = set(finished(out, "strong")) - {cut}
    assert not (whole / trainer.SHORTENED).exists()
    assert expunge.unlearn(short, out)["strong"].parent == whole


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": 60.0, "workers": Workers("auto")}, "leave out workers"),
        ({"budget": -1.0}, "no time"),
    ],
)
def test_a_budget_that_is_none_is_refused_from_python(recipe, tmp_path, given, says):
    with pytest.raises(RecipeError, match=says):
        expunge.run(recipe, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


class Folders:
    """A stage that is built under a budget, cut short or not."""

    def __init__(self, root, section, *, cut):
        self.folder = BudgetRun(root, owner="r", trained=["strong"], budget=60)
        self.plain = runs.Run(root, owner="r")
        self.section, self.cut, self.built = section, cut, 0

    def build(self, work):
        self.built += 1
        if self.cut:
            runs.write_json(work / trainer.SHORTENED, {"steps": 1, "of": 2})

    def under_budget(self):
        return self.folder.stage("strong", self.section, {"seed": "1"}, self.build)

    def without(self):
        return self.plain.stage("strong", self.section, {"seed": "1"}, self.build)


def test_a_stage_that_was_not_cut_is_the_stage_of_the_recipe(recipe, tmp_path):
    stage = Folders(tmp_path, recipe.branches["strong"], cut=False)
    made = stage.under_budget()
    assert stage.without() == made == stage.under_budget()
    assert stage.built == 1
    said = runs.read_json(made / runs.PROVENANCE)
    assert said["key"] == made.name.removeprefix("strong-")
    assert said["inputs"] == {"seed": "1"}


def test_a_stage_that_was_cut_is_found_by_the_same_budget_alone(recipe, tmp_path):
    stage = Folders(tmp_path, recipe.branches["strong"], cut=True)
    made = stage.under_budget()
    assert stage.under_budget() == made
    assert stage.built == 1
    other = BudgetRun(tmp_path, owner="r", trained=["strong"], budget=61)
    assert other.stage("strong", stage.section, {"seed": "1"}, stage.build) != made
    stage.cut = False
    whole = stage.without()
    assert whole != made
    assert stage.under_budget() == whole  # a whole stage is better than a shortened one
    assert stage.built == 3


def test_a_shortened_target_gives_its_branches_another_key(recipe, tmp_path):
    from expunge.pipeline import Pipeline
    from expunge.plan.folder import Survey

    class Cut(Survey):
        def stage(self, name, section, inputs, build, **options):
            made = super().stage(name, section, inputs, build)
            if name == "target":
                made.mkdir(parents=True, exist_ok=True)
                runs.write_json(made / trainer.SHORTENED, {"steps": 1, "of": 2})
            return made

    names = []
    for kind in (Survey, Cut):
        folder = kind(None, tmp_path / kind.__name__, recipe=recipe, mark={})
        names.append(Pipeline(recipe, tmp_path, folder).branch("strong", 42).folder.parent.name)
    assert names[0] != names[1]


def test_a_budget_in_which_nothing_fits_is_refused_before_anything_is_trained(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"a budget of 1 s is too little: one step of each of 2"):
        run_in_time(recipe, tmp_path / "run", 1.0, time.monotonic())
    assert not list((tmp_path / "run" / "stages").iterdir())


def test_a_plan_and_a_budget_are_refused_to_several_processes(recipe, tmp_path, monkeypatch):
    """Each would measure for itself; the second ended with its invented data not found."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="a plan runs in one process"):
        plan(recipe)
    with pytest.raises(RunError, match="a run within a budget runs in one process"):
        run_in_time(recipe, tmp_path / "run", 1.0, time.monotonic())
    assert not (tmp_path / "run").exists()
