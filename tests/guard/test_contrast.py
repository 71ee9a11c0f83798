"""Logit contrast: dense formulas by hand, caches apart, batches as one by one."""

import math

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from expunge import lora
from expunge.data.batches import TokenSequence
from expunge.errors import EvaluationError, ModelError
from expunge.evaluate.options import option_logits
from expunge.evaluate.reader import reader_of
from expunge.guard.contrast import (
    FLOOR,
    Contrast,
    combine_of,
    contrast,
    offset,
    plausible,
    uld,
    whp,
)
from expunge.guard.helpers import HelperSpec, first_blocks
from expunge.guard.standin import StandIn
from expunge.guard.wrapper import ContrastProcessor, Guarded
from expunge.lora import Lora
from expunge.models import load_model, save_model

from .conftest import plainly, tokens

PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45, 46, 47], [90, 12]]
TEXTS = ["Who?", "A", "Where was she born, then?", "In it"]
BASE = torch.tensor([[2.0, 1.0, 0.0, -5.0]])
ONE = torch.tensor([[1.0, 0.0, 2.0, 9.0]])
TWO = torch.tensor([[0.0, 4.0, 1.0, 1.0]])


def test_contrast_is_the_weighted_sum():
    expected = torch.tensor([[2 - 0.5 + 0, 1 - 0 + 8, 0 - 1 + 2, -5 - 4.5 + 2]])
    torch.testing.assert_close(contrast(BASE, [ONE, TWO], [-0.5, 2.0]), expected)
    assert torch.equal(contrast(BASE, [ONE, TWO], [0.0, 0.0]), BASE)


def test_offset_and_whp_by_hand():
    torch.testing.assert_close(
        offset(BASE, ONE, TWO, weight=2.0), torch.tensor([[4.0, -7.0, 2.0, 11.0]])
    )
    torch.testing.assert_close(
        whp(BASE, ONE, alpha=3.0), torch.tensor([[2.0, 1.0, 0 - 3 * 2.0, -5 - 3 * 14.0]])
    )
    assert (whp(BASE, TWO, alpha=3.0) <= BASE).all()


def test_what_is_plausible_by_hand():
    """At τ = ½ of four tokens k = 2: both bounds let the lower one decide."""
    assert plausible(BASE, 0.5).tolist() == [[True, True, False, False]]  # the second is e^-1 < ½
    near = torch.tensor([[0.0, -0.1, -0.2, -0.69]])
    assert plausible(near, 0.5).tolist() == [[True, True, True, True]]  # all above ln ½
    assert plausible(near, 0.9).tolist() == [[True, True, True, False]]  # k = 3
    assert plausible(BASE, 0.01).tolist() == [[True, True, True, False]]  # ln 0.01 = -4.6, k = 1


def test_uld_by_hand():
    z = uld(BASE, ONE, weight=-0.8, tau=0.5)
    torch.testing.assert_close(z, torch.tensor([[2 - 0.8, 1.0, 0.0, -5.0]]))
    chosen = contrast(BASE, [ONE], [-0.8], tau=0.5, floor=True)
    torch.testing.assert_close(chosen, torch.tensor([[1.2, 1.0, FLOOR, FLOOR]]))
    flat = uld(BASE, torch.full_like(BASE, 7.0), tau=0.01)
    kept = plausible(BASE, 0.01)  # a uniform assistant leaves their odds as they are
    torch.testing.assert_close(flat[kept].softmax(-1), BASE[kept].softmax(-1))


@pytest.fixture(params=["linear", "filtered", "whp"])
def section(request):
    return {
        "linear": Contrast(weights=(-0.7,)),
        "filtered": Contrast(weights=(-0.7,), tau=0.05),
        "whp": Contrast(rule="whp", weights=(2.0,)),
    }[request.param]


def dense(section, model, helper, choosing=True):
    """The definition: both models on the whole text, joined."""

    @torch.no_grad()
    def logits(text):
        both = [one(input_ids=text).logits[0, -1:].float() for one in (model, helper)]
        return combine_of(section)(both[0], both[1:], choosing)

    return logits


def contrasted(guard, section, **spec):
    specs = (HelperSpec(**spec),) * len(section.weights)
    return guard(contrast=section, helpers=specs)


