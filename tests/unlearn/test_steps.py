"""Step rules against gradients worked by hand."""

import torch
from torch.nn import Parameter

from expunge.unlearn.steps import STEP_RULES, Step


def halves(weights: Parameter, forget: list[float], retain: list[float], loss: float = 1.0):
    """A backward function whose gradients are the given vectors."""
    vectors = {"forget": torch.tensor(forget), "retain": torch.tensor(retain)}

    def backward(*asked: str) -> dict[str, float]:
        (weights * sum(vectors[half] for half in asked)).sum().backward()
        return {half: {"forget": loss, "retain": 0.5}[half] for half in asked}

    return backward


def gradient(rule: str, loss: float = 1.0, **options) -> list[float]:
    weights = Parameter(torch.zeros(2))
    backward = halves(weights, [6.0, 8.0], [0.0, 2.0], loss)
    record = STEP_RULES[rule].fn(backward, [weights], Step(rule=rule, **options))
    assert {"forget", "retain"} <= set(record)
    return weights.grad.tolist()


def test_joint_sums_the_halves():
    assert gradient("joint") == [6.0, 10.0]


def test_normalized_gives_each_half_length_one():
    torch.testing.assert_close(gradient("normalized"), [0.6, 1.8])  # (0,1) + (0.6,0.8)


def test_the_forget_share_fades_as_its_loss_is_met():
    torch.testing.assert_close(gradient("normalized", loss=0.5, fade_below=2.0), [0.15, 1.2])
    torch.testing.assert_close(gradient("normalized", loss=5.0, fade_below=2.0), [0.6, 1.8])
    torch.testing.assert_close(gradient("normalized", loss=0.0, fade_below=2.0), [0.0, 1.0])


def test_the_normalized_direction_helps_both_halves_to_first_order():
    """g·∇L_F ≥ 0 and g·∇L_R ≥ 0 at equal shares, whatever the angle between them."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        f, r = torch.randn(2, 5, generator=generator)
        weights = Parameter(torch.zeros(5))
        backward = halves(weights, f.tolist(), r.tolist())
        STEP_RULES["normalized"].fn(backward, [weights], Step(rule="normalized"))
        assert weights.grad @ f >= -1e-5
        assert weights.grad @ r >= -1e-5
