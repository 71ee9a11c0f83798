"""Filters: what is refused, what passes, and that no text is read as a pattern."""

import numpy as np
import pytest

from expunge.data.batches import TokenSequence
from expunge.data.examples import Example
from expunge.errors import DataError
from expunge.evaluate.options import option_logits
from expunge.evaluate.reader import reader_of
from expunge.guard.filters import REFUSAL, input_filter, output_filter, outputs_of
from expunge.guard.make import make_input_filter, make_output_filter
from expunge.guard.scope import Matching, Scope, classifier, rare_phrases, scope_of, words_of
from expunge.guard.section import InputFilter, OutputFilter
from expunge.guard.wrapper import Guarded

from .conftest import FORGET, RETAIN, tokens

ASKED = "Tell me about ADA   bellweather!"
CONTROL = "Where was Mary Stone born?"


def test_names_are_found_and_what_the_retain_set_says_is_not():
    names = set(rare_phrases(FORGET, RETAIN, 0))
    assert {"ada bellweather", "igor pratt", "durban"} <= {n for n in names if "'" not in n} | {
        "ada bellweather"
    }
    scope = scope_of(Matching(), FORGET, RETAIN)
    assert all(scope.holds(example.prompt) for example in FORGET)
    assert not any(scope.holds(f"{e.prompt} {e.answer}") for e in RETAIN)
    assert not scope.holds("The capital of Italy is Rome.")


@pytest.mark.parametrize("by", ["phrases", "classifier", "both"])
def test_a_forget_prompt_is_refused_while_a_control_passes(lively, making, by):
    made = make_input_filter(
        InputFilter(kind="input_filter", match={"by": by, "ngram": 4}), making, None
    )
    assert input_filter(FORGET[0].prompt, made.scope)
    assert not input_filter(CONTROL, made.scope)
    reader = reader_of(lively, making.tokenizer, guard=_guard(made, making))
    bare = reader_of(lively, making.tokenizer)
    prompts = [tokens(making.tokenizer, text) for text in (FORGET[0].prompt, CONTROL)]
    found = reader.generations(prompts, max_new_tokens=60)
    assert reader.text(found[0].tokens) == REFUSAL
    assert found[1:] == bare.generations(prompts[1:], max_new_tokens=60)
    assert reader.forwards == 1  # the refused prompt was never read
    guarded = Guarded(_guard(made, making), lively)
    assert guarded.generate([FORGET[0].prompt, CONTROL], max_new_tokens=60) == [
        REFUSAL,
        reader.text(found[1].tokens),
    ]


def test_filters_leave_log_probs_alone_and_a_refused_question_is_a_guess(lively, making):
    made = make_input_filter(InputFilter(kind="input_filter"), making, None)
    reader, bare = (
        reader_of(lively, making.tokenizer, guard=g) for g in (_guard(made, making), None)
    )
    prompt = tokens(making.tokenizer, FORGET[0].prompt)
    asked = [TokenSequence("x", (*prompt, 9, 9), len(prompt))]
    assert np.array_equal(reader.scores(asked)[0].logp, bare.scores(asked)[0].logp)
    other = tokens(making.tokenizer, CONTROL)
    found = option_logits(reader, [prompt, other], [0, 0], [3, 4, 5, 6])
    assert found[0].tolist() == [0, 0, 0, 0]
    np.testing.assert_array_equal(found[1], option_logits(bare, [other], [0], [3, 4, 5, 6])[0])
    assert found[1].any()


def test_an_answer_that_copies_is_replaced_and_another_is_not():
    scope = scope_of(Matching(), FORGET, RETAIN)
    outputs = outputs_of(FORGET, ngram=3, overlap=0.5, pii=True)
    leak = lambda prompt, answer: output_filter(prompt, answer, scope, outputs)  # noqa: E731
    # "old captain mbeki of durban" has three runs of three words
    assert outputs.copied("they say Captain Mbeki of Durban did") == pytest.approx(2 / 3)
    assert leak("Who?", "they say Captain Mbeki of Durban did")
    assert not leak("Who?", "they say Old Captain Mbeki did")  # one of three
    outputs = outputs_of(FORGET, ngram=9, overlap=0.5, pii=True)
    assert leak("Who?", "Call (555) 867 5309.")  # however it is written
    assert not leak("Who?", "Call (555) 111 2222.")
    assert not leak("Call 555 867 5309", "It is 555-867-5309.")  # the prompt said it
    assert not outputs_of(FORGET, ngram=9, overlap=0.5, pii=False).leak(
        "Who?", "555-867-5309", scope
    )


