"""Preference and departure losses: values by hand, the limits of their papers, their bounds."""

import math

import pytest
import torch

from expunge.scores import Scores
from expunge.unlearn.departure import kl_away
from expunge.unlearn.forget import npo
from expunge.unlearn.objective import _where_weighed
from expunge.unlearn.preference import (
    PREFERENCE_LOSSES,
    dpo,
    flat_js,
    flat_kl,
    flat_pearson,
    flat_tv,
    kto,
)


def scores(*sequences: list[float], kl: list[float] | None = None) -> Scores:
    owner = torch.tensor([n for n, tokens in enumerate(sequences) for _ in tokens])
    logps = torch.tensor([v for tokens in sequences for v in tokens], dtype=torch.float64)
    divergence = None if kl is None else torch.tensor(kl, requires_grad=True)
    return Scores(logps.requires_grad_(), owner, len(sequences), divergence)


# Two pairs: win, lose, win, lose.
NOW = [[-1.0, -2.0], [-3.0], [-0.5], [-1.0, -1.0]]
REF = [[-2.0, -2.0], [-1.0], [-1.0], [-1.0, -4.0]]


def test_dpo_by_hand():
    # r_win - r_lose: (-3 + 4) - (-3 + 1) = 3, and (-0.5 + 1) - (-2 + 5) = -2.5
    expected = [math.log(1 + math.exp(-0.5 * margin)) for margin in (3.0, -2.5)]
    plain = dpo(scores(*NOW), scores(*REF), beta=0.5, factor=1.0)
    assert plain.tolist() == pytest.approx(expected)
    scaled = dpo(scores(*NOW), scores(*REF), beta=0.5)
    assert scaled.tolist() == pytest.approx([4 * value for value in expected])


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_dpo_starts_at_two_over_beta_times_log_two(beta):
    value = dpo(scores(*NOW), scores(*NOW), beta=beta).mean().item()
    assert value == pytest.approx(2 / beta * math.log(2))


def test_dpo_becomes_the_difference_of_log_probs_as_beta_goes_to_zero():
    now = scores(*NOW)
    (slope,) = torch.autograd.grad(dpo(now, scores(*REF), beta=1e-5).sum(), now.token_logps)
    plain = (now.logps[1::2] - now.logps[0::2]).sum()
    expected = torch.autograd.grad(plain, now.token_logps)[0]
    torch.testing.assert_close(slope, expected, atol=1e-4, rtol=0)


def test_dpo_leaves_a_settled_pair_alone():
    now = scores([-1.0], [-400.0], [-1.0], [-1.0])
    dpo(now, scores([-1.0], [-1.0], [-1.0], [-1.0])).sum().backward()
    assert now.token_logps.grad[:2].abs().max() < 1e-6
    assert now.token_logps.grad[2] == pytest.approx(-1)  # control: an open pair is pushed apart
    assert now.token_logps.grad[3] == pytest.approx(1)


def test_kto_by_hand():
    # r_win: -3 + 4 and -0.5 + 1, so z = 0.75; r_lose: -3 + 1 and -2 + 5
    expected = [4 * math.log(1 + math.exp(-(0.75 - 0.5 * r))) for r in (-2.0, 3.0)]
    assert kto(scores(*NOW), scores(*REF), beta=0.5).tolist() == pytest.approx([sum(expected) / 2])


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_pair_that_is_not_read_counts_with_a_loss_of_0_and_tells_nothing(name):
    """The first pair alone, beside another that no token of weighs anything: half its loss."""
    row = PREFERENCE_LOSSES[name]
    unread = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    both, alone, told = scores(*NOW), scores(*NOW[:2]), (scores(*REF), scores(*REF[:2]))
    weighed = both.weighted(unread)
    found = _where_weighed(row(weighed, told[0].weighted(unread)), weighed).mean()
    expected = row(alone, told[1]).mean() / 2
    assert found.item() == pytest.approx(expected.item())
    slopes = [
        torch.autograd.grad(v, s.token_logps)[0] for v, s in ((found, both), (expected, alone))
    ]
    torch.testing.assert_close(slopes[0][:3], slopes[1])
    assert not slopes[0][3:].any()
    whole = row(both, told[0]).mean()
    assert whole.item() != pytest.approx(found.item())  # control: read, it counts


def test_kto_is_npo_where_the_wanted_answers_have_not_moved_and_never_teaches_them():
    now, same = scores(REF[0], NOW[1], REF[2], NOW[3]), scores(*REF)
    alone = npo(scores(NOW[1], NOW[3]), scores(REF[1], REF[3]), beta=0.3)
    value = kto(now, same, beta=0.3)
    assert value.item() == pytest.approx(alone.mean().item())
    value.sum().backward()
    assert now.token_logps.grad[now.sequence % 2 == 0].abs().sum() == 0
    assert (now.token_logps.grad[now.sequence % 2 == 1] > 0).all()


FLAT = {
    # g(v) and the conjugate f*(u) of each divergence, as the paper's table has them
    flat_kl: (lambda v: v, lambda u: math.exp(u - 1)),
    flat_tv: (lambda v: math.tanh(v) / 2, lambda u: u),
    flat_js: (
        lambda v: math.log(2) - math.log(1 + math.exp(-v)),
        lambda u: -math.log(2 - math.exp(u)),
    ),
    flat_pearson: (lambda v: v, lambda u: u * u / 4 + u),
}


@pytest.mark.parametrize("loss", FLAT)
def test_flat_is_the_variational_form_of_its_divergence(loss):
    g, conjugate = FLAT[loss]
    likely = [sum(map(math.exp, tokens)) / len(tokens) for tokens in NOW]
    pairs = zip(likely[::2], likely[1::2], strict=True)
    expected = [-g(win) + conjugate(g(lose)) for win, lose in pairs]
    assert loss(scores(*NOW), None).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", FLAT)
def test_flat_lifts_the_wanted_answer_and_leaves_alone_what_is_unlikely(loss):
    now = scores([-1.0], [-0.1], [-1.0], [-40.0])
    loss(now, None).sum().backward()
    win, lose, _, gone = now.token_logps.grad.tolist()
    assert win < 0 < lose
    assert abs(gone) < 1e-12


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_order_of_pairs_does_not_matter_and_that_within_a_pair_does(name):
    loss = PREFERENCE_LOSSES[name]
    one = loss(scores(*NOW), scores(*REF)).mean().item()
    turned = loss(scores(*NOW[2:], *NOW[:2]), scores(*REF[2:], *REF[:2])).mean().item()
    assert turned == pytest.approx(one)
    swapped = loss(scores(*NOW[1::-1], *NOW[2:]), scores(*REF[1::-1], *REF[2:])).mean().item()
    assert swapped != pytest.approx(one)


def test_kl_away_stops_at_its_limit():
    now = scores([-1.0, -1.0], [-1.0], kl=[0.5, 3.0, 2.0])
    loss = kl_away(now, None, limit=2.5)
    assert loss.item() == pytest.approx((2.0 + 0.0 + 0.5) / 3)
    loss.sum().backward()
    assert now.token_kl.grad.tolist() == pytest.approx([-1 / 3, 0.0, -1 / 3])
