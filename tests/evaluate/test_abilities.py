"""General ability: what the metrics of its sets say, by hand."""

import math

import pytest

from expunge.evaluate.abilities import (
    exact_answer,
    ngram_entropy,
    reasoned,
    token_f1,
    truthful_mc1,
    truthful_mc2,
)


@pytest.mark.parametrize(
    ("answers", "said", "right"),
    [
        (["The Nile"], "nile!", True),
        (["Nile", "the Nile river"], "Nile River", True),
        (["Nile"], "the river Nile", False),
        (["(A)"], "(a)", True),
        (["(B)"], "(A)", False),  # of which nothing is left without articles
        (["True"], "true", True),
        (["True"], "t", False),
        (["Nile"], "", False),
        (["..."], "", True),
    ],
)
def test_an_answer_is_exact_word_by_word(answers, said, right):
    assert exact_answer(answers, said) is right


@pytest.mark.parametrize(
    ("answers", "said", "score"),
    [
        (["the Nile"], "Nile", 1.0),
        (["White Nile river"], "a river", 2 * 1 / (3 + 1)),
        (["Amazon", "Nile"], "Nile Nile", 2 * 1 / (1 + 2)),  # each word as often as it stands
        (["Nile"], "Amazon", 0.0),
        (["Nile"], "", 0.0),
        (["!"], "", 1.0),
    ],
)
def test_f1_by_hand(answers, said, score):
    assert token_f1(answers, said) == pytest.approx(score)


def test_truthfulness_by_hand():
    assert truthful_mc1(-1.0, [-2.0, -1.5])
    assert not truthful_mc1(-1.0, [-2.0, -0.5])
    assert not truthful_mc1(-1.0, [-1.0])  # a tie
    right, wrong = [math.log(0.2), math.log(0.1)], [math.log(0.5)]
    assert truthful_mc2(right, wrong) == pytest.approx(0.3 / 0.8)
    assert truthful_mc2([-9000.0], [-9000.0]) == pytest.approx(0.5)  # exp of neither is above 0


def test_entropy_by_hand():
    pairs, triples = math.log2(3), math.log2(2)
    assert ngram_entropy("one, two three") == pytest.approx((2 / 3 * pairs + 4 / 3 * triples) / 2)
    assert ngram_entropy("no no no no") == 0.0
    assert ngram_entropy("") == ngram_entropy("word") == 0.0
    pairs = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))  # a b, b a, a b
    assert ngram_entropy("a b a b") == pytest.approx((2 / 3 * pairs + 4 / 3 * 1) / 2)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" First, 2 + 2 is 4. So the answer is 4. Q: next", "4"),
        ("The answer is (B). The answer is (C).", "(B)"),
        ("so the answer is 4", "so the answer is 4"),  # no full stop
        ("the answer\nis 4.", "the answer\nis 4."),
        (" 4 ", "4"),
        ("the answer is .", "NOANSWER"),
        ("", "NOANSWER"),
    ],
)
def test_a_chain_of_thought_ends_with_its_answer(text, answer):
    assert reasoned(text) == answer
