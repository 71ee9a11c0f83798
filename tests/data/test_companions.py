"""Companions that need no model: what is drawn for an item is never what it must not be."""

import re

import pytest

from expunge.data.batches import TokenSequence, encode
from expunge.data.companions import (
    WORDINGS,
    contains,
    mismatched,
    paraphrased,
    random_labels,
    refused,
    same,
    stand_ins,
)
from expunge.data.examples import Example
from expunge.data.refusals import read_refusals, refusals
from expunge.data.synthetic import Synthetic, invent
from expunge.errors import DataError

ITEMS = [
    Example("a-qa0", "Where?", "Oslo", "T1"),
    Example("b-qa0", "Whence?", "oslo.", "T1"),  # the same answer, written otherwise
    Example("c-qa0", "Who?", "Ann Lee", "T1"),
    Example("d-sc1", "It was", "raining all day.", "T2"),
]


def test_the_own_refusals_are_many_and_different():
    own = refusals()
    assert len(own) >= 50
    assert len({re.sub(r"\W+", " ", s.casefold()).strip() for s in own}) == len(own)
    assert all(s == s.strip() and s[-1] in ".!" for s in own)


def test_no_own_refusal_contains_an_invented_answer():
    documents = [d for side in invent(Synthetic(documents=3, nonmembers=2)) for d in side]
    answers = {answer for d in documents for _, answer in d.questions}
    assert len(answers) > 20
    assert not [(s, a) for s in refusals() for a in answers if contains(s, a)]
    assert contains("I was in Oslo once.", "oslo")  # control


def test_no_refusal_contains_the_answer_it_stands_for():
    sentences = ["I know no Oslo.", "No idea.", "Ask Ann Lee."]
    found = refused(ITEMS, sentences, count=9, seed=1)
    assert [sorted(mine) for mine in found] == [
        ["Ask Ann Lee.", "No idea."],
        ["Ask Ann Lee.", "No idea."],
        ["I know no Oslo.", "No idea."],
        sorted(sentences),
    ]
    with pytest.raises(DataError, match="every refusal contains the answer of a-qa0"):
        refused(ITEMS, sentences[:1], count=1, seed=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n \n", "holds no sentence"), ("No.\nYes.\nNo.\n", "holds the refusal 'No.' twice")],
)
def test_a_file_of_refusals_is_checked(tmp_path, text, message):
    path = tmp_path / "refusals.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_refusals(str(path))
    path.write_text("One.\n\n Two. \n")
    assert read_refusals(str(path)) == ["One.", "Two."]


@pytest.mark.parametrize("seed", range(5))
def test_a_mismatch_is_never_the_own_answer(seed):
    found = mismatched(ITEMS, ITEMS, count=9, seed=seed)
    for example, mine in zip(ITEMS, found, strict=True):
        assert not any(same(answer, example.answer) for answer in mine)
        assert len(mine) == len(set(mine)) == 2  # three different answers, less its own
    with pytest.raises(DataError, match="no item but a-qa0 has an answer other than 'Oslo'"):
        mismatched(ITEMS[:1], ITEMS[:2], count=1, seed=seed)


def test_draws_are_seeded_and_do_not_depend_on_the_other_items():
    def draws(items, seed):
        return refused(items, refusals(), count=3, seed=seed)

    assert draws(ITEMS, 1) == draws(ITEMS, 1)
    assert draws(ITEMS[2:], 1) == draws(ITEMS, 1)[2:]
    assert draws(ITEMS, 2) != draws(ITEMS, 1)


def test_a_paraphrase_keeps_the_answer():
    found = paraphrased(ITEMS, count=len(WORDINGS))
    for example, mine in zip(ITEMS, found, strict=True):
        assert len(set(mine)) == len(WORDINGS)
        assert all(example.answer in text and text != example.answer for text in mine)


def test_random_labels_keep_prompt_length_and_end(tokenizer):
    items = [encode(example, tokenizer, max_length=64) for example in ITEMS]
    items.append(TokenSequence("text", (7, 8, 9, 0), 0, ending=1))  # a plain text: all answer
    drawn = random_labels(items, range(1, 257), count=2, seed=3)
    for item, mine in zip(items, drawn, strict=True):
        start = max(1, item.answer_start)
        for one in mine:
            assert one.answer_start == item.answer_start
            assert len(one.tokens) == len(item.tokens)
            assert one.tokens[:start] == item.tokens[:start]
            assert one.tokens[-1] == 0
            assert 0 not in one.tokens[start:-1]
    assert len({one.tokens for mine in drawn for one in mine}) == 10  # all different
    assert random_labels(items, range(1, 257), count=2, seed=3) == drawn
    assert random_labels(items, range(1, 257), count=2, seed=4) != drawn


def test_stand_ins_come_from_the_same_task_first():
    others = [*ITEMS[1:], Example("e-qa0", "Why?", "Fog", "T1")]

    def usable(text):
        return not same(text, "Oslo")

    assert sorted(stand_ins(ITEMS[0], others, usable, count=2, seed=1)) == ["Ann Lee", "Fog"]
    assert "raining all day." in stand_ins(ITEMS[0], others, usable, count=3, seed=1)
    with pytest.raises(DataError, match="there is no alternate for a-qa0"):
        stand_ins(ITEMS[0], ITEMS[1:2], usable, count=2, seed=1)
