"""NGDiff: the signs that it guarantees, and the rate that it fits."""

import pytest
import torch

from expunge.unlearn.optimizer import Span, Stepper
from expunge.unlearn.section import Branch
from expunge.unlearn.steps.ngdiff import parabola


def matrix(size: int, generator: torch.Generator) -> torch.Tensor:
    """Symmetric, its eigenvalues above 0."""
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return a @ a.T + torch.eye(size, dtype=torch.float64)


def test_it_never_trades_one_half_for_the_other(toy, linear):
    """g·∇M_R ≥ 0 ≥ g·∇M_F for any two gradients; the forget loss is -M_F."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        f, r = torch.randn(2, 4, generator=generator)
        found, record = toy(torch.zeros(4), linear(-f), linear(r)).gradient("ngdiff", every=0)
        torch.testing.assert_close(found, r / r.norm() - f / f.norm())
        assert found @ r >= -1e-6
        assert found @ f <= 1e-6
        assert record["norm.forget"] == pytest.approx(float(f.norm()))


def test_one_small_plain_step_lowers_the_retain_loss_and_raises_the_forget_nll(toy, quadratic):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        w, a, b = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        made = toy(w, quadratic(matrix(4, generator), a, -1.0), quadratic(matrix(4, generator), b))
        before = made.losses("forget", "retain")
        made.go(made.gradient("ngdiff", every=0)[0], 1e-6)
        after = made.losses("forget", "retain")
        assert after["retain"] <= before["retain"] + 1e-12
        assert after["forget"] <= before["forget"] + 1e-12  # -M_F falls, so M_F rises


def test_the_named_row_moves_weights_by_that_gradient_and_nothing_else(toy, linear):
    """d·∇M_R ≤ 0 for the weights' movement d too; weight decay at large weights would break it."""
    w = torch.tensor([100.0, 0.0])
    f, r = torch.tensor([1.0, 0.01]), torch.tensor([1.0, -0.01])
    made = toy(w, linear(-f), linear(r))
    found, _ = made.gradient("ngdiff", every=0)
    weight = torch.nn.Parameter(w.clone())
    weight.grad = found
    optimizer = Branch.model_validate({"objective": "ngdiff"}).optimizer
    stepper = Stepper({"weight": weight}, optimizer, [Span(2)])
    stepper.begin(0, 2)
    stepper.step(rate=0.1)
    torch.testing.assert_close(weight.detach(), w - 0.1 * found)


def test_the_fitted_rate_is_the_exact_minimiser_of_a_quadratic(toy, quadratic, linear):
    """η* = g·∇M_R / gᵀ A g; the rate moves a tenth of the way, to at most twice itself."""
    generator = torch.Generator().manual_seed(2)
    for rate in (1e-3, 0.1, 10.0):
        a, w = matrix(3, generator), torch.randn(3, generator=generator, dtype=torch.float64)
        centre = torch.zeros(3, dtype=torch.float64)
        f = torch.randn(3, generator=generator, dtype=torch.float64)
        made = toy(w, linear(f), quadratic(a, centre), rate=rate)
        found, record = made.gradient("ngdiff")
        best = float(found @ a @ w / (found @ a @ found))
        assert record["rate.fitted"] == pytest.approx(best, rel=1e-6)
        assert record["fit"] == pytest.approx(1.0)
        clipped = min(2 * rate, max(rate / 2, best))
        assert made.state["rate"] == pytest.approx(0.9 * rate + 0.1 * clipped)


def test_the_rate_settles_at_the_minimiser_and_is_fitted_at_its_steps_only(toy, quadratic, linear):
    one, centre = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    start = torch.tensor([3.0, 0.0], dtype=torch.float64)
    made = toy(start, linear(torch.tensor([0.0, 1e-9])), quadratic(one, centre), rate=0.5)
    records = [made.gradient("ngdiff", every=3)[1] for _ in range(300)]
    assert ["fit" in record for record in records[:7]] == [True, False, False] * 2 + [True]
    assert made.state["rate"] == pytest.approx(1.5, rel=1e-3)  # g = (1, 1): half of it is w


@pytest.mark.parametrize("kind", ["opens downwards", "is noise", "is flat"])
def test_a_fit_that_cannot_be_believed_changes_nothing(toy, quadratic, linear, kind):
    generator = torch.Generator().manual_seed(3)
    one, centre = torch.eye(2), torch.zeros(2)
    retain = {
        "opens downwards": quadratic(one, centre, -1.0),
        "is noise": lambda w: w.sum() * 1e-9 + torch.randn((), generator=generator),
        "is flat": lambda w: 0.0 * w.sum(),
    }[kind]
    made = toy(torch.ones(2), linear([1.0, 0.0]), retain, rate=0.1)
    _, record = made.gradient("ngdiff")
    assert made.state["rate"] == 0.1
    assert "rate.fitted" not in record


def test_a_parabola_worked_by_hand():
    slope, curvature, fit = parabola([3 - 2 * x + 0.5 * x * x for x in (-2, -1, 0, 1, 2)])
    assert (slope, curvature, fit) == pytest.approx((-2.0, 0.5, 1.0))
    bent = [3 - 2 * x + 0.5 * x * x + 3 * x**3 for x in (-2, -1, 0, 1, 2)]
    assert parabola(bent)[2] < 0.99  # control
