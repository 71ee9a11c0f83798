"""Evaluation during training: when, what is kept, and that a killed run ends with the same."""

import copy
import json

import pytest
import torch
from torch.nn import Parameter

from expunge.config import parse_section
from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.errors import RecipeError, RunError, TrainingError
from expunge.scores import score
from expunge.unlearn.branch import train_branch
from expunge.unlearn.halves import Halves
from expunge.unlearn.section import Branch
from expunge.unlearn.trainer import Optimizer, finish, train
from expunge.unlearn.watch import EVALUATIONS, Watch, Watcher

OPTIMIZER = Optimizer(lr=0.1, weight_decay=0, clip=None, checkpoint_seconds=0)


def descend(folder, watch, *, steps=12, killed_at=None, lr=None):
    """Descend (w - 0.45)² from 0, watched by how far w is from 0.3, which it passes on its way.

    For a guard the retain half loses as w grows: nll.retain = 1 + w, nll.forget = 2 w.
    """
    folder.mkdir(exist_ok=True)
    weights = Parameter(torch.zeros(1))

    def gradient(number):
        if number == killed_at:
            raise KeyboardInterrupt
        loss = (weights - 0.45).square().sum()
        loss.backward()
        return {"loss": float(loss.detach())}

    def measure():
        w = float(weights.detach())
        return {"w": w, "nll.forget": 2 * w, "nll.retain": 1 + w}

    watcher = Watcher(watch, measure, {"w": weights}, folder)
    log = train(
        {"w": weights},
        gradient,
        steps=steps,
        config=OPTIMIZER.model_copy(update={"lr": lr or OPTIMIZER.lr}),
        seed=0,
        folder=folder,
        label="w",
        watcher=watcher,
    )
    if killed_at == steps:  # before what was trained has been written
        raise KeyboardInterrupt
    finish(folder)
    lines = (folder / EVALUATIONS).read_text().splitlines()
    return float(weights.detach()), [json.loads(line) for line in lines], log


def chosen(every, best, **more) -> Watch:
    return Watch(every=every, metric="w", best=best, read="evaluation", **more)


def test_it_is_evaluated_at_the_chosen_steps_and_the_last_weights_are_kept(tmp_path):
    last, found, log = descend(tmp_path / "a", Watch(every=5, at=(0, 1)))
    assert [one["step"] for one in found] == [0, 1, 5, 10]
    assert len(log) == 12 and last > found[-1]["numbers"]["w"] - 0.2


def test_the_best_weights_are_what_is_left(tmp_path):
    watch = chosen(1, 0.3)
    kept, found, log = descend(tmp_path / "a", watch)
    distances = [abs(one["numbers"]["w"] - 0.3) for one in found]
    best = distances.index(min(distances))
    assert 0 < best < len(log) - 1  # control: neither the first nor the last
    assert kept == pytest.approx(found[best]["numbers"]["w"])
    assert not list((tmp_path / "a").glob("best*"))


def test_the_start_is_never_the_best(tmp_path):
    kept, found, _ = descend(tmp_path / "a", chosen(1, "min", at=(0,)))
    assert found[0]["numbers"]["w"] == 0.0 < kept == pytest.approx(found[1]["numbers"]["w"])


@pytest.mark.parametrize(("best", "expected"), [("max", max), ("min", min)])
def test_the_best_may_be_the_greatest_or_the_least(tmp_path, best, expected):
    kept, found, _ = descend(tmp_path / "a", chosen(1, best))
    assert kept == pytest.approx(expected(one["numbers"]["w"] for one in found))


def test_patience_ends_training(tmp_path):
    watch = chosen(1, 0.3, patience=2)
    _, found, log = descend(tmp_path / "a", watch)
    distances = [abs(one["numbers"]["w"] - 0.3) for one in found]
    assert len(log) == len(found) == distances.index(min(distances)) + 3


