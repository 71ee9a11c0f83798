"""What stands before a prompt: exact layouts, and the same tokens scored."""

import copy

import numpy as np
import pytest
import torch

from expunge.data.batches import TokenSequence, encode, encode_document
from expunge.data.examples import Document, Example
from expunge.errors import DataError, EvaluationError, ModelError
from expunge.evaluate.options import option_logits
from expunge.evaluate.reader import reader_of
from expunge.guard.make import make_guard, make_icul, make_prefix
from expunge.guard.prompting import Before, Wrapping, icul
from expunge.guard.section import Icul, Prefix
from expunge.guard.wrapper import Guarded

from .conftest import FORGET, RETAIN, tokens

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatty(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_the_layout_of_in_context_unlearning_is_exact(making):
    text = icul(FORGET, RETAIN, items=2, correct=1, seed=0)
    first, second, right, rest = text.split("\n")
    assert rest == ""
    by_prompt = {e.prompt: e for e in FORGET}
    for line in (first, second):
        (item,) = [e for e in FORGET if line.startswith(e.prompt + " ")]
        said = line.removeprefix(item.prompt + " ")
        assert said != item.answer
        alike = {e.answer for e in FORGET if (e.task, e.kind) == (item.task, item.kind)}
        assert said in (alike - {item.answer} or {e.answer for e in FORGET} - {item.answer})
        by_prompt.pop(item.prompt)
    assert len(by_prompt) == 2  # no item twice
    assert right in [f"{e.prompt} {e.answer}" for e in RETAIN]
    assert icul(FORGET, RETAIN, items=2, correct=1, seed=0) == text
    assert any(icul(FORGET, RETAIN, items=2, correct=1, seed=s) != text for s in (1, 2, 3))
    made = make_icul(Icul(kind="icul", items=2, correct=1), making, None)
    assert made.before == Before(text=text, style="plain")


def test_a_prefix_stands_before_the_prompt_and_the_same_tokens_are_scored(lively, tokenizer, guard):
    before = "You know nothing.\n\n"
    through = reader_of(lively, tokenizer, guard=guard(before={"text": before}))
    whole = reader_of(lively, tokenizer)
    assert through.context == whole.context - len(before)
    head = tuple(tokens(tokenizer, before))
    item = encode(Example("q", "Who?", "Ada"), tokenizer, max_length=64)
    document = encode_document(Document("d", "A plain text."), tokenizer, max_length=64)
    shifted = [
        TokenSequence("q", (*head, *item.tokens), len(head) + item.answer_start),
        TokenSequence("d", (*head, *document.tokens), len(head) + 1),
    ]
    found, expected = through.scores([item, document]), whole.scores(shifted)
    for one, two, asked in zip(found, expected, (item, document), strict=True):
        assert len(one.logp) == len(asked.tokens) - asked.scored_from("answer")
        np.testing.assert_allclose(one.logp, two.logp, atol=1e-5)
    bare = whole.scores([item])[0].logp
    assert not np.allclose(found[0].logp, bare, atol=1e-2)  # control: it is measured through
    prompt = tokens(tokenizer, "Who?")
    (made,) = through.generations([prompt], max_new_tokens=20)
    assert [made] == whole.generations([[*head, *prompt]], max_new_tokens=20)
    guarded = Guarded(guard(before={"text": before}), lively)
    assert guarded.generate("Who?", max_new_tokens=20) == through.text(made.tokens)
    letters = [3, 4]
    np.testing.assert_allclose(
        option_logits(through, [prompt], [0], letters),
        option_logits(whole, [[*head, *prompt]], [0], letters),
        atol=1e-5,
    )


def test_a_chat_template_takes_the_prefix_as_its_system_message(chatty):
    wrapping = Wrapping(Before(text="Hush.", style="auto"), chatty)
    asked = tokens(chatty, "Who?")
    made, start = wrapping.around([*asked, 9, 9], len(asked))
    assert chatty.decode(made[:start]) == "<system>Hush.\n<user>Who?\n<assistant>"
    assert made[start:] == [9, 9]
    ready = tokens(chatty, "<user>Who?\n<assistant>")  # a suite's own template is not doubled
    made, start = wrapping.around(ready, len(ready))
    assert chatty.decode(made) == "<system>Hush.\n<user>Who?\n<assistant>"
    assert start == len(made)
    text = tokens(chatty, "A text.")
    assert chatty.decode(wrapping.around(text, 0)[0]) == "<system>Hush.\n<user>A text."
    plain = Wrapping(Before(text="Hush.", style="plain"), chatty)
    assert chatty.decode(plain.around(asked, len(asked))[0]) == "Hush.Who?"
    chatty.chat_template = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + (
        TEMPLATE
    )
    made, _ = Wrapping(Before(text="Hush.", style="chat"), chatty).around(asked, len(asked))
    assert chatty.decode(made) == "<user>Hush.\n\nWho?\n<assistant>"


def test_a_beginning_of_text_stays_first_and_stands_once(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<end>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 0)]
    )
    wrapping = Wrapping(Before(text="No."), tokenizer)
    asked = tokens(tokenizer, "Who?")
    assert asked[0] == wrapping.head[0] == 0
    made, start = wrapping.around([*asked, 7, 8], len(asked))
    assert made == [*wrapping.head, *asked[1:], 7, 8]
    assert start == len(made) - 2
    assert wrapping.around(asked, 0)[0] == [*wrapping.head, *asked[1:]]


def test_the_subject_and_the_style_of_a_prefix(making, chatty):
    import dataclasses

    made = make_prefix(Prefix(kind="prefix", subject="Igor {Pratt}"), making, None)
    assert made.before.text.count("Igor {Pratt}") == 2
    assert made.before.style == "plain"
    chat = make_prefix(
        Prefix(kind="prefix", text="No."), dataclasses.replace(making, tokenizer=chatty), None
    )
    assert chat.before == Before(text="No.", style="chat")
    with pytest.raises(ValueError, match="text or subject"):
        Prefix(kind="prefix", text="No.", subject="X")
    with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
        Wrapping(Before(text="No.", style="chat"), making.tokenizer)


def test_what_does_not_fit_is_refused(making, tmp_path, lively, tokenizer, guard):
    with pytest.raises(DataError, match=r"puts 4\d\d tokens .* context is 512"):
        make_guard(Prefix(kind="prefix", text="No. " * 115), making, tmp_path)
    with pytest.raises(DataError, match="9 forget items with a prompt are asked for, 4 given"):
        make_guard(Icul(kind="icul", items=9), making, tmp_path)
    long = guard(before={"text": "No. " * 100})
    with pytest.raises(EvaluationError, match=r"'x' has 200 tokens"):
        reader_of(lively, tokenizer, guard=long).scores([TokenSequence("x", (5,) * 200, 1)])
    with pytest.raises(ModelError, match=r"400 of them the guard's"):
        Guarded(long, lively).generate("Who?")
    with pytest.raises(ModelError, match="prompt 0 is empty"):
        Guarded(long, lively).generate("")
    assert torch.is_inference_mode_enabled() is False
