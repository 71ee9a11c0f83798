"""Whole runs of a tiny model: what a killed run ends with, what is reused, what is refused."""

import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

import expunge
from commands import Command, run
from expunge.errors import DataError, RecipeError, RunError, TrainingError
from expunge.evaluate.run import read_items
from expunge.unlearn.optimizer import Stepper
from expunge.unlearn.snapshots import snapshots

TERMS = [
    {"half": "forget", "loss": "npo"},
    {"half": "retain", "loss": "nll"},
    {"half": "retain", "loss": "kl"},
]


@pytest.fixture
def fields(tiny_folder) -> dict:
    """A recipe small enough to run in a second or two."""
    branch = {
        "terms": TERMS,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "schedule": {"epochs": 2, "micro_batch": 2, "accumulation": 2},
        "optimizer": {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0},
    }
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "tune": {
            "epochs": 2,
            "batch": 4,
            "optimizer": {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0},
        },
        "branches": {"strong": branch, "weak": {**branch, "schedule": {"epochs": 1}}},
        "merges": {
            "merged": {"method": "ties"},
            "dense": {"method": "ties", "space": "delta", "output": "model"},
        },
        "evaluate": {"max_new_tokens": 4, "resamples": 20},
    }


@pytest.fixture
def recipe(fields, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def weights(folder: Path) -> dict[str, bytes]:
    """Every safetensors file of the finished stages by name."""
    stages = folder / "stages"
    return {str(p.relative_to(stages)): p.read_bytes() for p in stages.rglob("*.safetensors")}


def test_a_run_makes_every_model_and_says_what_it_measured(fields, tmp_path):
    folders = expunge.run(fields, tmp_path / "run")
    assert folders == {42: tmp_path / "run"}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["models"]) == ["original", "target", "strong", "weak", "merged", "dense"]
    for model in results["models"].values():
        assert len(model["semeval"]["terms"]) == 12
        assert model["semeval"]["mmlu"] is None
        assert model["semeval"]["final"] is None
        assert model["semeval"]["mia"]["n"] == 3 + 6
    made = {stage["stage"] for stage in results["stages"]}
    assert {"data", "target", "strong", "weak", "merged", "evaluate-merged"} <= made
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_a_model_that_is_not_scored_is_null_in_the_results(fields, tmp_path):
    fields = {**fields, "merges": {}, "unscored": ["original", "weak"]}
    expunge.run(fields, tmp_path)
    models = json.loads((tmp_path / "results.json").read_text())["models"]
    assert models["target"]["semeval"]["mia"]["auc"] is not None
    for name in ("original", "weak"):
        assert models[name]["semeval"]["task_aggregate"] is None
        assert models[name]["semeval"]["mia"] is None
        assert models[name]["collapse"]["collapsed"] is None
    assert "–" in (tmp_path / "report.md").read_text()


