"""Losses on logits: values by hand, slopes by finite differences, what they tend to, and blocks."""

import math
from functools import partial

import pytest
import torch

from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.heads import Anchor
from expunge.unlearn.forget import FORGET_LOSSES
from expunge.unlearn.logits import ce_u, flatten, jensen_shannon, undial, uniform_kl
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.passes import Passes
from expunge.unlearn.per_token import token_values
from expunge.unlearn.readings import HalfData
from expunge.unlearn.retain import RETAIN_LOSSES

BY_LOGITS = {
    name: row for name, row in {**FORGET_LOSSES, **RETAIN_LOSSES}.items() if row.reads == "logits"
}
THIRD = torch.tensor([0])


def of(*p: float) -> torch.Tensor:
    """Logits of one token whose softmax is p."""
    return torch.tensor([p], dtype=torch.float64).log() + 3.0


def drawn(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_values_worked_by_hand():
    p = of(0.5, 0.3, 0.2)
    # q ∝ (0.5 e⁻¹, 0.3, 0.2)
    total = 0.5 / math.e + 0.5
    q = (0.5 / math.e / total, 0.3 / total, 0.2 / total)
    cross = -sum(a * math.log(b) for a, b in zip(q, (0.5, 0.3, 0.2), strict=True))
    assert float(undial(p, THIRD, p, beta=1.0)) == pytest.approx(cross)
    # without the first token q = (0.6, 0.4)
    cross = -(0.6 * math.log(0.3) + 0.4 * math.log(0.2))
    assert float(ce_u(p, THIRD, None)) == pytest.approx(cross)
    assert float(flatten(torch.tensor([[4.0, 1.0, 1.0]]), THIRD, None)) == pytest.approx(4.0)
    uniform = -math.log(3) - (math.log(0.5) + math.log(0.3) + math.log(0.2)) / 3
    assert float(uniform_kl(p, THIRD, None)) == pytest.approx(uniform)
    m = [(v + 1 / 3) / 2 for v in (0.5, 0.3, 0.2)]
    one = sum(v * math.log(v / w) for v, w in zip((0.5, 0.3, 0.2), m, strict=True))
    two = sum(math.log(1 / 3 / w) / 3 for w in m)
    assert float(jensen_shannon(p, THIRD, None)) == pytest.approx((one + two) / 2)


@pytest.mark.parametrize("name", BY_LOGITS)
def test_slopes_are_those_of_finite_differences(name):
    """What is held fixed in ce_u is a function of the logits too, so its target is given."""
    logits, targets = drawn(4, 6).requires_grad_(), torch.tensor([1, 5, 0, 1])
    fn = partial(BY_LOGITS[name].fn, targets=targets, reference=drawn(4, 6, seed=1))
    if name == "ce_u":
        without = logits.detach().scatter(1, targets[:, None], -math.inf).softmax(-1)
        (ours,) = torch.autograd.grad(fn(logits).sum(), logits)
        fixed = -(without * logits.log_softmax(-1)).sum()
        torch.testing.assert_close(ours, torch.autograd.grad(fixed, logits)[0])
    else:
        assert torch.autograd.gradcheck(fn, logits)


@pytest.mark.parametrize("name", BY_LOGITS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_blocks_give_the_values_and_slopes_of_all_logits_at_once(monkeypatch, name, trained):
    monkeypatch.setattr("expunge.heads.BLOCK", 3)
    states, head = drawn(7, 5).requires_grad_(), drawn(11, 5, seed=1).requires_grad_(trained)
    rows, old = drawn(7, 5, seed=2), drawn(11, 5, seed=3) if trained else None
    targets, factors = torch.randint(11, (7,)), drawn(7, seed=4)
    fn = BY_LOGITS[name].fn
    ours = token_values(states, head, targets, fn, Anchor(rows, head=old))
    dense = fn(states @ head.T, targets, rows @ (head.detach() if old is None else old).T)
    torch.testing.assert_close(ours, dense)
    inputs = (states, head) if trained else (states,)
    torch.testing.assert_close(
        torch.autograd.grad((factors * ours).sum(), inputs),
        torch.autograd.grad((factors * dense).sum(), inputs),
    )


def test_the_block_function_passes_finite_differences(monkeypatch):
    monkeypatch.setattr("expunge.heads.BLOCK", 2)
    inputs = drawn(5, 3).requires_grad_(), drawn(7, 3, seed=1).requires_grad_()
    targets, rows, old = torch.tensor([0, 6, 2, 2, 1]), drawn(5, 3, seed=2), drawn(7, 3, seed=3)

    def values(states, head):
        return token_values(states, head, targets, undial, Anchor(rows, head=old))

    assert torch.autograd.gradcheck(values, inputs)


def test_narrow_states_give_float32_losses_near_the_exact_ones():
    states, head, targets = drawn(9, 16).bfloat16(), drawn(40, 16).bfloat16(), torch.arange(9)
    found = token_values(states, head, targets, uniform_kl)
    exact = uniform_kl(states.double() @ head.double().T, targets, None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.05)


def test_the_slope_of_undial_is_p_minus_q_and_bounded():
    logits, reference = drawn(3, 6, scale=9.0).requires_grad_(), drawn(3, 6, seed=1)
    targets = torch.tensor([2, 0, 5])
    (slope,) = torch.autograd.grad(undial(logits, targets, reference).sum(), logits)
    lowered = reference - 10.0 * torch.nn.functional.one_hot(targets, 6)
    torch.testing.assert_close(slope, logits.softmax(-1) - lowered.softmax(-1))
    assert slope.abs().sum(-1).max() <= 2


def test_ce_u_pushes_by_p_of_the_target_and_fades_with_it():
    targets = torch.tensor([0])
    sizes = []
    for p in (0.9, 1e-3, 1e-6):
        logits = of(p, 0.75 * (1 - p), 0.25 * (1 - p)).requires_grad_()
        (slope,) = torch.autograd.grad(ce_u(logits, targets, None).sum(), logits)
        torch.testing.assert_close(slope[0], p * torch.tensor([1, -0.75, -0.25]).double())
        sizes.append(float(slope.abs().sum()))
    assert sizes[0] > 1  # control
    assert sizes[2] < 3e-6


@pytest.mark.parametrize("name", ["flatten", "jensen_shannon", "uniform_kl"])
def test_a_distribution_that_says_nothing_has_no_loss(name):
    fn = BY_LOGITS[name].fn
    assert float(fn(torch.full((1, 9), 2.0), THIRD, None)) == pytest.approx(0, abs=1e-6)
    assert float(fn(torch.eye(9)[:1] * 5, THIRD, None)) > 0.1  # control
    if name == "jensen_shannon":
        assert float(fn(torch.eye(9)[:1] * 1e4, THIRD, None)) < math.log(2)


@pytest.mark.parametrize("scope", ["answer", "document"])
def test_what_is_read_are_the_logits_that_predict_the_scored_tokens(tiny, tokenizer, scope):
    """The shift and the mask, against the model's own logits, prompt left out."""
    item = encode(Example("f0", "Who?", "an answer"), tokenizer, max_length=32)
    terms = (
        Term(half="forget", loss="flatten", scope=scope),
        Term(half="forget", loss="gradient_ascent", scope="document"),
    )
    passes = Passes(tiny, {"forget": HalfData([item])}, Objective(terms), 99)
    found = passes.backward([{"forget": (0,)}])["forget.flatten"]
    logits = tiny(input_ids=torch.tensor([item.tokens])).logits[0, :-1].detach()
    wanted = (logits.amax(-1) - logits.mean(-1)).square()
    wanted = wanted if scope == "document" else wanted[item.answer_start - 1 :]
    assert found == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert len(pack([item], scope, "cpu").scored) == len(wanted)
