"""Losses against values worked by hand, the limits of their papers, and the laws of the table."""

import math
import re

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
    satimp,
    simnpo,
    wga,
    wtnpo,
)
from expunge.unlearn.levels import LEVELS, STANDARDIZED
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.retain import RETAIN_LOSSES, kl, nll, nll_sequence
from expunge.unlearn.sets import SETS

BY_SCORES, RETAIN_BY_SCORES = (
    {name: row for name, row in table.items() if row.reads == "scores"}
    for table in (FORGET_LOSSES, RETAIN_LOSSES)
)


def scores(*sequences: list[float], kl: list[float] | None = None) -> Scores:
    """Scores of the given per-token log-probs, with a gradient, and a level of 3 nats a token."""
    owner = [n for n, tokens in enumerate(sequences) for _ in tokens]
    logps = torch.tensor([v for tokens in sequences for v in tokens], requires_grad=True)
    divergence = None if kl is None else torch.tensor(kl)
    more = {LEVELS: torch.full((len(logps), 2), -3.0), STANDARDIZED: logps}
    return Scores(logps, torch.tensor(owner), len(sequences), divergence, None, more)


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
    # NLL 1.5 and 3; -(2/β) log σ(β (NLL - γ))
    expected = [-(2 / 0.5) * math.log(1 / (1 + math.exp(-0.5 * (m - 1)))) for m in (1.5, 3.0)]
    assert simnpo(now, None, beta=0.5, gamma=1.0).tolist() == pytest.approx(expected)
    p, q = [math.exp(-v) for v in (1, 2, 3)], [math.exp(-v) for v in (0.5, 0.5, 3)]
    ascent = sum(-(v**2) * n for v, n in zip(p, (1, 2, 3), strict=True)) / 3
    assert wga(now, None, beta=2.0).tolist() == pytest.approx([ascent])
    pushes = [2 * a**3.0 / (a**2 + b**2) for a, b in zip(p, q, strict=True)]
    ascent = sum(-w * n for w, n in zip(pushes, (1, 2, 3), strict=True)) / 3
    assert wtnpo(now, ref, beta=2.0, alpha=1.0).tolist() == pytest.approx([ascent])
    ascent = sum(-(v**2) * (1 - v) ** 0.5 * n for v, n in zip(p, (1, 2, 3), strict=True)) / 3
    assert satimp(now, None, beta1=2.0, beta2=0.5).tolist() == pytest.approx([ascent])
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


@pytest.mark.parametrize("name", BY_SCORES)
def test_descending_a_forget_loss_lowers_the_answer(name):
    now = scores([-0.1, -0.2], [-0.3])
    BY_SCORES[name](now, scores([-0.1, -0.2], [-0.3])).mean().backward()
    assert (now.token_logps.grad > 0).all()


@pytest.mark.parametrize("name", BY_SCORES)
def test_bounded_losses_cannot_fall_without_end(name):
    low = scores([-1e4, -1e4])
    value = BY_SCORES[name](low, scores([-0.1, -0.2])).mean().item()
    assert (value >= 0) == BY_SCORES[name].bounded


@pytest.mark.parametrize("table", [BY_SCORES, RETAIN_BY_SCORES], ids=["forget", "retain"])
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


def slope(loss, now, *others, **options):
    """∂L/∂log π of each token, of the micro-batch's loss."""
    return torch.autograd.grad(loss(now, *others, **options).mean(), now.token_logps)[0]


def test_simnpo_without_a_margin_is_npo_on_mean_nlls_with_a_sure_reference():
    one, sure = scores([-1.5], [-3.0]), scores([0.0], [0.0])
    torch.testing.assert_close(simnpo(scores(*A), None, beta=0.7), npo(one, sure, beta=0.7))


def test_simnpo_stops_well_above_its_margin_and_not_below():
    now = scores([-1.0], [-9.0])
    low, high = slope(simnpo, now, None, beta=2.5, gamma=4.0)
    assert low > 0.9  # control: half of the two sequences' 2σ(-β (1 - 4))
    assert high < 1e-4


@pytest.mark.parametrize(
    ("loss", "options"),
    [(wga, {"beta": 0.0}), (satimp, {"beta1": 0.0, "beta2": 0.0})],
    ids=["wga", "satimp"],
)
def test_weighted_ascent_without_exponents_is_ascent_on_all_tokens(loss, options):
    now = scores(*A)
    assert loss(now, None, **options).tolist() == pytest.approx([-2.0])
    torch.testing.assert_close(slope(loss, now, None, **options), torch.full((3,), 1 / 3))


def test_npo_token_has_the_slope_of_the_fixed_weights_of_tnpo():
    now, ref = scores([-1.0, -2.0, -0.1]), scores([-0.5, -0.5, -3.0])
    p, q = now.token_logps.detach().exp() ** 4, ref.token_logps.detach().exp() ** 4
    torch.testing.assert_close(slope(npo_token, now, ref, beta=4.0), 2 * p / (p + q) / 3)
    torch.testing.assert_close(
        slope(wtnpo, now, ref, beta=4.0, alpha=0.0), slope(npo_token, now, ref, beta=4.0)
    )


def test_satimp_leaves_sure_and_forgotten_tokens_alone():
    sure, known, forgotten = slope(satimp, scores([-1e-4, -0.2, -9.0]), None)
    assert known > 0.02  # control
    assert max(sure, forgotten) < 1e-4