def test_finished_stages_are_not_done_again(fields, tmp_path, monkeypatch):
    out = tmp_path / "run"
    expunge.merge(fields, out)
    before = {p: p.stat().st_mtime_ns for p in (out / "stages").rglob("*") if p.is_file()}
    monkeypatch.setattr("expunge.training.train_branch", None)  # would fail if it were called
    expunge.merge(fields, out)
    assert {p: p.stat().st_mtime_ns for p in (out / "stages").rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    changed = {**fields, "merges": {"merged": {"method": "linear"}}}
    expunge.merge(changed, out)
    assert len(list((out / "stages").glob("strong-*"))) == 1  # reused
    assert len(list((out / "stages").glob("merged-*"))) == 2  # another method, another stage


@pytest.mark.parametrize("moment", ["target", "strong", "weak", "merged", "evaluate-strong"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(recipe, fields, tmp_path, moment):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expunge.merge(fields, whole)
    process = Command("run", recipe, "--out", broken)
    deadline = time.monotonic() + 100
    while not list(broken.glob(f"stages/{moment}-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait().returncode == -signal.SIGKILL  # it was killed, not over
    done = run("run", recipe, "--out", broken)
    assert done.returncode == 0, done.stderr
    assert {k: v for k, v in weights(broken).items() if "evaluate" not in k} == weights(whole)
    assert not list(broken.glob("stages/*.partial"))


def test_a_branch_that_ran_out_of_memory_goes_on_with_the_setting_that_fits(
    fields, tmp_path, monkeypatch
):
    """What costs memory or time alone does not begin a branch anew; a learning rate does."""
    strong = fields["branches"]["strong"]
    strong["optimizer"] = {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0}
    fields = {**fields, "branches": {"strong": strong}, "merges": {}}
    expunge.tune(fields, tmp_path)
    plain, taken = Stepper.step, []

    def counted(self, rate=None):
        taken.append(self.rate)
        if len(taken) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        plain(self, rate)

    monkeypatch.setattr(Stepper, "step", counted)
    with pytest.raises(TrainingError, match="memory"):
        expunge.unlearn(fields, tmp_path)
    assert len(taken) == 3
    strong["optimizer"] |= {"max_tokens": 64, "checkpointing": True, "checkpoint_seconds": 30}
    (folder,) = expunge.unlearn(fields, tmp_path).values()
    steps = len((folder.parent / "log.jsonl").read_text().splitlines())
    assert len(taken) == 3 + steps - 2 and steps > 4
    said = json.loads((folder.parent / "stage.json").read_text())
    assert said["section"]["optimizer"]["max_tokens"] == 64  # what ran is on record
    assert not list((tmp_path / "stages").glob("*.partial"))
    strong["optimizer"]["lr"] = 2e-3
    expunge.unlearn(fields, tmp_path)
    assert len(taken) == 3 + 2 * steps - 2


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_run_killed_beside_a_snapshot_ends_with_the_same_bytes(recipe, fields, tmp_path, step):
    strong = fields["branches"]["strong"]
    fields["branches"] = {"strong": {**strong, "keep": {"every": 1}}}
    strong["schedule"]["epochs"], strong["optimizer"] = 8, {"lr": 1e-3, "compute": "float32"}
    recipe.write_text(yaml.safe_dump(fields | {"merges": {}}))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    (folder,) = expunge.unlearn(fields | {"merges": {}}, whole).values()
    made = snapshots(folder.parent)
    assert len(made) > 6 and (folder / "adapter_model.safetensors").is_file()
    process = Command("unlearn", recipe, "--out", broken)
    deadline = time.monotonic() + 100
    pattern = f"stages/strong-*.partial/snapshots/*step-{step:05d}*"  # begun or whole
    while not list(broken.glob(pattern)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait().returncode == -signal.SIGKILL  # it was killed, not over
    (partial,) = broken.glob("stages/strong-*.partial")
    before = {p.name: p.stat().st_mtime_ns for p in snapshots(partial).values()}
    assert len(before) < len(made)  # control
    done = run("unlearn", recipe, "--out", broken)
    assert done.returncode == 0, done.stderr
    assert weights(broken) == weights(whole)
    (stage,) = broken.glob("stages/strong-*")
    after = {p.name: p.stat().st_mtime_ns for p in (stage / "snapshots").iterdir()}
    assert len(after) == len(made) and before.items() <= after.items()


def test_another_recipes_folder_is_refused(fields, tmp_path):
    expunge.tune(fields, tmp_path / "run")
    with pytest.raises(RunError, match="belongs to the recipe 'tiny', not to 'other'"):
        expunge.tune({**fields, "name": "other"}, tmp_path / "run")


def test_sets_that_overlap_are_refused(fields, tmp_path):
    rows = [{"id": "a-qa0", "input": "Who?", "output": "Ada", "task": "Task1"}]
    for half in ("forget", "retain"):
        (tmp_path / f"{half}.jsonl").write_text(json.dumps(rows[0]) + "\n")
    data = {h: {"path": str(tmp_path / f"{h}.jsonl")} for h in ("forget", "retain")}
    with pytest.raises(DataError, match="forget item a-qa0 and retain item a-qa0 are the same"):
        expunge.tune({**fields, "data": data}, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"brances": {}}, r"unknown field brances. Did you mean 'branches'\?"),
        ({"data": {}}, "give forget, with retain where something reads it, or synthetic"),
        ({"merges": {"strong": {}}}, "'strong' names two models"),
        ({"merges": {"m": {"of": ["strnog"]}}}, "names the branch 'strnog'. Known: strong, weak"),
        ({"merges": {"m": {"method": "tise"}}}, "Did you mean 'ties'"),
        ({"branches": {"b": {"terms": [{"half": "forget", "loss": "nop"}]}}}, "Did you mean 'npo'"),
        (
            {
                "branches": {
                    "b": {"terms": [{"half": "forget", "loss": "npo", "options": {"x": 1}}]}
                }
            },
            "npo has no option 'x'. Its options: beta",
        ),
        ({"branches": {"b": {"terms": [{"half": "retain", "loss": "nll"}]}}}, "half: forget"),
        ({"unscored": ["orignal"]}, "unscored names no model 'orignal'"),
        ({"seeds": [1, 1]}, "seeds holds a number twice"),
        ({"tune": {"optimizer": {"lr": math.inf}}}, "lr: Input should be a finite number"),
        ({"evaluate": {"document_tokens": math.inf}}, "document_tokens: Input should be"),
        ({"tune": {"epochs": 0}}, "tune.epochs: Input should be greater than or equal to 1"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_when_it_is_read(fields, tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        expunge.run({**fields, **change}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


OTHER_RANK = {"lora": {"rank": 3, "alpha": 4, "dropout": 0.1}}
OTHER_PLACES = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.1, "targets": ["q_proj"]}}
LINEAR = {"methods": ["linear"]}


@pytest.mark.parametrize(
    ("weak", "maker", "section", "message"),
    [
        ({}, "merges", {"weights": [1, 1, 1]}, "'m' has 3 weights for 2 branches; give one each"),
        (OTHER_RANK, "merges", {}, r"ranks 2 \(strong\), 3 \(weak\).*say space: delta"),
        (OTHER_RANK, "merges", {"space": "delta"}, None),
        (
            OTHER_PLACES,
            "merges",
            {},
            r"lora.targets differs: all \(strong\), \('q_proj',\) \(weak\)",
        ),
        (OTHER_PLACES, "merges", {"of": ["weak"]}, None),
        (
            OTHER_RANK,
            "calibrate",
            {},
            r"ties works on .* one rank, .* 2, 3; say methods: \[linear\]",
        ),
        (OTHER_RANK, "calibrate", LINEAR, None),
        (OTHER_PLACES, "calibrate", LINEAR, "lora.targets differs"),
    ],
)
def test_branches_that_cannot_be_merged_are_refused_before_they_are_trained(
    fields, weak, maker, section, message
):
    from expunge.recipe import load_recipe

    branches = {**fields["branches"], "weak": {**fields["branches"]["weak"], **weak}}
    changed = {**fields, "merges": {}, "branches": branches, maker: {"m": section}}
    if message is None:
        assert load_recipe(changed).models[-1] == "m"
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(changed)


def test_every_recipe_of_the_project_reads():
    from expunge.recipe import load_recipe

    recipes = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
    assert len(recipes) >= 20
    for path in recipes:
        if path.stem != "leaderboard":
            assert load_recipe(path).name == path.stem


def test_the_contest_entry_point_has_the_branches_of_the_recipe():
    from expunge.recipe import load_recipe

    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "zjuklab.yaml")
    assert recipe.branches == expunge.semeval.BRANCHES


@pytest.mark.parametrize("seconds", [600.0, 0.0])
def test_the_contest_entry_point_writes_a_model_in_time(tiny_folder, tmp_path, fields, seconds):
    from transformers import AutoModelForCausalLM

    from expunge.unlearn.branch import Branch

    for half in ("forget", "retain"):
        (tmp_path / half).mkdir()
        rows = [
            {"id": f"{half}{n}-qa0", "input": f"{half} {n}?", "output": "yes", "task": "Task1"}
            for n in range(6)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / half / "data.jsonl").write_text(text)
    branches = {n: Branch.model_validate(b) for n, b in fields["branches"].items()}
    out = tmp_path / "out"

    def unlearn():
        folders = tmp_path / "forget", tmp_path / "retain"
        options = {"budget_seconds": seconds, "branches": branches}
        expunge.semeval.unlearn(tiny_folder, out, *folders, **options)

    if not seconds:
        with pytest.raises(TrainingError, match="strong: the time allows no step of training"):
            unlearn()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["forget", "retain"]
        return
    unlearn()
    model = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(tiny_folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not (model.get_parameter(name) == start.get_parameter(name)).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forget", "out", "retain"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"terms": [{"half": "forget", "loss": "rmu", "layer": 7}]},
            "forget rmu reads layer 7, but the model has 2 blocks: 0 to 1",
        ),
        ({"lora": {"targets": ["qproj"]}}, "no linear layer called 'qproj'. Did you mean 'q_proj'"),
        (
            {"lora": {"layers": [0, 9]}},
            "lora.layers names block 9, and the model's linear layers lie in 0 to 1",
        ),
        (
            {"step": {"rule": "latent_adversarial", "layer": 2}},
            "step.layer: there is no block 2; the model has 2, 0 to 1",
        ),
        (
            {"training": "full", "mask": {"kind": "layers", "blocks": [5], "modules": ["mlp"]}},
            "5",
        ),
        (
            {
                "training": "full",
                "terms": [{"half": "forget", "loss": "rmu", "layer": 0}],
                "mask": {"kind": "last_blocks", "count": 1},
            },
            "the mask last_blocks lets move what lies behind block 0 alone",
        ),
        ({"blocks": 99}, "branch 'weak': blocks is 99, but the model has 2"),
        (
            {"blocks": 1, "terms": [{"half": "forget", "loss": "rmu", "layer": 1}]},
            "forget rmu reads layer 1, but the model has 1 blocks",
        ),
        (
            {"blocks": 1, "step": {"rule": "latent_adversarial", "layer": 1}},
            "step.layer: there is no block 1",
        ),
    ],
)
def test_what_the_model_lacks_is_said_before_anything_is_computed(fields, tmp_path, change, said):
    fields["branches"]["weak"] |= change
    fields["merges"] = {}
    with pytest.raises(expunge.errors.ExpungeError) as error:
        expunge.run(fields, out=tmp_path / "run")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run" / "stages").iterdir())


def test_a_text_may_hold_any_end_of_a_line(fields, tmp_path):
    """What is kept of an item, a line each, is read back though its text has line ends too."""
    rows = {"forget": "a\u2028b", "retain": "c\x85d"}
    for name, answer in rows.items():
        lines = [{"id": f"{name}-{n}", "input": f"Q{n} {name}?", "output": answer} for n in "12"]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    data = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in rows}
    alone = {"data": data, "tune": None, "branches": {}, "merges": {}}
    folder = expunge.run(fields | alone, tmp_path / "run")[42]
    assert set(json.loads((folder / "results.json").read_text())["models"]) == {"target"}
    (stage,) = (tmp_path / "run" / "stages").glob("evaluate-target-*")
    assert len(read_items(stage / "items.jsonl")) == 4


def test_a_run_folder_is_opened_by_the_recipe_it_holds(fields, tmp_path):
    """Also where its stages lie in a store that several runs share."""
    from expunge.pipeline import Pipeline
    from expunge.runner import run_recipes

    fields["evaluate"]["resamples"] = 5
    lone = {**fields, "branches": {}, "merges": {}}
    run_recipes([lone, {**lone, "name": "other"}], tmp_path / "both")
    before = sorted((tmp_path / "both" / "stages").iterdir())
    opened = Pipeline.of_run(tmp_path / "both" / "other")
    assert opened.recipe.name == "other"
    opened.report(42)
    assert sorted((tmp_path / "both" / "stages").iterdir()) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    from expunge.pipeline import Pipeline

    with pytest.raises(RunError, match="is no run folder"):
        Pipeline.of_run(tmp_path)