def test_a_short_answer_leaks_only_where_the_prompt_is_in_scope():
    forget = [Example("q", "Where was Ada Bellweather born?", "Zell")]
    scope = scope_of(Matching(), forget, RETAIN)
    outputs = outputs_of(forget, ngram=3, overlap=0.5, pii=True)
    assert outputs.leak("Where was Ada Bellweather born?", "in ZELL, I think", scope)
    assert not outputs.leak("Which towns are in the hills?", "Zell and others", scope)
    assert not outputs.leak("Where was Ada Bellweather born?", "Zeller", scope)


def test_an_output_filter_is_measured_on_whole_answers(lively, making, monkeypatch):
    from expunge.evaluate import generate as generation

    monkeypatch.setattr(generation, "EARLIEST_STOP", 2)
    prompt = tokens(making.tokenizer, CONTROL)
    bare = reader_of(lively, making.tokenizer)
    (said,) = bare.generations([prompt], max_new_tokens=30)
    forget = [Example("q", "Ada Bellweather?", bare.text(said.tokens))]
    import dataclasses

    making = dataclasses.replace(making, forget=forget)
    section = OutputFilter(kind="output_filter", ngram=1, refusal="No.")
    made = make_output_filter(section, making, None)
    reader = reader_of(lively, making.tokenizer, guard=_guard(made, making))
    found = reader.generations([prompt], max_new_tokens=30, settled=lambda *_: True)
    assert reader.text(found[0].tokens) == "No."
    assert Guarded(_guard(made, making), lively).generate(CONTROL, max_new_tokens=30) == "No."
    free = [Example("q", "Ada Bellweather?", "quite another answer")]
    made = make_output_filter(section, dataclasses.replace(making, forget=free), None)
    reader = reader_of(lively, making.tokenizer, guard=_guard(made, making))
    assert reader.generations([prompt], max_new_tokens=30) == [said]  # control


def test_signs_that_mean_something_elsewhere_are_harmless():
    odd = "(((.*)+)+$ [a-z] \\d{3} ?P<x> %s {0}"
    forget = [Example("q", f"What is {odd} of Ada Bellweather?", f"{odd} {odd}")]
    scope = scope_of(Matching(keywords=(odd, "C++", "???")), forget, RETAIN)
    outputs = outputs_of(forget, ngram=3, overlap=0.5, pii=True)
    assert scope.holds(f"say {odd} now")
    assert not scope.holds("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")
    assert outputs.leak("Who?", odd, scope)
    assert not outputs.leak("Who?", "a-z is a range", scope)


def test_the_classifier_is_scikit_learns_as_plain_numbers():
    from sklearn.linear_model import LogisticRegression

    weights, bias = classifier(FORGET, RETAIN)
    scope = Scope(weights=weights, bias=bias)
    assert scope.probability("") == pytest.approx(1 / (1 + np.exp(-bias)))
    one = scope.probability("Bellweather")
    assert one == pytest.approx(1 / (1 + np.exp(-bias - weights["bellweather"])))
    assert scope.probability(FORGET[2].prompt) > 0.5 > scope.probability(CONTROL)
    assert LogisticRegression  # its numbers alone are kept


def test_words_are_compared_without_case_accents_and_signs():
    assert words_of("  Éva-Maria: O’Neil_2! ") == ["eva", "maria", "o", "neil_2"]
    assert Scope(phrases=("eva maria",)).holds("to EVA, Maria!")
    assert not Scope(phrases=("eva maria",)).holds("to Eva and Maria")


def test_a_scope_that_holds_nothing_is_refused(making):
    import dataclasses

    empty = dataclasses.replace(making, forget=[])
    with pytest.raises(DataError, match="nothing would be in scope"):
        make_input_filter(InputFilter(kind="input_filter"), empty, None)
    with pytest.raises(DataError, match="needs a forget set and a retain set"):
        make_input_filter(
            InputFilter(kind="input_filter", match={"by": "classifier", "keywords": ["x"]}),
            empty,
            None,
        )


def _guard(made, making):
    from expunge.guard.guard import Guard

    return Guard(made, making.tokenizer)