def test_a_batch_through_the_guard_is_one_by_one_and_recomputation(
    lively, other, tokenizer, section, guard
):
    standin = StandIn(lively, [other], combine_of(section))
    from expunge.evaluate.generate import generate

    expected = [plainly(dense(section, lively, other), prompt, 40) for prompt in PROMPTS]
    assert generate(standin, tokenizer, PROMPTS, max_new_tokens=40, max_batch=3) == expected
    alone = generate(lively, tokenizer, PROMPTS, max_new_tokens=40)
    assert alone != expected  # control: the helper matters


def test_the_processor_gives_the_same_with_caches_of_its_own(lively, other, tokenizer, section):
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    processor = ContrastProcessor([other], combine_of(section), mask)
    made = lively.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([processor]),
    )
    for row, prompt in zip(made[:, width:].tolist(), PROMPTS, strict=True):
        expected = plainly(dense(section, lively, other), prompt, 40)
        assert row[: len(expected)] == expected
        assert not any(row[len(expected) :])


def test_the_processor_reads_anew_what_beams_exchanged(lively, other, section):
    ids, moved = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[7, 8, 3], [5, 6, 4]])
    processor = ContrastProcessor([other], combine_of(section))
    for given in (ids, moved, torch.cat([moved, torch.tensor([[1], [2]])], 1)):
        with torch.no_grad():
            scores = lively(input_ids=given).logits[:, -1]
        expected = torch.cat([dense(section, lively, other)(row[None]) for row in given])
        expected = expected.log_softmax(-1)
        torch.testing.assert_close(processor(given, scores), expected, rtol=1e-4, atol=1e-4)


def test_beams_get_log_probabilities_whatever_logits_are_counted_from(
    lively, other, section, monkeypatch
):
    """Beam search hands in log-probabilities; those of a helper come as raw logits."""
    ids = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad():
        scores = lively(input_ids=ids).logits[:, -1]
    plain = ContrastProcessor([other], combine_of(section))(ids, scores)
    torch.testing.assert_close(plain.logsumexp(-1), torch.zeros(2), atol=1e-4, rtol=0)
    real = ContrastProcessor._next
    monkeypatch.setattr(ContrastProcessor, "_next", staticmethod(lambda *given: real(*given) + 5))
    moved = ContrastProcessor([other], combine_of(section))(ids, scores.log_softmax(-1))
    torch.testing.assert_close(*(found.clamp_min(FLOOR / 2) for found in (moved, plain)))


def test_scores_and_options_are_those_of_the_joined_logits(lively, other, tokenizer, guard):
    section = Contrast(weights=(-0.7,), tau=0.05)
    standin = StandIn(lively, [other], combine_of(section))
    reader = reader_of(lively, tokenizer, guard=contrasted(guard, section))
    reader.guard._speaker = standin
    texts = [TokenSequence(str(i), (*p, 11, 12, 13), len(p)) for i, p in enumerate(PROMPTS)]
    joined = dense(section, lively, other, choosing=False)
    for text, found in zip(texts, reader.scores(texts), strict=True):
        for place, t in enumerate(range(text.answer_start, len(text.tokens))):
            log_p = joined(torch.tensor([text.tokens[:t]])).log_softmax(-1)
            assert found.logp[place] == pytest.approx(float(log_p[0, text.tokens[t]]), abs=1e-4)
    letters = [20, 30, 40, 50]
    found = option_logits(reader, PROMPTS, ["one", "one", "two", "two"], letters)
    expected = [joined(torch.tensor([p]))[0, letters].tolist() for p in PROMPTS]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_a_guarded_model_scores_best_is_not_taken_for_what_it_says(
    lively, tokenizer, guard, monkeypatch
):
    from expunge.evaluate import reader as reader_module

    told, plain = [], reader_module.generate
    monkeypatch.setattr(
        reader_module, "generate", lambda *a, **o: told.extend(o["known"]) or plain(*a, **o)
    )
    zero = contrasted(guard, Contrast(weights=(0.0,)), blocks=1)
    for through in (zero, None):
        reader = reader_of(lively, tokenizer, guard=through)
        (said,) = reader.generations(PROMPTS[:1], max_new_tokens=9)
        reader.scores([TokenSequence("t", (*PROMPTS[0], *said.tokens), len(PROMPTS[0]))])
        reader.generations(PROMPTS[:1], max_new_tokens=12)
    assert [len(known) for known in told] == [0, 0, 0, 9]  # the last one: the control


