"""The loop's clock, rate and log, on one weight."""

import math

import pytest
import torch
from torch.nn import Parameter

from expunge.errors import TrainingError
from expunge.unlearn import trainer
from expunge.unlearn.trainer import Optimizer, train


class Clock:
    """A time that goes on only where it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(trainer, "time", clock)
    return clock


def run(tmp_path, gradient=None, **options):
    weight = Parameter(torch.ones(1))

    def constant(number):
        weight.grad = torch.ones(1)
        return {"loss": 1.0}

    given = {"steps": 10, "config": Optimizer(lr=0.1, warmup=0.2), "seed": 1, **options}
    step = gradient(weight) if gradient else constant
    return train({"w": weight}, step, folder=tmp_path, label="b", **given)


def test_the_rate_rises_over_the_warmup_and_falls_to_zero(tmp_path):
    rates = [record["lr"] for record in run(tmp_path)]
    assert rates[:3] == pytest.approx([0, 0.05, 0.1])
    assert rates[2:] == pytest.approx([0.1 * (10 - n) / 8 for n in range(2, 10)])


def test_a_deadline_shortens_the_schedule_and_the_rate_still_falls(tmp_path, clock):
    def slow(weight):
        def step(number):
            weight.grad = torch.ones(1)
            clock.now += 2.0
            return {"loss": 1.0}

        return step

    log = run(tmp_path, slow, steps=1000, deadline=clock.now + 21)
    assert len(log) == 10  # ten steps of two seconds fit, an eleventh does not
    assert log[-1]["lr"] < 0.02


def test_no_time_at_all_is_an_error_and_not_an_untrained_branch(tmp_path, clock):
    with pytest.raises(TrainingError, match="b: the time allows no step of training"):
        run(tmp_path, deadline=clock.now)


def test_training_stops_early_where_it_is_told_to(tmp_path):
    assert len(run(tmp_path, stop=lambda log: len(log) == 4)) == 4


def test_a_gradient_that_is_not_finite_is_an_error_before_the_weights_move(tmp_path):
    weights = []

    def broken(weight):
        weights.append(weight)

        def step(number):
            weight.grad = torch.tensor([math.nan if number == 3 else 1.0])
            return {"loss": 1.0}

        return step

    with pytest.raises(TrainingError, match=r"b, step 4 of 10: the gradient is not finite"):
        run(tmp_path, broken)
    assert torch.isfinite(weights[0]).all()


def test_plain_gradient_descent_goes_the_rate_along_the_gradient(tmp_path):
    weights = []

    def constant(weight):
        weights.append(weight)

        def step(number):
            weight.grad = torch.tensor([2.0])
            return {"loss": 1.0}

        return step

    plain = Optimizer(kind="sgd", lr=0.1, clip=None, weight_decay=0)
    rates = [record["lr"] for record in run(tmp_path, constant, config=plain)]
    assert float(weights[0].detach()) == pytest.approx(1 - 2 * sum(rates))


def carrying(state, *, broken_at=None):
    """A gradient that counts its steps in `state`, and sets the rate by them."""

    def made(weight):
        def step(number):
            state["rate"] = 0.1 * (number + 1)
            weight.grad = torch.full((1,), math.nan if number == broken_at else 1.0)
            return {"loss": 1.0}

        return step

    return made


def test_a_rate_that_the_gradient_carries_is_the_step_s_own(tmp_path):
    state = {"rate": 9.0}
    log = run(tmp_path, carrying(state), steps=3, state=state)
    assert [record["lr"] for record in log] == pytest.approx([0.1, 0.2, 0.3])


def test_a_checkpoint_holds_what_was_carried_into_the_step_that_failed(tmp_path):
    state = {"rate": 9.0}
    with pytest.raises(TrainingError, match="step 4 of 10"):
        run(tmp_path, carrying(state, broken_at=3), state=state)
    taken_up = {"rate": 9.0}

    def stop(log):
        return len(log) == 3

    run(tmp_path, carrying(taken_up), state=taken_up, stop=stop)
    assert taken_up == {"rate": 0.1 * 3}


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "\0\0\0\0", None])
def test_a_log_that_a_crash_tore_is_refused_with_what_to_delete(tmp_path, torn):
    def stops(weight):
        def step(number):
            if number == 3:
                raise KeyboardInterrupt
            weight.grad = torch.ones(1)
            return {"loss": 1.0}

        return step

    every_step = Optimizer(lr=0.1, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stops, config=every_step)
    log = tmp_path / trainer.LOG
    first, *_ = log.read_text().splitlines()
    log.write_text(first + "\n" + torn) if torn else log.unlink()
    ends = int(torn is not None)
    with pytest.raises(TrainingError, match=f"ends at step {ends}, .* of step 3; delete the check"):
        run(tmp_path, config=every_step)
