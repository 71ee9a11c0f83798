"""Attention that keeps its weights equals torch's own, values and gradients."""

import pytest
import torch

from expunge import attention, short_attention
from expunge.attention import causal_attention

LENGTHS = (1, 7, 12)


def heads(
    queries: int, keys: int, dtype: torch.dtype = torch.float64, lengths=LENGTHS
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(lengths), 8) for count in (queries, keys, keys)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in shapes
    ]


def both(
    monkeypatch, inputs: list[torch.Tensor], scale: float | None, lengths=LENGTHS
) -> list[list[torch.Tensor]]:
    """Output and the three gradients: first of ours, then of torch's."""
    found = []
    for short in (attention.SHORT, 0):
        monkeypatch.setattr(attention, "SHORT", short)
        out = causal_attention(inputs[0], inputs[1], inputs[2], lengths, scale)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append([out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)])
    return found


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_are_those_of_torch(monkeypatch, queries, keys, scale):
    ours, torchs = both(monkeypatch, heads(queries, keys, torch.float32), scale)
    torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(300, 15, 130, 60, 60, 15, 128, 1), (129,) * 3, (512, 5)])
@pytest.mark.parametrize("places", [1024, 1])
def test_sequences_that_share_bins_do_not_see_each_other(monkeypatch, lengths, places):
    short_attention._layout.cache_clear()
    monkeypatch.setattr(short_attention, "PLACES", places)
    ours, torchs = both(monkeypatch, heads(4, 2, torch.float32, lengths), None, lengths)
    short_attention._layout.cache_clear()
    torch.testing.assert_close(ours, torchs, atol=1e-4, rtol=1e-4)


def test_every_token_has_one_place_and_bins_are_filled_before_others_are_opened():
    lengths = (300, 15, 130, 60, 60, 15, 128, 1)
    layout = short_attention._layout(lengths)
    assert layout.tokens[layout.places].tolist() == list(range(sum(lengths)))
    owners = torch.cat([shelf.owners.flatten() for shelf in layout.shelves])
    whose = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert owners[layout.places].tolist() == whose
    assert int((owners >= 0).sum()) == sum(lengths)
    # 300 + 15 + 1 in 320; 130 + 60 in 192; 128; 60 + 15
    assert [(shelf.width, len(shelf.owners)) for shelf in layout.shelves] == [
        (128, 2),
        (192, 1),
        (320, 1),
    ]
    assert [shelf.width for shelf in short_attention._layout((5, 30)).shelves] == [64]


def test_bfloat16_is_as_near_to_the_truth_as_torch_is(monkeypatch):
    truth = both(monkeypatch, heads(6, 2), None)[1]
    monkeypatch.setattr(attention, "SHORT", 512)
    ours, torchs = both(monkeypatch, heads(6, 2, torch.bfloat16), None)
    for mine, other, right in zip(ours, torchs, truth, strict=True):
        error = [float((x.double() - right).norm() / right.norm()) for x in (mine, other)]
        assert error[0] < 2 * error[1] + 1e-3


def test_gradients_agree_with_finite_differences():
    attend = lambda q, k, v: short_attention.short_attention(q, k, v, LENGTHS, 0.35)  # noqa: E731
    # The softmax is taken in float32 whatever the type of the heads, hence the loose step.
    assert torch.autograd.gradcheck(attend, tuple(heads(2, 1)), eps=1e-3, atol=2e-3)


def test_no_token_sees_a_later_one_or_another_sequence():
    query, key, value = heads(2, 1, torch.float32)
    out = causal_attention(query, key, value, LENGTHS, None)
    (grad,) = torch.autograd.grad(out[0, :, 3].sum(), value)  # the third token of the second
    seen = grad[0].abs().sum((0, 2)) > 0
    assert seen.tolist() == [False, True, True, True] + [False] * 16


def test_autocast_narrows_the_products_as_torch_does():
    query, key, value = heads(2, 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert causal_attention(query, key, value, LENGTHS, None).dtype == torch.bfloat16