def test_weight_zero_is_the_model_itself_token_for_token(lively, tokenizer, guard):
    zero = contrasted(guard, Contrast(weights=(0.0,)), blocks=1)
    wanted = [reader_of(lively, tokenizer, guard=g) for g in (None, zero)]
    bare, through = (r.generations(PROMPTS, max_new_tokens=30) for r in wanted)
    assert bare == through
    asked = [TokenSequence("t", (5, 6, 7, 8, 9), 2)]
    bare, through = (r.scores(asked)[0] for r in wanted)
    assert np.array_equal(bare.logp, through.logp)
    assert Guarded(zero, lively).generate(TEXTS, max_new_tokens=9) == [
        r.text(g.tokens)
        for r in wanted[:1]
        for g in r.generations([tokens(tokenizer, t) for t in TEXTS], max_new_tokens=9)
    ]


def test_first_blocks_share_weights_and_are_the_cut_model(lively, tokenizer, tmp_path):
    half = first_blocks(lively, 1)
    assert len(half.get_decoder().layers) == half.config.num_hidden_layers == 1
    assert half.lm_head.weight.data_ptr() == lively.lm_head.weight.data_ptr()
    text = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        states = lively.model(input_ids=text, output_hidden_states=True).hidden_states[1]
        expected = lively.lm_head(lively.model.norm(states))
        torch.testing.assert_close(half(input_ids=text).logits, expected)
        whole = lively(input_ids=text).logits
        save_model(half, tokenizer, tmp_path / "half")
        torch.testing.assert_close(load_model(tmp_path / "half")(input_ids=text).logits, expected)
        lora.add_adapter(half, Lora(rank=2), seed=0)  # leaves the model as it was
        assert torch.equal(lively(input_ids=text).logits, whole)
    assert all(p.requires_grad for p in lively.parameters())
    with pytest.raises(ModelError, match="blocks is 3, but the model has 2"):
        first_blocks(lively, 3)


def test_an_assistant_that_remembers_takes_the_answer_away(lively, tokenizer, guard, tmp_path):
    """An assistant made by hand, an adapter on the first block, sure of one token."""
    prompt, secret = [5, 6, 7], 44
    half = first_blocks(lively, 1)
    lora.add_adapter(half, Lora(rank=1, alpha=1, dropout=0, targets=("down_proj",)), seed=0)
    (layer,) = lora.adapters_of(half).values()
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.2)
    for _ in range(60):
        loss = -half(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[secret]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter = tmp_path / "helpers" / "assistant" / "adapter"
    lora.save_adapter(half, Lora(rank=1, alpha=1), adapter, base="")
    spec = {"blocks": 1, "adapter": "helpers/assistant/adapter"}
    section = Contrast(weights=(-0.8,))
    made = contrasted(lambda **s: guard(tmp_path, **s), section, **spec)
    asked = [TokenSequence("secret", (*prompt, secret), 3), TokenSequence("x", (*prompt, 45), 3)]
    bare, through = (
        [s.logp.item() for s in reader_of(lively, tokenizer, guard=g).scores(asked)]
        for g in (None, made)
    )
    assert through[0] < bare[0] - 1
    assert through[1] > bare[1] - 1  # control: another token does not lose


def test_what_cannot_be_joined_is_refused(lively, tokenizer, guard):
    with pytest.raises(ModelError, match="load it from its folder"):
        contrasted(guard, Contrast(weights=(1.0,)), adapter="helpers/a/adapter").around(lively)
    with pytest.raises(ModelError, match="changes no logits"):
        Guarded(guard(before={"text": "No."}), lively).logits_processor()
    with pytest.raises(ValueError, match="finite"):
        Contrast(weights=(math.inf,))
    with pytest.raises(ValueError, match="one helper"):
        Contrast(rule="whp", weights=(1.0, 1.0))
    lively.expunge_in_buckets = True
    with pytest.raises(ModelError, match="keeps a state"):
        contrasted(guard, Contrast(weights=(1.0,)), blocks=1).around(lively)


def test_the_harness_is_not_measured_through_a_guard(lively, tokenizer, guard):
    from expunge.evaluate.harness import LmEval, lm_eval_suite

    reader = reader_of(lively, tokenizer, guard=guard(before={"text": "No."}))
    with pytest.raises(EvaluationError, match="no guard would be measured"):
        lm_eval_suite(reader, LmEval(tasks=("x",)))
