"""Losses against values worked by hand, the limits of their papers, and the laws of the table."""

import math

import pytest
import torch

from expunge.scores import Scores
from expunge.unlearn.forget import (
    FORGET_LOSSES,
    gradient_ascent,
    hinge,
    hinge_token,
    npo,
    npo_batch,
    npo_token,
)
from expunge.unlearn.retain import RETAIN_LOSSES, kl, nll, nll_sequence


def scores(*sequences: list[float], kl: list[float] | None = None) -> Scores:
    """Scores of the given per-token log-probs, with a gradient."""
    owner = [n for n, tokens in enumerate(sequences) for _ in tokens]
    logps = torch.tensor([v for tokens in sequences for v in tokens], requires_grad=True)
    return Scores(
        logps, torch.tensor(owner), len(sequences), None if kl is None else torch.tensor(kl)
    )


A = [[-1.0, -2.0], [-3.0]]
REF = [[-0.5, -0.5], [-3.0]]


def test_values_worked_by_hand():
    now, ref = scores(*A), scores(*REF)
    assert gradient_ascent(now, None).tolist() == [-1.5, -3.0]
    # r = -3 - -1 = -2 and -3 - -3 = 0; L = -(2/β) log σ(-β r)
    expected = [-(2 / 0.5) * math.log(1 / (1 + math.exp(0.5 * r))) for r in (-2.0, 0.0)]
    assert npo(now, ref, beta=0.5).tolist() == pytest.approx(expected)
    # one number: the mean of the three tokens' ratios, (-0.5 - 1.5 + 0) / 3
    batch = -(2 / 0.5) * math.log(1 / (1 + math.exp(0.5 * -2 / 3)))
    assert npo_batch(now, ref, beta=0.5).tolist() == pytest.approx([batch])
    token = [-(2 / 0.5) * math.log(1 / (1 + math.exp(0.5 * r))) for r in (-0.5, -1.5, 0.0)]
    both = npo_token(now, ref, beta=0.5).tolist()
    assert both == pytest.approx([(token[0] + token[1]) / 2, token[2]])
    assert hinge(now, None, target=2.0).tolist() == [0.25, 0.0]
    assert hinge_token(now, None, target=2.0).tolist() == [0.5, 0.0]  # (1² + 0²)/2
    assert nll(now, None).tolist() == [2.0]
    assert nll_sequence(now, None).tolist() == [1.5, 3.0]
    assert kl(scores(*A, kl=[0.3, 0.6, 0.0]), None).tolist() == pytest.approx([0.3])


@pytest.mark.parametrize("reduction", [npo, npo_batch, npo_token])
def test_npo_becomes_gradient_ascent_as_beta_goes_to_zero(reduction):
    """∂L/∂log π tends to that of the plain log-prob, whatever the reference."""
    now, ref = scores(*A), scores(*REF)
    (slope,) = torch.autograd.grad(reduction(now, ref, beta=1e-4).sum(), now.token_logps)
    plain = {
        npo: now.logps.sum(),
        npo_batch: now.token_logps.mean(),
        npo_token: (now.logps / now.lengths).sum(),
    }[reduction]
    torch.testing.assert_close(
        slope, torch.autograd.grad(plain, now.token_logps)[0], atol=1e-3, rtol=1e-3
    )


def test_npo_leaves_a_forgotten_answer_alone():
    now = scores([-5.0], [-500.0])
    npo(now, scores([-5.0], [-5.0])).sum().backward()
    known, forgotten = now.token_logps.grad
    assert known > 0.9  # control: an answer it still knows does get pushed
    assert forgotten < 1e-6


@pytest.mark.parametrize("name", FORGET_LOSSES)
def test_descending_a_forget_loss_lowers_the_answer(name):
    now = scores([-0.1, -0.2], [-0.3])
    FORGET_LOSSES[name](now, scores([-0.1, -0.2], [-0.3])).mean().backward()
    assert (now.token_logps.grad > 0).all()


@pytest.mark.parametrize("name", FORGET_LOSSES)
def test_bounded_losses_cannot_fall_without_end(name):
    low = scores([-1e4, -1e4])
    value = FORGET_LOSSES[name](low, scores([-0.1, -0.2])).mean().item()
    assert (value >= 0) == FORGET_LOSSES[name].bounded


@pytest.mark.parametrize("table", [FORGET_LOSSES, RETAIN_LOSSES], ids=["forget", "retain"])
def test_the_order_of_sequences_does_not_matter(table):
    generator = torch.Generator().manual_seed(0)
    now = [torch.rand(n, generator=generator).neg().tolist() for n in (3, 1, 2)]
    ref = [torch.rand(n, generator=generator).neg().tolist() for n in (3, 1, 2)]
    divergence = torch.rand(6, generator=generator).tolist()
    parts = [divergence[:3], divergence[3:4], divergence[4:]]
    for name, row in table.items():
        one = row(scores(*now, kl=divergence), scores(*ref)).mean()
        turned = row(
            scores(*now[::-1], kl=[v for part in parts[::-1] for v in part]), scores(*ref[::-1])
        ).mean()
        torch.testing.assert_close(one, turned, msg=name)


def test_a_token_weighs_by_its_answers_length_only_where_it_says_so():
    long_and_short = scores([-1.0] * 9, [-3.0])
    assert float(nll(long_and_short, None).detach()) == pytest.approx(1.2)
    assert float(nll_sequence(long_and_short, None).detach().mean()) == pytest.approx(2.0)