@pytest.mark.parametrize("step", [*range(1, 7), 12])
def test_a_killed_run_ends_with_the_same_weights_and_evaluations(tmp_path, step):
    watch = chosen(2, 0.3)
    whole = descend(tmp_path / "whole", watch)
    with pytest.raises(KeyboardInterrupt):
        descend(tmp_path / "broken", watch, killed_at=step)
    assert descend(tmp_path / "broken", watch) == whole


def test_killed_between_a_step_and_its_evaluation_it_is_evaluated_then(tmp_path, monkeypatch):
    watch = chosen(2, 0.3)
    whole = descend(tmp_path / "whole", watch)
    real = Watcher.look

    def killed(self, step):
        if step == 4:
            raise KeyboardInterrupt
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Watcher, "look", killed)
        with pytest.raises(KeyboardInterrupt):
            descend(tmp_path / "broken", watch)
    assert descend(tmp_path / "broken", watch) == whole


def test_a_number_that_is_not_measured_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"nothing measured 'nll.forgot'.*Measured: nll.forget"):
        descend(tmp_path / "a", Watch(every=1, read="evaluation", metric="nll.forgot"))


def guarded(every=1, **limits) -> Watch:
    return Watch.model_validate({"every": every, "until": {"retain_growth": None, **limits}})


@pytest.mark.parametrize("limits", [{"retain_growth": 1.25}, {"retain_nll": 1.25}])
def test_the_guard_stops_when_too_much_is_lost_and_keeps_the_weights_before(tmp_path, limits):
    kept, found, log = descend(tmp_path / "a", guarded(**limits))
    values = [one["numbers"]["w"] for one in found]
    assert found[0]["step"] == 0  # what the growth is measured from
    assert values[-1] > 0.25 >= values[-2]
    assert kept == pytest.approx(values[-2])
    assert len(log) == found[-1]["step"] < 12
    free, _, log = descend(tmp_path / "b", Watch(every=1))
    assert len(log) == 12 and free > 0.25  # control: nothing else stops it


def test_the_guard_stops_when_the_forget_half_is_forgotten_and_keeps_those_weights(tmp_path):
    kept, found, log = descend(tmp_path / "a", guarded(forget_nll=0.3))
    values = [one["numbers"]["nll.forget"] for one in found]
    assert values[-1] >= 0.3 > values[-2]
    assert 2 * kept == pytest.approx(values[-1])
    assert len(log) == found[-1]["step"] < 12


def test_the_guard_looks_at_the_last_weights_too(tmp_path):
    kept, found, _ = descend(tmp_path / "a", guarded(5, retain_nll=1.35), steps=7)
    assert [one["step"] for one in found] == [0, 5, 7]
    assert found[-1]["numbers"]["w"] > 0.35 >= kept == pytest.approx(found[1]["numbers"]["w"])
    last, found, _ = descend(tmp_path / "b", guarded(5, retain_nll=9.0), steps=7)
    assert last == pytest.approx(found[-1]["numbers"]["w"])  # control: nothing was lost
    assert not list((tmp_path / "b").glob("best*"))


def test_the_best_weights_are_chosen_within_the_guard(tmp_path):
    watch = guarded(retain_nll=1.25).model_copy(update={"metric": "w", "best": "max"})
    kept, found, _ = descend(tmp_path / "a", watch)
    assert kept == pytest.approx(max(w for one in found if (w := one["numbers"]["w"]) <= 0.25))


def test_a_guard_that_is_broken_at_once_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match=r"watch.until: .* after step 4; evaluate earlier"):
        descend(tmp_path / "a", guarded(4, retain_nll=1.01))


@pytest.mark.parametrize("step", range(1, 4))
def test_a_killed_run_under_guard_ends_with_the_same(tmp_path, step):
    watch = guarded(2, retain_nll=1.3)
    whole = descend(tmp_path / "whole", watch)
    with pytest.raises(KeyboardInterrupt):
        descend(tmp_path / "broken", watch, killed_at=step)
    assert descend(tmp_path / "broken", watch) == whole


