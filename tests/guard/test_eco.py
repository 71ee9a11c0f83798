"""Corrupted embeddings: the formula, in batches and packs alike, only where in scope."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge.data.batches import TokenSequence, encode
from expunge.evaluate.options import option_logits
from expunge.evaluate.reader import reader_of
from expunge.guard.corrupt import STRONGEST, WEAKEST, eco, search_strength
from expunge.guard.guard import Guard
from expunge.guard.make import make_eco
from expunge.guard.section import Eco
from expunge.guard.wrapper import Guarded

from .conftest import FORGET, taught, tokens

SCOPE = {"phrases": ["ada bellweather"]}
CONTROL = "Where was Mary Stone born?"


def test_noise_is_that_of_the_formula_and_the_same_for_the_same_prompt():
    embeddings, prompt = torch.zeros(500, 40), list(range(500))
    one = eco(embeddings, prompt, 0.5, strength=3.0, seed=1)
    assert one.std().item() == pytest.approx(1.5, rel=0.02)
    assert abs(one.mean().item()) < 0.03
    assert torch.equal(one, eco(embeddings, prompt, 0.5, strength=3.0, seed=1))
    assert not torch.equal(one, eco(embeddings, prompt, 0.5, strength=3.0, seed=2))
    assert not torch.equal(one, eco(embeddings, prompt[::-1], 0.5, strength=3.0, seed=1))
    torch.testing.assert_close(eco(embeddings + 7, prompt, 0.5, strength=3.0, seed=1), one + 7)


@pytest.fixture
def noised(guard):
    return guard(scope=SCOPE, corruption={"strength": 2.0, "seed": 4})


@torch.no_grad()
def corrupted(model, prompt, rest):
    """Logits after prompt and rest, the prompt's embeddings corrupted by the formula."""
    embedding = model.get_input_embeddings()
    rms = float(embedding.weight.square().mean().sqrt())
    changed = eco(embedding(torch.tensor(prompt)), prompt, rms, strength=2.0, seed=4)
    inputs = torch.cat([changed, embedding(torch.tensor(rest, dtype=torch.long))])
    return model(inputs_embeds=inputs[None]).logits[0]


def test_only_prompts_in_scope_are_corrupted_and_batches_change_nothing(lively, tokenizer, noised):
    texts = [FORGET[0].prompt, CONTROL, "Ada Bellweather, who is she?"]
    asked = [tokens(tokenizer, text) for text in texts]
    through, bare = (reader_of(lively, tokenizer, guard=g) for g in (noised, None))
    found = through.generations(asked, max_new_tokens=20)
    expected = []
    for prompt in (asked[0], asked[2]):
        new: list[int] = []
        while len(new) < 20 and (token := int(corrupted(lively, prompt, new)[-1].argmax())):
            new.append(token)
        expected.append(new)
    plain = bare.generations(asked, max_new_tokens=20)
    assert [found[0].tokens, found[2].tokens] == expected
    assert found[1] == plain[1]
    assert found[0] != plain[0]
    alone = [through.generations([p], max_new_tokens=20)[0] for p in asked]
    assert alone == found
    assert Guarded(noised, lively).generate(texts, max_new_tokens=20) == [
        through.text(made.tokens) for made in found
    ]


def test_scores_and_options_are_those_behind_the_corrupted_prompt(lively, tokenizer, noised):
    through, bare = (reader_of(lively, tokenizer, guard=g) for g in (noised, None))
    prompt, control = tokens(tokenizer, FORGET[0].prompt), tokens(tokenizer, CONTROL)
    answer = [70, 71, 72]
    asked = [
        TokenSequence(str(n), (*p, *answer), len(p))
        for n, p in enumerate([prompt, prompt, control])
    ]
    found = through.scores(asked)
    log_p = corrupted(lively, prompt, answer)[len(prompt) - 1 : -1].log_softmax(-1)
    expected = [float(row[t]) for row, t in zip(log_p, answer, strict=True)]
    np.testing.assert_allclose(found[0].logp, expected, atol=1e-4)
    np.testing.assert_allclose(found[2].logp, bare.scores(asked[2:])[0].logp, atol=1e-5)
    whole = TokenSequence("document", tuple(prompt), 0)  # the text itself is what is sent
    log_p = corrupted(lively, prompt, [])[:-1].log_softmax(-1)
    expected = [float(row[t]) for row, t in zip(log_p, prompt[1:], strict=True)]
    np.testing.assert_allclose(through.scores([whole])[0].logp, expected, atol=1e-4)
    letters = [20, 30]
    found = option_logits(through, [prompt, control], [0, 0], letters)
    np.testing.assert_allclose(found[0], corrupted(lively, prompt, [])[-1, letters], atol=1e-4)
    np.testing.assert_allclose(found[1], option_logits(bare, [control], [0], letters)[0], atol=1e-4)


def test_the_search_finds_where_the_loss_crosses_its_target():
    assert search_strength(lambda s: 2 * s, 3.0, steps=30) == pytest.approx(1.5, rel=1e-4)
    assert search_strength(lambda s: 0.0, 3.0, steps=30) == pytest.approx(STRONGEST)
    assert search_strength(lambda s: 9.0, 3.0, steps=40) == pytest.approx(WEAKEST, rel=1e-3)


def test_a_strength_that_is_not_given_reaches_the_target(tiny, making, tokenizer):
    items = [encode(e, tokenizer, max_length=128, separator=" ") for e in FORGET]
    model = taught(tiny, items)
    making = replace(making, load=lambda: model, max_length=128)
    section = Eco(kind="eco", target=1.5, search_steps=9, match={"keywords": ["tale"]})
    made = make_eco(section, making, None)
    assert WEAKEST < made.corruption.strength < STRONGEST
    assert make_eco(section, making, None) == made
    through = reader_of(model, tokenizer, guard=Guard(made, tokenizer))
    known, forgotten = (
        float(np.mean([s.nll for s in reader.scores(items)]))
        for reader in (reader_of(model, tokenizer), through)
    )
    assert known < 0.3  # control: it was there
    assert forgotten == pytest.approx(1.5, abs=0.2)
