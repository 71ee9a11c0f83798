"""Evaluation during training: when, what is kept, and that a killed run ends with the same."""

import json

import pytest
import torch
from torch.nn import Parameter

from expunge.config import parse_section
from expunge.errors import RecipeError, TrainingError
from expunge.unlearn.trainer import Optimizer, train
from expunge.unlearn.watch import EVALUATIONS, Watch, Watcher

OPTIMIZER = Optimizer(lr=0.1, weight_decay=0, clip=None, checkpoint_seconds=0)


def descend(folder, watch, *, steps=12, killed_at=None):
    """Descend (w - 0.45)² from 0, watched by how far w is from 0.3, which it passes on its way."""
    folder.mkdir(exist_ok=True)
    weights = Parameter(torch.zeros(1))

    def gradient(number):
        if number == killed_at:
            raise KeyboardInterrupt
        loss = (weights - 0.45).square().sum()
        loss.backward()
        return {"loss": float(loss.detach())}

    def measure():
        return {"w": float(weights.detach()), "nll.forget": 1.0}

    watcher = Watcher(watch, measure, {"w": weights}, folder)
    log = train(
        {"w": weights},
        gradient,
        steps=steps,
        config=OPTIMIZER,
        seed=0,
        folder=folder,
        label="w",
        watcher=watcher,
    )
    lines = (folder / EVALUATIONS).read_text().splitlines()
    return float(weights.detach()), [json.loads(line) for line in lines], log


def test_it_is_evaluated_at_the_chosen_steps_and_the_last_weights_are_kept(tmp_path):
    last, found, log = descend(tmp_path / "a", Watch(every=5, at=(0, 1)))
    assert [one["step"] for one in found] == [0, 1, 5, 10]
    assert len(log) == 12 and last > found[-1]["numbers"]["w"] - 0.2


def test_the_best_weights_are_what_is_left(tmp_path):
    watch = Watch(every=1, metric="w", best=0.3)
    kept, found, log = descend(tmp_path / "a", watch)
    distances = [abs(one["numbers"]["w"] - 0.3) for one in found]
    best = distances.index(min(distances))
    assert 0 < best < len(log) - 1  # control: neither the first nor the last
    assert kept == pytest.approx(found[best]["numbers"]["w"])
    assert not list((tmp_path / "a").glob("best*"))


def test_the_start_is_never_the_best(tmp_path):
    kept, found, _ = descend(tmp_path / "a", Watch(every=1, at=(0,), metric="w", best="min"))
    assert found[0]["numbers"]["w"] == 0.0 < kept == pytest.approx(found[1]["numbers"]["w"])


@pytest.mark.parametrize(("best", "expected"), [("max", max), ("min", min)])
def test_the_best_may_be_the_greatest_or_the_least(tmp_path, best, expected):
    kept, found, _ = descend(tmp_path / "a", Watch(every=1, metric="w", best=best))
    assert kept == pytest.approx(expected(one["numbers"]["w"] for one in found))


def test_patience_ends_training(tmp_path):
    watch = Watch(every=1, metric="w", best=0.3, patience=2)
    _, found, log = descend(tmp_path / "a", watch)
    distances = [abs(one["numbers"]["w"] - 0.3) for one in found]
    assert len(log) == len(found) == distances.index(min(distances)) + 3


@pytest.mark.parametrize("step", range(1, 7))
def test_a_killed_run_ends_with_the_same_weights_and_evaluations(tmp_path, step):
    watch = Watch(every=2, metric="w", best=0.3)
    whole = descend(tmp_path / "whole", watch)
    with pytest.raises(KeyboardInterrupt):
        descend(tmp_path / "broken", watch, killed_at=step)
    assert descend(tmp_path / "broken", watch) == whole


def test_killed_between_a_step_and_its_evaluation_it_is_evaluated_then(tmp_path, monkeypatch):
    watch = Watch(every=2, metric="w", best=0.3)
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
        descend(tmp_path / "a", Watch(every=1, metric="nll.forgot"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "needs every or at"),
        ({"every": 1, "patience": 2}, "needs a metric"),
        ({"every": 1, "metric": "x", "best": "most"}, "max, min or a number"),
    ],
)
def test_what_cannot_be_is_refused(fields, reason):
    with pytest.raises(RecipeError, match=reason):
        parse_section(fields, Watch, origin="watch")
