"""Step rules that read a gradient at moved weights, against derivatives worked by hand."""

import pytest
import torch

DOUBLE = torch.float64


def start(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def test_sam_is_the_gradient_at_the_worst_point_of_the_ball(toy, quadratic, linear):
    """On ½ (w-c)ᵀ A (w-c): A (w + ρ g/‖g‖ - c), with g = A (w - c)."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=DOUBLE)
    w, centre, retain = start(1, 2), start(-1, 0), start(7, -3)
    made = toy(w, quadratic(a, centre), linear(retain))
    found, record = made.gradient("sam", radius=0.3)
    g = a @ (w - centre)
    torch.testing.assert_close(found, a @ (w + 0.3 * g / g.norm() - centre) + retain)
    assert record["norm.forget"] == pytest.approx(float(g.norm()))
    assert record["forget"] > made.losses("forget")["forget"]  # the loss is worse there


def test_sam_is_joint_as_the_ball_shrinks(toy, quadratic, linear):
    made = toy(start(1, 2), quadratic(torch.eye(2, dtype=DOUBLE), start(0, 1)), linear(start(1, 1)))
    expected, _ = made.gradient("joint")
    torch.testing.assert_close(made.gradient("sam", radius=1e-12)[0], expected)
    assert not torch.allclose(made.gradient("sam", radius=1.0)[0], expected)  # control


def test_smoothing_is_the_gradient_of_the_mean_over_the_noise(toy, linear):
    """E (w + ρ u)³ = w³ + 3 w ρ² for a loss ¼ w⁴."""
    made = toy(start(*[1.0] * 4000), lambda w: 0.25 * w.pow(4).sum(), linear(start(2.0)))
    found, _ = made.gradient("smooth", deviation=0.5, samples=5)
    assert float(found.mean()) == pytest.approx(1 + 3 * 0.25 + 2, abs=0.1)
    nearly, _ = made.gradient("smooth", deviation=1e-9)
    torch.testing.assert_close(nearly, torch.full_like(nearly, 3.0))


def test_the_noise_is_that_of_its_step(toy, linear):
    def found(seed):
        made = toy(start(1.0, 1.0), lambda w: w.pow(4).sum(), linear(start(0.0)), seed=seed)
        return made.gradient("smooth", deviation=0.5)[0]

    torch.testing.assert_close(found("1:0"), found("1:0"), rtol=0, atol=0)
    assert not torch.equal(found("1:0"), found("1:1"))


@pytest.mark.parametrize("scaling", ["scalar", "elementwise"])
def test_the_invariance_penalty_against_its_second_derivatives(toy, linear, scaling):
    def retain(w):
        return (w.pow(4) / 4).sum() + w.prod()

    w, forget = start(0.7, -1.2, 0.4), start(1, 2, 3)
    made = toy(w, linear(forget), retain)
    found, record = made.gradient("ilu", penalty=0.3, scaling=scaling, probe=1e-6)
    at = w.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(retain(at), at, create_graph=True)
    product = at * slope
    penalty = product.sum().square() if scaling == "scalar" else product.square().sum()
    (bent,) = torch.autograd.grad(0.3 * penalty, at)
    torch.testing.assert_close(found, forget + slope.detach() + bent, rtol=1e-4, atol=1e-5)
    assert record["penalty"] == pytest.approx(float(penalty.detach()))
