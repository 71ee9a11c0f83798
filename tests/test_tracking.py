"""Trackers are told what the run's own files say, at no cost to its keys; TensorBoard for real."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from commands import run as command
from expunge import parallel
from expunge.errors import RecipeError
from expunge.pipeline import Pipeline
from expunge.tracking import check_trackers, flat, tell, tracked

RECORDER = """\
import json
from types import SimpleNamespace

TOLD = []

def note(name):
    def call(*words, **given):
        TOLD.append((name, words, given))
        return SimpleNamespace(log=note("log"), finish=note("finish"))
    return call
"""
MLFLOW = """
utils = SimpleNamespace(
    validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
)
search_experiments = lambda **given: []
create_experiment, start_run = note("create_experiment"), note("start_run")
log_params, log_metrics, end_run = note("log_params"), note("log_metrics"), note("end_run")
"""
WANDB = """
init = note("init")
config = SimpleNamespace(update=note("config"))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A module in place of a tracker's package, which keeps what it is told."""

    def make(name: str, text: str):
        (tmp_path / f"{name}.py").write_text(RECORDER + text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield make
    for name in ("mlflow", "wandb"):
        sys.modules.pop(name, None)


@pytest.fixture
def recipe(tiny_folder) -> dict:
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 1}},
        "branches": {
            "strong": {
                "terms": [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}],
                "lora": {"rank": 2, "alpha": 4},
                "schedule": {"epochs": 1, "micro_batch": 2},
                "optimizer": {"lr": 1e-3, "compute": "float32"},
                "watch": {"every": 2},
            }
        },
        "evaluate": {"max_new_tokens": 2, "resamples": 10},
    }


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_what_the_files_of_the_run_say(recipe, tmp_path):
    out = tmp_path / "told"
    with tracked(["tensorboard"], out, "tiny", recipe):
        Pipeline(recipe, out).report(42)
    found = scalars(out / "tensorboard")
    stage = next(out.glob("stages/strong-*"))
    log = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    for name in ("forget", "retain", "lr", "norm"):
        steps = [(r["step"], pytest.approx(r[name])) for r in log]
        assert found[f"strong-seed-42/{name}"] == steps
    lines = (stage / "evaluations.jsonl").read_text().splitlines()
    evaluations = [json.loads(line) for line in lines]
    assert evaluations
    assert found["strong-seed-42-watch/nll.forget"] == [
        (e["step"], pytest.approx(e["numbers"]["nll.forget"])) for e in evaluations
    ]
    scores = json.loads((out / "results.json").read_text())["models"]
    for model in ("target", "strong"):
        (told,) = found[f"scores-of-seed-42/{model}.semeval.mia.auc"]
        assert told == (0, pytest.approx(scores[model]["semeval"]["mia"]["auc"]))
    (config,) = (out / "tensorboard").glob("*/hparams.yml")
    assert "data.synthetic.documents: 1" in config.read_text()


def test_being_told_changes_no_key_and_no_weight(recipe, tmp_path):
    with tracked(["tensorboard"], tmp_path / "told", "tiny", recipe):
        Pipeline(recipe, tmp_path / "told").branches()
    Pipeline(recipe, tmp_path / "alone").branches()
    files = [
        {str(p.relative_to(root)): p.read_bytes() for p in root.glob("stages/*/adapter/*.safe*")}
        for root in (tmp_path / "told", tmp_path / "alone")
    ]
    assert files[0]
    assert files[0] == files[1]
    assert not (tmp_path / "alone" / "tensorboard").exists()


def test_mlflow_is_told_config_steps_and_the_end(fake, tmp_path):
    module = fake("mlflow", MLFLOW)
    with tracked(["mlflow"], tmp_path, "tiny", {"seeds": [1, 2], "tune": {"lr": 0.1}}):
        assert module.TOLD == []  # nothing is opened before there is something to tell
        tell("strong (seed 42)", 3, {"forget": 0.5})
    names = [name for name, _, _ in module.TOLD]
    assert names == ["create_experiment", "start_run", "log_params", "log_metrics", "end_run"]
    assert module.TOLD[2][1] == ({"seeds": "[1, 2]", "tune.lr": 0.1},)
    assert module.TOLD[3][1:] == (({"strong-seed-42/forget": 0.5},), {"step": 3})
    tell("strong (seed 42)", 4, {"forget": 0.5})
    assert len(module.TOLD) == 5  # outside nobody is told


def test_wandb_is_told_a_step_as_one_more_number(fake, tmp_path):
    """Its own steps only grow, and each stage counts from 1."""
    module = fake("wandb", WANDB)
    with tracked(["wandb"], tmp_path, "tiny", {"name": "tiny"}):
        tell("tune", 9, {"loss": 0.5})
        tell("strong", 1, {"loss": 0.25})
    assert [name for name, _, _ in module.TOLD] == ["init", "config", "log", "log", "finish"]
    assert module.TOLD[0][2] == {"project": "tiny", "dir": str(tmp_path)}
    assert module.TOLD[2][1] == ({"tune/loss": 0.5, "tune/step": 9},)
    assert module.TOLD[3][1:] == (({"strong/loss": 0.25, "strong/step": 1},), {"step": None})


def test_a_tracker_is_closed_when_the_run_breaks_off(fake, tmp_path):
    module = fake("wandb", WANDB)
    with pytest.raises(KeyError), tracked(["wandb"], tmp_path, "tiny", {}):
        tell("tune", 1, {"loss": 0.5})
        raise KeyError
    assert module.TOLD[-1][0] == "finish"


def test_only_the_first_rank_tells(fake, tmp_path, monkeypatch):
    module = fake("wandb", WANDB)
    monkeypatch.setattr(parallel, "is_main", lambda: False)
    with tracked(["wandb"], tmp_path, "tiny", {}):
        tell("tune", 1, {"loss": 0.5})
    assert module.TOLD == []


def test_a_wrong_name_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"no tracker is called 'wandbb'\. Did you mean 'wandb'"):
        check_trackers(["tensorboard", "wandbb"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="--track mlflow needs the package mlflow: pip install"):
        check_trackers(["mlflow"])
    monkeypatch.undo()
    (tmp_path / "nopackage").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("expunge.tracking.TRACKERS", {"x": _kind("nopackage")})
    with pytest.raises(RecipeError, match="needs the package nopackage"):  # a folder is no package
        check_trackers(["x"])


def _kind(package: str):
    from expunge.tracking import Kind

    return Kind(package)


def test_nested_fields_are_told_by_dotted_names():
    assert flat({"a": {"b": {"c": 1}, "d": None}, "e": (1, {"f": 2})}) == {
        "a.b.c": 1,
        "a.d": None,
        "e": '[1, {"f": 2}]',
    }


def test_the_command_refuses_before_anything_is_computed(recipe, tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    out = tmp_path / "out"

    def refused(*words: object) -> str:
        done = command("run", tmp_path / "r.yaml", *words, "--out", out)
        assert done.returncode == 2, done.stderr
        assert not out.exists()
        (line,) = done.stderr.splitlines()
        return line

    assert "Did you mean 'tensorboard'" in refused("--track", "tensorbord")
    sweep = ("--sweep", "branches.strong.optimizer.lr=1e-4,3e-4")
    assert "--track is for one recipe" in refused("--track", "tensorboard", *sweep)
