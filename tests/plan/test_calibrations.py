"""A calibration is foretold too: what it reads, at most, and as a stage among the others."""

import pytest

from expunge.evaluate import reader as reading_of_texts
from expunge.evaluate.collapse import NEUTRAL
from expunge.models import load_tokenizer
from expunge.pipeline import Pipeline
from expunge.plan.calibrations import calibrating
from expunge.plan.predict import plan
from expunge.plan.work import encoded, reading
from expunge.recipe import load_recipe
from expunge.runs import read_json

OPTIMIZER = {"compute": "float32", "checkpoint_seconds": 0}


@pytest.fixture
def calibrated(fields):
    """The tiny recipe with a second branch and a calibration that anything satisfies."""
    deep = {
        **fields["branches"]["strong"],
        "terms": [
            {"half": "forget", "loss": "hinge", "scope": "document", "options": {"target": 14.0}},
            {"half": "retain", "loss": "nll", "scope": "document"},
        ],
        "lora": {"rank": 4, "alpha": 8, "dropout": 0},
        "schedule": {"epochs": 10, "micro_batch": 4, "accumulation": 1},
    }
    deep["optimizer"] = {**OPTIMIZER, "lr": 1e-2}
    search = {
        "of": ["deep", "strong"],
        "methods": ["linear"],
        "trials": 2,
        "steps": 3,
        "finalists": 1,
        "snapshots": 0,
    }
    return {
        **fields,
        "data": {"synthetic": {"documents": 2, "nonmembers": 16}},
        "tune": {**fields["tune"], "epochs": 12, "optimizer": {**OPTIMIZER, "lr": 3e-3}},
        "branches": {"deep": deep, **fields["branches"]},
        "calibrate": {"calibrated": {**search, "floors": {"retain": 0, "neutral": 99}}},
        "folds": {"least": 2, "cross": 2},
    }


def test_a_plan_names_a_calibration_and_its_scores(calibrated, tmp_path):
    made = plan(load_recipe(calibrated), tmp_path / "run")
    labels = [stage.stage for stage in made.stages]
    assert labels[-2:] == ["calibrated", "evaluate-calibrated"]
    assert all(stage.seconds > 0 for stage in made.stages[-2:])


def test_a_calibration_reads_no_more_than_was_counted(calibrated, tmp_path, monkeypatch):
    pipeline = Pipeline(calibrated, tmp_path)
    config = pipeline.recipe.calibrate["calibrated"]
    tokenizer = load_tokenizer(pipeline.original.base)
    data = encoded(pipeline, tokenizer)
    work = calibrating(config, pipeline, data, tokenizer)
    side = pipeline.chosen_by(config)
    judged = 1 + 2  # the target and both trials, though one is the finalist
    written = reading("target", pipeline, data, tokenizer, side).written
    assert len(work.written) == judged * len(written)
    branches = [pipeline.branch(name, 42) for name in ("deep", "strong")]
    assert all(branch.adapter is not None for branch in branches)
    read: list[int] = []
    real = reading_of_texts.score_texts

    def counted(model, sequences, **options):
        read.append(sum(len(sequence.tokens) for sequence in sequences))
        return real(model, sequences, **options)

    monkeypatch.setattr(reading_of_texts, "score_texts", counted)
    done = pipeline.calibration("calibrated", config, 42)
    assert work.read / 3 < sum(read) <= work.read
    roles = [point["role"] for point in read_json(done / "calibration.json")["points"]]
    assert sorted(roles) == ["end", "end", "target", "trial", "trial"]  # two ranks: no baseline


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_of_a_sample_only_what_is_generated_counts(fields, tmp_path, limit):
    recipe = load_recipe({**fields, "evaluate": {"max_new_tokens": 4, "generate_limit": limit}})
    pipeline = Pipeline(recipe, tmp_path)
    tokenizer = load_tokenizer(pipeline.original.base)
    work = reading("target", pipeline, encoded(pipeline, tokenizer), tokenizer)
    kinds = [
        (half, e.task, e.kind)
        for half in ("forget", "retain")
        for e in getattr(pipeline.sets, half)
    ]
    expected = sum(min(limit or len(kinds), kinds.count(kind)) for kind in set(kinds))
    assert len(work.written) == len(NEUTRAL) + expected
