"""The rate of each step: phases, their warm-up and their ends."""

import pytest
import torch

from expunge.unlearn.optimizer import Optimizer, Span, Stepper


def test_the_only_step_of_a_phase_has_a_rate():
    """A rise from 0 would leave it at 0, and what the phase is for would not be trained."""
    weight = torch.nn.Parameter(torch.zeros(1))
    config = Optimizer(lr=0.5, warmup=0.1)
    rates = []
    stepper = Stepper({"weight": weight}, config, [Span(1), Span(4)])
    for number in range(5):
        stepper.begin(number, 5)
        rates.append(stepper.rate)
    assert rates == pytest.approx([0.5, 0.0, 0.5, 0.5 * 2 / 3, 0.5 / 3])