def test_a_guarded_ascent_keeps_the_rest_where_a_free_one_loses_it(tiny, tokenizer, tmp_path):
    words = ["ann", "bob", "cy", "dora"]
    items = [encode(Example(w, f"Who is {w}?", w[::-1]), tokenizer, max_length=64) for w in words]
    found = {}
    for name, until in (("free", None), ("guarded", {"retain_growth": 1.1})):
        config = Branch.model_validate(
            {
                "terms": [{"half": "forget", "loss": "gradient_ascent"}],
                "training": "full",
                "schedule": {"epochs": 25, "accumulation": 2},
                "optimizer": {"lr": 1e-2, "compute": "float32"},
                "watch": {"every": 1, "at": [0], "sample": 1, "until": until},
            }
        )
        folder = tmp_path / name
        folder.mkdir()
        halves = Halves(items[:2], items[2:], tmp_path / "cache", "key")
        options = {"seed": 1, "folder": folder, "base": "tiny", "label": name}
        model = copy.deepcopy(tiny)
        train_branch(model, tokenizer, halves, config, **options)
        lines = (folder / EVALUATIONS).read_text().splitlines()
        with torch.no_grad():
            nll = score(model, pack(items, "answer", "cpu")).nll
        found[name] = json.loads(lines[0])["numbers"], nll
    start, free = found["free"]
    _, kept = found["guarded"]
    assert kept[0] > start["nll.forget"]  # it has forgotten some
    assert kept[2] <= 1.1 * start["nll.retain"]  # the one item that the sample reads
    assert free[2] > 1.2 * start["nll.retain"]  # control


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"every": 1, "until": {"retain_growth": None}}, "until needs retain_growth"),
        ({}, "needs every or at"),
        ({"every": 1, "patience": 2}, "needs a metric"),
        ({"every": 1, "metric": "nll.forget", "best": "most"}, "max, min or a number"),
        ({"every": 1, "metric": "nll.forgot"}, "measures no 'nll.forgot'. Did you mean"),
        ({"at": [0], "metric": "nll.forget"}, "give every or a later at"),
        ({"at": [-3]}, "at counts steps from 1"),
    ],
)
def test_what_cannot_be_is_refused(fields, reason):
    with pytest.raises(RecipeError, match=reason):
        parse_section(fields, Watch, origin="watch")


@pytest.mark.parametrize("watch", [{"every": 7}, {"every": 1, "at": [7]}])
def test_what_a_branch_would_never_come_to_is_refused(watch):
    with pytest.raises(TrainingError, match="b: watch names step 7, and the branch has 6"):
        Watch.model_validate(watch).check(6, "b")
    Watch.model_validate(watch).check(7, "b")  # control
    Watch.model_validate({"every": 7, "until": {}}).check(6, "b")  # a guard looks at the end


def damaged(folder, name, content):
    """A run that ended but for the best weights, one of whose files was then damaged."""
    with pytest.raises(KeyboardInterrupt):
        descend(folder, chosen(2, 0.3), killed_at=11)
    assert (folder / name).exists()
    (folder / name).write_bytes(content)


def test_a_damaged_file_of_the_best_weights_says_what_to_remove(tmp_path):
    damaged(tmp_path / "a", "best.safetensors", b"torn")
    with pytest.raises(TrainingError, match=r"best.safetensors cannot be read .* remove"):
        descend(tmp_path / "a", chosen(2, 0.3))


def test_a_damaged_line_of_evaluations_is_named(tmp_path):
    damaged(tmp_path / "a", EVALUATIONS, b'{"step": 2, "num')
    with pytest.raises(RunError, match=f"{EVALUATIONS}, line 1 is not valid JSON"):
        descend(tmp_path / "a", chosen(2, 0.3))
