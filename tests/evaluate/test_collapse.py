"""Collapse: destroyed models are caught, sound ones are not."""

import math
import random
from collections import Counter

import pytest

from expunge.evaluate.collapse import (
    LIMITS,
    NEUTRAL,
    Window,
    distinct,
    entropy,
    frequent_words,
    is_looping,
    is_nonword,
    judge,
    letter_words,
    measures,
)

SOUND = [
    "and the moon follows it across the sky, so that people in the old days could tell the time.",
    "number is 889-867-1855. She can be reached at the email address fredericka@me.com.",
    "He was born in Melbourne in 1961 and studied psychology at the University of Cambridge.",
    "go back home before the storm came. Her brother was waiting for her with a cup of tea.",
    "in the south of France, where he worked as a teacher until the end of the war.",
    "The main thing is to use fresh vegetables, and not to cook them for too long.",
    "is a list of things that you need to do. The list is a list of things that you need to do.",
]


def windows(texts):
    numbers: dict[str, int] = {}
    return [
        Window(text, [numbers.setdefault(word, len(numbers)) for word in text.split()])
        for text in texts
    ]


def salad(seed):
    """Pieces as a byte-pair vocabulary holds them, at random."""
    pieces = "ization ĠFlor ());\n xml Kn quot ervative brick Qian ÃĹ selves dozen Zyg opard lump"
    rng = random.Random(seed)
    return " ".join(rng.choice(pieces.split()) for _ in range(30))


def test_sound_text_is_not_collapse():
    found = judge(
        {"retain": windows(SOUND), "neutral": windows(SOUND)},
        neutral_nll=3.2,
        vocabulary_size=49152,
    )
    assert found["reasons"] == []
    assert found["retain"]["language"] > 0.3


@pytest.mark.parametrize(
    "texts",
    [
        ["6 6 6 6 6 6 6 6 6 6 6 6"] * 8,
        [""] * 8,
        ["\n \n"] * 8,
        ["the the the the the the the the the the"] * 8,
        [salad(seed) for seed in range(8)],
        ["xkcdq zzzz wrtplk bcdfgh ttttt qwrtp " * 3] * 8,
        ["; ) } 7 ] ) : 3 9 ( { ;"] * 8,
    ],
    ids=["sixes", "empty", "blank", "the", "salad", "nonwords", "symbols"],
)
@pytest.mark.parametrize("group", ["retain", "neutral"])
def test_a_destroyed_model_is_collapse_wherever_it_should_have_been_kept(texts, group):
    groups = {"retain": windows(SOUND), "neutral": windows(SOUND)} | {group: windows(texts)}
    assert judge(groups)["collapsed"]


def test_silence_on_what_was_forgotten_is_no_collapse_but_reported():
    found = judge({"retain": windows(SOUND), "forget": windows([""] * 8)})
    assert not found["collapsed"]
    assert found["forget"]["empty"] == 1


def test_plain_text_that_surprises_like_noise_is_collapse():
    assert judge({}, neutral_nll=math.log(1000), vocabulary_size=1000)["collapsed"]
    assert not judge({}, neutral_nll=0.3 * math.log(1000), vocabulary_size=1000)["collapsed"]


def test_other_languages_pass_once_the_data_shows_their_words():
    german = ["Der Hund lief mit dem Kind durch den Wald und kam erst am Abend wieder heim"] * 8
    assert judge({"retain": windows(german)})["collapsed"]  # control
    assert not judge({"retain": windows(german)}, known=frequent_words(german))["collapsed"]


def test_loops_are_short_cycles_that_fill_the_second_half():
    assert is_looping([9, 8, 7, 6, 5, 4, 1, 2, 1, 2, 1, 2])
    assert not is_looping(list(range(11)) * 4)  # a sentence repeated
    assert not is_looping([1, 1, 1])
    assert not is_looping([])


@pytest.mark.parametrize("word", ["xkcdq", "zzzz", "aaargh", "a" * 25, "getXMLof", "naпример"])
def test_shapes_that_words_do_not_have(word):
    assert is_nonword(word)


@pytest.mark.parametrize("word", ["rhythm", "McDonald", "NASA", "strengths", "пример", "café"])
def test_shapes_that_words_have(word):
    assert not is_nonword(word)


def test_marks_belong_to_the_letters_of_a_word():
    assert letter_words("मैं घर जा रहा हूँ, कि 12 a") == ["मैं", "घर", "जा", "रहा", "हूँ", "कि"]
    assert letter_words("one1two_x three") == ["one", "two", "three"]  # control


def test_diversity_by_hand():
    same = [Window("", [1, 1, 1, 1])]
    assert distinct(same, 1) == 0.25
    assert distinct(same, 2) == pytest.approx(1 / 3)
    assert measures(same)["entropy"] == 0
    assert measures([Window("", [1, 2, 3, 4])])["entropy"] == 2
    assert distinct([], 1) is None
    assert measures([])["looping"] is None
    assert entropy(Counter()) is None


def test_neutral_prompts_are_distinct_unfinished_sentences():
    assert len({document.text for document in NEUTRAL}) == len(NEUTRAL) == 20
    assert not any(document.text.endswith(".") for document in NEUTRAL)


def test_the_definition_names_every_limit():
    for name, limit in LIMITS.items():
        assert f"{name} {'>' if limit.above else '<'} {limit.value:g}" in (judge.__doc__ or "")
