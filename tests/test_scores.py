"""Packed scores equal those of one sequence at a time, and their gradients are exact."""

import pytest
import torch

from expunge.affine_heads import output_head
from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.heads import Anchor, anchor_of, token_kl, token_logps, token_logps_and_kl
from expunge.lora import Lora, adapters_of, add_adapter, switched_off
from expunge.packs import hidden_states
from expunge.scores import score

EXAMPLES = [
    Example("a-qa0", "Who?", "Ada"),
    Example("b-qa0", "Where was she born, then?", "In London."),
    Example("c", "", "A plain text."),
]


@pytest.mark.parametrize("scope", ["answer", "document"])
def test_packed_scores_equal_one_at_a_time(tiny, tokenizer, scope):
    sequences = [encode(e, tokenizer, max_length=64) for e in EXAMPLES]
    with torch.no_grad():
        packed = score(tiny, pack(sequences, scope, "cpu"))
        for number, sequence in enumerate(sequences):
            logits = tiny(input_ids=torch.tensor([sequence.tokens])).logits[0]
            log_p = logits.log_softmax(-1)
            first = sequence.scored_from(scope)
            alone = sum(
                log_p[t - 1, sequence.tokens[t]] for t in range(first, len(sequence.tokens))
            )
            torch.testing.assert_close(packed.logps[number], alone, atol=1e-4, rtol=1e-5)
            assert packed.lengths[number] == len(sequence.tokens) - first


def test_document_scope_reads_the_prompt_too(tokenizer, tiny):
    sequences = [encode(EXAMPLES[1], tokenizer, max_length=64)]
    assert score(tiny, pack(sequences, "answer", "cpu")).lengths == 11  # "In London." and EOS
    assert score(tiny, pack(sequences, "document", "cpu")).lengths == 35  # all but the first byte


def test_gradients_equal_those_of_plain_logits(monkeypatch):
    monkeypatch.setattr("expunge.heads.BLOCK", 3)  # several blocks
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 5, generator=generator, requires_grad=True)
    head = torch.randn(11, 5, generator=generator, requires_grad=True)
    targets = torch.randint(11, (7,), generator=generator)
    weights = torch.randn(7, generator=generator)
    (token_logps(states, head, targets) * weights).sum().backward()
    ours = states.grad.clone(), head.grad.clone()
    states.grad = head.grad = None
    ((states @ head.T).log_softmax(-1)[torch.arange(7), targets] * weights).sum().backward()
    torch.testing.assert_close(ours, (states.grad, head.grad))


def test_kl_and_its_gradient_equal_the_definition():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 5, generator=generator, requires_grad=True)
    reference = torch.randn(4, 5, generator=generator)
    head = torch.randn(9, 5, generator=generator)
    ours = token_kl(states, head, anchor_of(reference, head))
    (grad,) = torch.autograd.grad(ours.sum(), states)
    p, q = (states @ head.T).log_softmax(-1), (reference @ head.T).log_softmax(-1)
    expected = (q.exp() * (q - p)).sum(-1)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), states)[0])


def test_log_probs_and_kl_from_one_product_equal_those_apart(monkeypatch):
    monkeypatch.setattr("expunge.heads.BLOCK", 3)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 5, generator=generator, requires_grad=True)
    reference, head = torch.randn(7, 5, generator=generator), torch.randn(11, 5)
    targets = torch.randint(11, (7,), generator=generator)
    one, two = torch.randn(2, 7, generator=generator)
    logps, kl = token_logps_and_kl(states, head, targets, anchor_of(reference, head))
    apart = token_logps(states, head, targets), token_kl(states, head, Anchor(reference, head=head))
    torch.testing.assert_close((logps, kl), apart)
    torch.testing.assert_close(
        torch.autograd.grad((one * logps + two * kl).sum(), states),
        torch.autograd.grad((one * apart[0] + two * apart[1]).sum(), states),
    )


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_kl_to_oneself_is_0_and_beside_it_what_the_definition_says(dtype, near):
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(50, 64, generator=generator) / 2).to(dtype)
    head = torch.randn(300, 64, generator=generator).to(dtype)
    anchor = anchor_of(states, head)
    assert token_kl(states, head, anchor).abs().max() == 0
    moved = states + 0.2 * torch.randn(50, 64, generator=generator).to(dtype)
    q, p = ((h.double() @ head.double().T).log_softmax(-1) for h in (states, moved))
    exact = (q.exp() * (q - p)).sum(-1)
    assert exact.max() > 1  # control
    assert (token_kl(moved, head, anchor) - exact).abs().max() < near
    moved.requires_grad_()
    wanted = (p.exp() - q.exp()) @ head.double()
    errors = []
    for way in (anchor, Anchor(states, head=head)):
        (found,) = torch.autograd.grad(token_kl(moved, head, way).sum(), moved)
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[0] < 1.1 * errors[1] + 1e-6  # no worse than by the logits of both


