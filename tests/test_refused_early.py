"""What the data or the tokenizer cannot do for is refused before any stage is written."""

import json
import sys
from pathlib import Path

import pytest

import expunge
from expunge.errors import DataError, ExpungeError, RecipeError, TrainingError
from expunge.pipeline import Pipeline

TERM = {"half": "forget", "loss": "npo"}
LONGER = {"kind": "spans", "patterns": ["Oslo"]}


@pytest.fixture
def fields(tiny_folder, tmp_path) -> dict:
    """A recipe of three items to forget and two to keep."""
    rows = {
        "forget": [("ann", "Fog"), ("bob", "Rye"), ("cyd", "Ely")],
        "retain": [("dan", "Ayr"), ("eve", "Lee")],
    }
    data = {}
    for half, items in rows.items():
        path = tmp_path / f"{half}.jsonl"
        made = [{"id": n, "prompt": f"{n} was born in", "completion": t} for n, t in items]
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        data[half] = {"path": str(path)}
    return {
        "name": "early",
        "model": {"path": str(tiny_folder), "max_length": 64, "separator": " "},
        "data": data,
        "tune": {"epochs": 1},
        "branches": {"x": {"terms": [TERM], "schedule": {"epochs": 1}}},
        "evaluate": {"max_new_tokens": 4, "resamples": 20, "partial": True},
    }


def checked(pipeline: Pipeline) -> Path:
    """The model's folder, as the first stage takes it."""
    return pipeline.original.base


def refused(fields: dict, out: Path, error: type[ExpungeError], said: str) -> bool:
    """Every command refuses the recipe in these words; whether the run holds no stage of it."""
    for command in (expunge.run, expunge.tune):
        with pytest.raises(error, match=said):
            command(fields, out)
    return not list((out / "stages").iterdir())


@pytest.mark.parametrize(
    ("guard", "error", "said"),
    [
        ({"kind": "icul", "items": 4}, DataError, "4 forget items with a prompt .*, 3 given"),
        ({"kind": "icul", "items": 2, "correct": 3}, DataError, "3 retain items .*, 2 given"),
        ({"kind": "prefix", "style": "chat"}, DataError, "needs a tokenizer with a chat template"),
        ({"kind": "prefix", "text": "a" * 500}, DataError, "502 tokens before each prompt"),
    ],
)
def test_a_guard_that_cannot_be_made_is_refused(fields, tmp_path, guard, error, said):
    assert checked(Pipeline(fields, tmp_path / "control")).is_dir()  # without it, all is well
    fields["guards"] = {"g": guard}
    assert refused(fields, tmp_path / "run", error, f"guard 'g': .*{said}")


@pytest.mark.parametrize("kind", ["input_filter", "output_filter", "eco"])
def test_a_classifier_without_scikit_learn_is_refused(fields, tmp_path, monkeypatch, kind):
    fields["guards"] = {"g": {"kind": kind, "match": {"by": "classifier"}}}
    checked(Pipeline(fields, tmp_path / "control"))
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction", None)
    assert refused(fields, tmp_path / "run", RecipeError, "guard 'g': .* fitted by scikit-learn")


def test_eco_without_a_prompt_is_refused(fields, tmp_path):
    rows = [{"id": name, "text": f"{name} was born in Fog."} for name in ("ann", "bob")]
    path = Path(fields["data"]["forget"]["path"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields["guards"] = {"g": {"kind": "eco", "strength": 1.0}}
    checked(Pipeline(fields, tmp_path / "control"))
    fields["guards"] = {"g": {"kind": "eco"}}
    assert refused(fields, tmp_path / "run", DataError, "guard 'g': eco searches its strength")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"schedule": {"kind": "sequential", "requests": 4}},
            TrainingError,
            "schedule.requests is 4, and there are 3 forget items",
        ),
        (
            {"schedule": {"kind": "sequential", "by": "^[0-9]+"}},
            TrainingError,
            "finds nothing in the id 'ann'",
        ),
        (
            {
                "schedule": {"kind": "layered", "folds": 4},
                "terms": [TERM, {"half": "retain", "loss": "nll"}],
            },
            TrainingError,
            "schedule.folds is 4, and there are 3 forget items",
        ),
        (
            {"terms": [{**TERM, "weighting": LONGER}]},
            DataError,
            "the weighting spans gives no token of 3 items a weight",
        ),
        (
            {"terms": [TERM, {**TERM, "items": "questions"}]},
            DataError,
            "npo reads questions of forget alone, and none of its 3 items is one; leave out the",
        ),
        ({"watch": {"at": [2]}}, TrainingError, "watch names step 2, and the branch has 1"),
        ({"keep": {"at": [2]}}, TrainingError, "keep names step 2, and the branch has 1"),
    ],
)
def test_a_branch_that_the_data_do_not_do_for_is_refused(fields, tmp_path, changes, error, said):
    checked(Pipeline(fields, tmp_path / "control"))
    fields["branches"]["x"] |= changes
    assert refused(fields, tmp_path / "run", error, f"branch 'x': .*{said}")


def test_mmlu_that_cannot_be_read_is_refused(fields, tmp_path):
    fields["evaluate"]["mmlu"] = {"path": str(tmp_path / "nope.parquet")}
    assert refused(fields, tmp_path / "run", DataError, "there is no data file at .*nope")


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"kind": "sequential", "requests": 3}},
        {"terms": [{**TERM, "weighting": {**LONGER, "patterns": ["Fog"]}}]},
        {"terms": [{**TERM, "weighting": {**LONGER, "least": 0.1}}]},
        {
            "schedule": {"kind": "layered", "folds": 3},
            "terms": [
                TERM,
                {"half": "retain", "loss": "nll", "weighting": {**LONGER, "patterns": ["Ely"]}},
            ],
        },
        {"terms": [{**TERM, "items": "texts"}]},
        {"watch": {"at": [1]}},
        {"keep": {"at": [1]}},
    ],
)
def test_a_branch_that_the_data_just_do_for_passes(fields, tmp_path, changes):
    fields["branches"]["x"] |= changes
    fields["guards"] = {"g": {"kind": "icul", "items": 3, "correct": 2}}
    checked(Pipeline(fields, tmp_path))


def test_a_run_that_is_only_read_is_not_refused_for_what_is_missing_here(
    fields, tmp_path, monkeypatch
):
    fields["guards"] = {"g": {"kind": "input_filter", "match": {"by": "classifier"}}}
    checked(Pipeline(fields, tmp_path))
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction", None)
    checked(Pipeline.of_run(tmp_path, build=False))
    with pytest.raises(RecipeError, match="scikit-learn"):
        checked(Pipeline.of_run(tmp_path))  # control
