"""Plans of schedules with phases, and of masks: counted as they will be run."""

import json

from expunge.pipeline import Pipeline
from expunge.plan.predict import plan
from expunge.recipe import load_recipe


def test_a_plan_counts_the_steps_that_are_run(fields, tmp_path):
    """Of a schedule whose retain terms read forget items, under a mask that reads both halves."""
    branch = {
        **fields["branches"]["strong"],
        "training": "full",
        "mask": {"kind": "wagle", "ratio": 0.2},
        "schedule": {"kind": "layered", "folds": 2, "epochs": 1, "accumulation": 1},
    }
    given = {**fields, "branches": {"strong": branch}, "merges": {}, "tune": None}
    recipe = load_recipe(given)
    (foretold,) = (stage for stage in plan(recipe).stages if stage.stage == "strong")
    weights = Pipeline(recipe, tmp_path / "run").branch("strong", 42)
    log = (weights.base.parent / "log.jsonl").read_text().splitlines()
    assert foretold.steps == len(log) > 3
    assert {json.loads(line)["phase"] for line in log} == {1, 2}
