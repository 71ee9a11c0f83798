"""Adapters on the way: after which steps, that they are whole, and what a killed run leaves."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file

from expunge import lora
from expunge.config import parse_section
from expunge.data.batches import TokenSequence
from expunge.errors import RecipeError, TrainingError
from expunge.lora import adapters_of, load_adapter
from expunge.unlearn import trainer
from expunge.unlearn.branch import train_branch
from expunge.unlearn.halves import Halves
from expunge.unlearn.section import Branch
from expunge.unlearn.snapshots import Keeper, snapshots

WEIGHTS = "adapter_model.safetensors"


def items(name: str, count: int) -> list[TokenSequence]:
    return [
        TokenSequence(f"{name}{n}", tuple(b"Who is %d?" % n) + tuple(name.encode() * 4), 9)
        for n in range(count)
    ]


def branch(keep, **changes) -> Branch:
    """Three epochs of three steps."""
    return Branch.model_validate(
        {
            "terms": [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}],
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
            "schedule": {"epochs": 3, "accumulation": 2},
            "optimizer": {"lr": 1e-2, "compute": "float32", "checkpoint_seconds": 1000},
            "keep": keep,
            **changes,
        }
    )


@pytest.fixture
def run(tiny, tokenizer, tmp_path):
    def train(name, config):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        model = copy.deepcopy(tiny)
        halves = Halves(items("f", 5), items("r", 3), tmp_path / "cache", "key")
        given = {"seed": 1, "folder": folder, "base": "tiny", "label": "b"}
        train_branch(model, tokenizer, halves, config, **given)
        return folder

    return train


def contents(folder) -> dict[int, bytes]:
    return {step: (path / WEIGHTS).read_bytes() for step, path in snapshots(folder).items()}


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        ({"every": 4}, [4, 8]),
        ({"at": [7, 2]}, [2, 7]),
        ({"epochs": True}, [3, 6, 9]),
        ({"every": 4, "at": [4, 5], "epochs": True}, [3, 4, 5, 6, 8, 9]),
    ],
)
def test_one_is_kept_after_each_chosen_step(run, keep, steps):
    folder = run("b", branch(keep))
    assert list(snapshots(folder)) == steps
    names = {path.name for path in (folder / "snapshots").iterdir()}
    assert names == {f"step-{step:05d}" for step in steps}
    assert len(set(contents(folder).values())) == len(steps)


def test_the_last_is_the_adapter_and_none_is_kept_unless_asked(run):
    kept, plain = run("kept", branch({"every": 1})), run("plain", branch(None))
    assert snapshots(plain) == {}
    assert sorted(p.name for p in plain.iterdir()) == ["adapter", "log.jsonl"]
    for name in (WEIGHTS, "adapter_config.json"):
        last = (snapshots(kept)[9] / name).read_bytes()
        assert last == (kept / "adapter" / name).read_bytes()
        assert last == (plain / "adapter" / name).read_bytes()  # keeping changes nothing


def test_a_snapshot_holds_the_weights_after_its_step(run, tiny, monkeypatch):
    seen = {}
    real = trainer.Stepper.step

    def noted(self, rate=None):
        real(self, rate)
        seen[len(seen) + 1] = [p.detach().clone() for p in self.torch.param_groups[0]["params"]]

    monkeypatch.setattr(trainer.Stepper, "step", noted)
    folder = run("b", branch({"at": [2, 5]}))
    for step, path in snapshots(folder).items():
        model = copy.deepcopy(tiny)
        load_adapter(model, path)
        factors = [p for layer in adapters_of(model).values() for p in (layer.lora_A, layer.lora_B)]
        assert len(factors) == len(seen[step]) == 28
        assert all(any(torch.equal(p, q) for q in seen[step]) for p in factors)


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_killed_run_ends_with_the_same_and_rewrites_none(run, monkeypatch, stop):
    config = branch({"every": 2, "at": [5]})
    whole = run("whole", config)
    real, calls = trainer._clip, iter(range(100))

    def killed(parameters, limit):
        if next(calls) == stop:
            raise KeyboardInterrupt
        return real(parameters, limit)

    monkeypatch.setattr(trainer, "_clip", killed)
    with pytest.raises(KeyboardInterrupt):
        run("broken", config)
    broken = whole.with_name("broken")
    written = {path: path.stat().st_mtime_ns for path in snapshots(broken).values()}
    assert len(written) == sum(step <= stop for step in (2, 4, 5, 6, 8))
    run("broken", config)
    assert contents(broken) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (broken / "adapter" / WEIGHTS).read_bytes() == (whole / "adapter" / WEIGHTS).read_bytes()


def test_killed_between_a_step_and_its_snapshot_it_is_kept_then(run, monkeypatch):
    config = branch({"every": 2})
    whole = run("whole", config)

    def killed(self, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "take", killed)
        with pytest.raises(KeyboardInterrupt):
            run("broken", config)
    broken = whole.with_name("broken")
    assert snapshots(broken) == {}  # control
    run("broken", config)
    assert contents(broken) == contents(whole)


def test_one_that_is_cut_off_is_not_listed(run, monkeypatch):
    config = branch({"every": 4})
    real = lora.write_adapter.__globals__["save_file"]

    def killed(tensors, path, metadata):
        real(tensors, path, metadata)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(lora.write_adapter.__globals__, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            run("b", config)
    folder = run("b", config)
    assert list(snapshots(folder)) == [4, 8]
    (folder / "snapshots" / ".step-00006.1a2b.tmp").mkdir()
    assert list(snapshots(folder)) == [4, 8]


def test_training_that_begins_anew_keeps_none_of_a_later_step(run):
    config = branch({"every": 4})
    folder = run("b", config)
    stale = snapshots(folder)[8]
    (stale / WEIGHTS).write_bytes(b"of another run")
    before = contents(folder)
    shutil.rmtree(folder / "adapter")
    run("b", config)  # its checkpoint is gone
    assert contents(folder)[4] == before[4]
    assert load_file(stale / WEIGHTS)


def test_best_weights_and_an_early_stop_leave_the_snapshots_of_the_steps_done(run):
    watch = {"every": 1, "metric": "nll.forget", "best": "min", "patience": 2}
    folder = run("best", branch({"every": 1}, watch=watch))
    steps = (folder / trainer.LOG).read_text().count("\n")
    assert 2 < steps < 9  # control: it stopped early
    assert list(snapshots(folder)) == list(range(1, steps + 1))
    final = (folder / "adapter" / WEIGHTS).read_bytes()
    assert final == contents(folder)[steps - 2]


@pytest.mark.parametrize(
    ("keep", "changes", "message"),
    [
        ({}, {}, "keep needs every, at or epochs"),
        ({"at": [0]}, {}, "at counts steps from 1"),
        ({"every": -1}, {}, "keep.every: Input should be greater than or equal to 0"),
        ({"epochs": True}, {"training": "full"}, "each snapshot would be a whole model"),
    ],
)
def test_what_cannot_be_kept_is_refused_when_the_recipe_is_read(keep, changes, message):
    terms = [{"half": "forget", "loss": "npo"}]
    with pytest.raises(RecipeError, match=message):
        parse_section({"terms": terms, "keep": keep, **changes}, Branch, origin="r.yaml")


@pytest.mark.parametrize("keep", [{"at": [3, 10]}, {"every": 10}])
def test_a_step_that_never_comes_is_refused_before_the_first(run, tmp_path, keep):
    with pytest.raises(TrainingError, match="keep names step 10, and the branch has 9"):
        run("b", branch(keep))
    assert not (tmp_path / "b" / trainer.LOG).exists()
    assert list(snapshots(run("c", branch({"at": [9]})))) == [9]  # control
