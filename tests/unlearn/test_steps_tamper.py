"""Tamper resistance: the simulated attack, and the gradients that it gathers."""

import math

import pytest
import torch
from torch.nn import Parameter

from expunge.errors import RecipeError
from expunge.unlearn.steps import STEP_RULES, tamper

A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
START = torch.tensor([1.0, 2.0], dtype=torch.float64)
CENTRE = torch.tensor([-1.0, 0.5], dtype=torch.float64)
RETAIN = torch.tensor([7.0, -3.0], dtype=torch.float64)


@pytest.fixture
def made(toy, quadratic, linear):
    """M_F = ½ (w-c)ᵀ A (w-c), ascended; a linear retain loss."""
    return toy(START, quadratic(A, CENTRE, -1.0), linear(RETAIN))


def test_one_step_of_the_attack_worked_by_hand(made):
    """The first step of Adam goes the rate along the sign of the gradient."""
    found, record = made.gradient("tar", attack_steps=1, attack_rates=(0.1,))
    moved = START - 0.1 * (A @ (START - CENTRE)).sign()
    torch.testing.assert_close(found, -A @ (moved - CENTRE) + RETAIN, rtol=1e-6, atol=1e-6)
    assert record["attack.lr"] == 0.1
    assert record["forget"] > made.losses("forget")["forget"]  # -M_F is higher: it came back


def test_the_gradients_along_the_attack_are_summed_into_the_start(made):
    found, _ = made.gradient("tar", attack_steps=3, attack_rates=(0.1,), decay=0.5)
    weights = Parameter(START.clone())
    adam = torch.optim.AdamW([weights], lr=0.1, weight_decay=0)
    parts, shares = [], [math.exp(0.5 * (i - 3)) for i in (1, 2, 3)]
    for _ in range(3):
        weights.grad = A @ (weights.detach() - CENTRE)
        adam.step()
        parts.append(-A @ (weights.detach() - CENTRE))
    total = sum(s * p for s, p in zip(shares, parts, strict=True)) / sum(shares)
    torch.testing.assert_close(found, total + RETAIN)


def test_against_an_attacker_that_does_not_move_it_is_joint(made):
    joint, _ = made.gradient("joint")
    torch.testing.assert_close(made.gradient("tar", attack_rates=(1e-12,))[0], joint)
    assert not torch.allclose(made.gradient("tar", attack_rates=(0.1,))[0], joint)  # control


def test_the_rate_is_drawn_anew_each_step(made):
    drawn = set()
    for number in range(20):
        made.seed = f"1:{number}"
        drawn.add(made.gradient("tar", attack_steps=1, attack_rates=(0.1, 0.2))[1]["attack.lr"])
    assert drawn == {0.1, 0.2}


def test_a_large_model_is_refused_unless_it_is_forced(tiny, monkeypatch):
    section = STEP_RULES["tar"].options
    section().check_model(tiny)  # control
    monkeypatch.setattr(tamper, "LARGEST", 10_000)
    with pytest.raises(RecipeError, match=r"for tiny models, .* step.force: true"):
        section().check_model(tiny)
    section(force=True).check_model(tiny)
    with pytest.raises(ValueError, match="less than or equal to 8"):
        section(attack_steps=9)


def test_an_attacker_that_unlearns_is_refused():
    section = STEP_RULES["tar"].options
    for rate in (-1e-4, 0.0):
        with pytest.raises(ValueError, match="greater than 0"):
            section(attack_rates=(1e-4, rate))