@pytest.mark.parametrize(("sharp", "near"), [(0, 1e-3), (20, 2e-3)])
def test_a_small_kl_of_bfloat16_states_is_not_lost_in_rounding(sharp, near):
    """Of flat distributions and of peaked ones; the vocabulary has a rest behind its stretches."""
    generator = torch.Generator().manual_seed(0)
    head = (0.05 * torch.randn(5001, 256, generator=generator)).bfloat16()
    toward = sharp * torch.rand(200, 1, generator=generator) * head[-200:].float()
    states = (torch.randn(200, 256, generator=generator) + toward / 0.8).bfloat16()
    moved = (states + 0.03 * torch.randn(200, 256, generator=generator)).bfloat16()
    q, p = ((h.double() @ head.double().T).log_softmax(-1) for h in (states, moved))
    exact = (q.exp() * (q - p)).sum(-1)
    assert 1e-4 < exact.mean() < 1e-3  # control
    error = token_kl(moved, head, anchor_of(states, head)) - exact
    assert error.square().mean().sqrt() < near
    assert error.mean().abs() < near / 5
    logps = token_logps(moved, head, torch.arange(4801, 5001))
    wanted = p[torch.arange(200), torch.arange(4801, 5001)]
    assert (logps - wanted).abs().max() < 0.03  # half a step of the largest logits


@pytest.mark.parametrize("sharp", [0.3, 2.0, 8.0])
def test_log_probs_of_narrow_logits_are_those_of_the_logits_as_they_are_rounded(sharp):
    """Of likely targets too, whose NLL is far below what bfloat16 tells from 1."""
    generator = torch.Generator().manual_seed(0)
    states = (sharp * torch.randn(200, 64, generator=generator)).bfloat16()
    head = torch.randn(300, 64, generator=generator).bfloat16() / 4
    rounded = (states @ head.T).double()
    targets = rounded.argmax(-1)
    nll = -rounded.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    found = -token_logps(states, head, targets)
    assert ((found - nll).abs() / (nll.clamp(max=1) + 1e-4)).max() < 0.02
    if sharp == 8.0:
        assert nll.min() < 1e-3  # control


def test_kl_through_a_head_that_moves_gives_that_head_its_gradient(monkeypatch):
    monkeypatch.setattr("expunge.heads.BLOCK", 3)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 5, generator=generator, requires_grad=True)
    reference, old = torch.randn(4, 5, generator=generator), torch.randn(9, 5, generator=generator)
    head = torch.randn(9, 5, generator=generator, requires_grad=True)
    weights = torch.randn(4, generator=generator)
    ours = (token_kl(states, head, Anchor(reference, head=old)) * weights).sum()
    p, q = (states @ head.T).log_softmax(-1), (reference @ old.T).log_softmax(-1)
    plain = ((q.exp() * (q - p)).sum(-1) * weights).sum()
    torch.testing.assert_close(
        torch.autograd.grad(ours, (states, head)), torch.autograd.grad(plain, (states, head))
    )


def test_a_fresh_adapter_changes_nothing_and_switching_off_gives_the_reference(tiny, tokenizer):
    batch = pack([encode(EXAMPLES[1], tokenizer, max_length=64)], "answer", "cpu")
    before = hidden_states(tiny, batch).detach()
    add_adapter(tiny, Lora(rank=4), seed=1)
    torch.testing.assert_close(hidden_states(tiny, batch).detach(), before)
    for layer in adapters_of(tiny).values():
        torch.nn.init.ones_(layer.lora_B)
    anchor = anchor_of(before, output_head(tiny))
    changed = score(tiny, batch, anchor=anchor)
    assert changed.token_kl.sum() > 1e-4  # control: the adapter does act
    with switched_off(tiny):
        off = score(tiny, batch, anchor=anchor)
    assert off.token_kl.abs().max() < 1e-6


def test_scores_select_a_span_of_sequences(tiny, tokenizer):
    sequences = [encode(e, tokenizer, max_length=64) for e in EXAMPLES]
    whole = score(tiny, pack(sequences, "answer", "cpu"))
    torch.testing.assert_close(whole.span(1, 3).nll, whole.nll[1:])
    assert output_head(tiny).shape == (257, 32)