@pytest.mark.parametrize("table", [BY_SCORES, RETAIN_BY_SCORES], ids=["forget", "retain"])
def test_weights_of_1_change_nothing_and_of_0_take_tokens_away(table):
    generator = torch.Generator().manual_seed(0)
    now, ref = (
        scores(*[torch.rand(n, generator=generator).neg().tolist() for n in (3, 2)], kl=[0.1] * 5)
        for _ in range(2)
    )
    some = torch.tensor([True, False, True, False, True])
    for name, row in table.items():
        ones = torch.ones(5)
        same = row(now.weighted(ones), ref.weighted(ones))
        torch.testing.assert_close(same, row(now, ref), msg=name)
        fewer = row(now.weighted(some.float()), ref.weighted(some.float()))
        torch.testing.assert_close(fewer, row(now.where(some), ref.where(some)), msg=name)


def test_a_sequence_without_weight_has_no_loss_and_no_slope():
    for name, row in BY_SCORES.items():
        now, ref = scores([-1.0, -2.0], [-2.5]), scores([-0.5, -0.5], [-2.5])
        weights = {"weights.0": torch.tensor([0.0, 0.0, 1.0])}
        now.more.update(weights)
        objective = Objective((Term(half="forget", loss=name),))
        loss, _ = objective.loss("forget", now, ref, torch.ones(3).bool())
        (grad,) = torch.autograd.grad(loss, now.token_logps)
        assert torch.isfinite(loss), name
        assert grad.tolist()[:2] == [0.0, 0.0], name
        assert grad[2] > 0, name  # control
        alone = row(scores([-2.5]), scores([-2.5])).mean()
        share = 0.5 if row.mean_over == "sequences" else 1.0
        assert float(loss.detach()) == pytest.approx(share * float(alone.detach()), rel=1e-6), name


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"loss": "rmu"}, "rmu needs layer, the number of a block"),
        ({"loss": "npo", "layer": 1}, "npo takes no layer"),
        ({"loss": "rmu", "layer": -1}, "greater than or equal to 0"),
        ({"loss": "simnpo", "options": {"delta": 1}}, "Its options: beta, gamma"),
        ({"loss": "npo", "options": {"beta": 0}}, "npo needs beta above 0 (got 0)"),
        ({"loss": "simnpo", "options": {"beta": -0.1}}, "simnpo needs beta above 0 (got -0.1)"),
        ({"loss": "npo", "weighting": {"kind": "spans"}}, "spans needs patterns, pii or both"),
        ({"loss": "npo", "weighting": {"kind": "entities", "pii": ["ssn"]}}, "takes no patterns"),
        ({"loss": "npo", "weighting": {"kind": "suprisal"}}, "Did you mean 'surprisal'"),
        ({"loss": "npo", "weighting": {"kind": "spans", "pii": ["mail"]}}, "Did you mean 'email'"),
        (
            {"loss": "npo", "weighting": {"kind": "spans", "patterns": ["("]}},
            "is not a regular expression",
        ),
    ],
)
def test_a_term_that_cannot_be_is_refused_when_it_is_read(fields, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Term.model_validate({"half": "forget", **fields})


ROWS = {(half, name): row for half in SETS for name, row in SETS[half].losses.items()}
EITHER_SIGN = {"gamma", "margin", "coefficient", "scale", "seed"}
"""A margin may lie on either side, and so may the point that RMU drives states to."""


@pytest.mark.parametrize(("half", "name"), [place for place, row in ROWS.items() if row.options])
def test_an_option_that_breaks_a_loss_or_turns_it_around_is_refused(half, name):
    row = ROWS[half, name]
    assert {*row.options} - EITHER_SIGN == {*row.positive, *row.nonnegative}

    def term(option: str, value: float) -> Term:
        layer = 0 if row.reads == "hidden" else None
        fields = {"half": half, "loss": name, "layer": layer, "options": {option: value}}
        return Term.model_validate(fields)

    for option in row.positive:
        for value in (0.0, -1.0):
            with pytest.raises(ValueError, match=f"{name} needs {option} above 0"):
                term(option, value)
    for option in row.nonnegative:
        with pytest.raises(ValueError, match=f"{name} needs {option} of at least 0"):
            term(option, -1e-3)
    for option in row.options:
        term(option, 0.5)  # control
        if option in row.positive or row.reads != "scores" or row.needs_kl or row.needs_level:
            continue
        now, ref = scores([-1.0, -2.0], [-2.5]), scores([-0.5, -0.5], [-2.5])
        assert torch.isfinite(row(now, ref, **{option: 0.0})).all()


@pytest.mark.parametrize("name", [n for n, row in BY_SCORES.items() if not row.needs_level])
def test_what_is_bounded_pulls_no_more_in_the_end_at_the_least_that_is_allowed(name):
    row = BY_SCORES[name]
    options = dict.fromkeys(row.positive, 1e-3) | dict.fromkeys(row.nonnegative, 0.0)
    now = scores([-1e5], [-2e5])
    row(now, scores([-0.5], [-0.5]), **options).sum().backward()
    assert (float(now.token_logps.grad.abs().max()) < 1e-9) == row.bounded
