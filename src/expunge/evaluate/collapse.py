"""Collapse: does the model still write language where it should have been left alone?

The official scores do not say: a model that answers nothing has forgotten everything. Judged are
only continuations of unfinished texts, from the retain half and from neutral prompts. Questions
are not (a healthy base model may answer them with nothing), nor is the forget half, where an
unlearned model may fall silent: both are reported beside it.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from expunge.data.examples import Document
from expunge.evaluate.words import marks

WINDOW = 48
"""New tokens that are looked at. Later ones say little: sound small models loop in the end too."""

LONGEST_PERIOD = 8
"""Tokens of the longest cycle that counts as a loop; a repeated sentence is longer."""

FEWEST_WORDS = 50
"""Shares of words are not taken from fewer."""

_COMMON_WORDS = """
a about after all also an and any are as at back be because been before being between both but by
can could day did do does down each even every few first for from get go good had has have he her
here him his how i if in into is it its just know life like little long made make man many may me
more most much must my new no not now of off on one only or other our out over own part people said
same see she should since so some still such than that the their them then there these they this
those three through time to two under up us use used very was way we well were what when where
which while who will with work world would year years you your
"""

COMMON = frozenset(_COMMON_WORDS.split())
"""English function words and the commonest others: 30 to 50 % of the words of any English text,
a tenth at most of tokens drawn at random."""

_OPENINGS = """
The sun rises in the east and sets in the
Water is made of hydrogen and oxygen, and when it is heated it
She opened the door, looked out at the rain, and decided to
The most important thing to remember when you learn to cook is
In the middle of the village there was an old well where people
My brother and I used to walk to school every morning, and we
A good friend is someone who listens to you when
The train was late again, so the passengers on the platform
Trees lose their leaves in autumn because the days
To plant a garden, you first need to prepare the
The children were playing in the park when suddenly
Doctors recommend that people drink enough water and
Many languages are spoken in Europe, and some of them
When the meeting was over, everyone went back to
Bread is made from flour, water, salt and
The library is open from Monday to Friday, and visitors can
Birds build their nests in the spring so that
He had never seen the sea before, and when he first
The government announced on Tuesday that it would
A computer program is a list of instructions that
"""

NEUTRAL = tuple(
    Document(f"neutral-{number}", text)
    for number, text in enumerate(_OPENINGS.strip().splitlines())
)
"""Openings on which every sound English model goes on for a sentence or two."""


@dataclass(frozen=True, slots=True)
class Window:
    """The first WINDOW tokens of one generation, and their text."""

    text: str
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Limit:
    """A measure speaks of collapse when it lies beyond `value`."""

    value: float
    above: bool = True

    def is_crossed(self, measured: float | None) -> bool:
        """Whether `measured` is beyond the limit; what was not measured is not."""
        if measured is None:
            return False
        return measured > self.value if self.above else measured < self.value


def judge(
    groups: Mapping[str, Sequence[Window]],
    *,
    known: frozenset[str] = frozenset(),
    neutral_nll: float | None = None,
    vocabulary_size: int | None = None,
    letters: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Measure every group; `collapsed` if "retain" or "neutral" crosses one of LIMITS.

        wordless > 0.5,  looping > 0.5,  nonwords > 0.5,  language < 0.2,  surprise > 0.7

    These are `collapse_measures` of the first 48 tokens that each prompt is continued by.
    `known` are words that count as words and as language: those frequent in the data itself.
    `surprise` is the NLL of plain text as a share of a blind guess's, ln V. The share of MMLU's
    commonest letter is reported, not judged: small sound models have a favourite letter too.
    """
    found: dict[str, Any] = {name: measures(group, known) for name, group in groups.items()}
    surprise = None
    if neutral_nll is not None and vocabulary_size:
        surprise = neutral_nll / math.log(vocabulary_size)
    reasons = [
        _reason(f"{group}: {name}", found[group][name], limit)
        for group in ("retain", "neutral")
        for name, limit in LIMITS.items()
        if group in found and limit.is_crossed(found[group].get(name))
    ]
    if LIMITS["surprise"].is_crossed(surprise):
        reasons.append(_reason("neutral: surprise", surprise, LIMITS["surprise"]))
    return {
        "collapsed": bool(reasons),
        "reasons": reasons,
        **found,
        "surprise": surprise,
        "mmlu_top_letter": max(letters.values()) if letters else None,
    }


def measures(windows: Sequence[Window], known: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The measures of one group, each a share in 0..1 but for `entropy`; None of nothing.

        empty: texts of white space alone;  wordless: texts without two letters in a row
        looping: texts that end in a cycle;  nonwords: words of impossible shape, of all words
        language: words among the commonest of English or of the data, of all words
        top_token: how often the commonest token, of all;  distinct_n, entropy: as they say

    Words are runs of two letters or more; shares of fewer than 50 words are not taken.

    Source: this project.
    """
    words = [word for window in windows for word in letter_words(window.text)]
    tokens = Counter(token for window in windows for token in window.tokens)
    enough = len(words) >= FEWEST_WORDS
    return {
        "n": len(windows),
        "empty": _share([not window.text.strip() for window in windows]),
        "wordless": _share([not letter_words(window.text) for window in windows]),
        "looping": _share([is_looping(window.tokens) for window in windows]),
        "language": _share([w.lower() in COMMON | known for w in words]) if enough else None,
        "nonwords": _share([is_nonword(w, known) for w in words]) if enough else None,
        "distinct_1": distinct(windows, 1),
        "distinct_2": distinct(windows, 2),
        "entropy": entropy(tokens),
        "top_token": max(tokens.values()) / tokens.total() if tokens else None,
    }


def letter_words(text: str) -> list[str]:
    """Runs of two letters or more, marks counted; a number or a lone letter is no word here."""
    return _letters().findall(text)


@cache
def _letters() -> re.Pattern[str]:
    return re.compile(rf"(?:[^\W\d_]|[{marks()}]){{2,}}")


def is_looping(tokens: Sequence[int]) -> bool:
    """Whether the second half (six tokens or more) repeats a cycle of at most LONGEST_PERIOD.

    A cycle must come round three times within that half.

    Source: this project.
    """
    tail = list(tokens[-max(6, len(tokens) // 2) :])
    longest = min(LONGEST_PERIOD, len(tail) // 3)
    return len(tail) >= 6 and any(tail[p:] == tail[:-p] for p in range(1, longest + 1))


def is_nonword(word: str, known: frozenset[str] = frozenset()) -> bool:
    """Whether a run of letters has a shape that words do not have.

    A proxy, for no dictionary is at hand: no vowel, six consonants in a row, a letter thrice in
    a row, two capitals after a small letter, over twenty letters, or letters of several scripts.
    Acronyms (all capitals) pass; so does what `known` holds.

    Source: this project.
    """
    lower = word.lower()
    if lower in COMMON or lower in known or word.isupper():
        return False
    if len(word) > 20 or re.search(r"(.)\1\1", lower) or re.search(r"[a-z][A-Z]{2}", word):
        return True
    if not lower.isascii():
        return bool(re.search(r"[a-z]", lower)) and bool(re.search(r"[\u0370-\uffff]", lower))
    return (len(word) > 2 and not re.search(r"[aeiouy]", lower)) or bool(
        re.search(r"[bcdfghjklmnpqrstvwxz]{6}", lower)
    )


def distinct(windows: Sequence[Window], n: int) -> float | None:
    """Distinct-n: different token n-grams among all of them, the mean over generations.

    Source: Li et al. 2016, arXiv:1510.03055.
    """
    shares = []
    for window in windows:
        grams = list(zip(*(window.tokens[i:] for i in range(n)), strict=False))
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else None


def entropy(tokens: Counter[int]) -> float | None:
    """Entropy of the distribution of all tokens written, in bits.

        H = -Σ_t p_t log2 p_t,    p_t the share of token t

    Source: Shannon 1948.
    """
    if not tokens:
        return None
    p = np.array(list(tokens.values())) / tokens.total()
    return float(-(p * np.log2(p)).sum()) + 0.0


def frequent_words(texts: Sequence[str], count: int = 200) -> frozenset[str]:
    """The commonest words of the data, so that the tests know its language and its names."""
    words = Counter(word.lower() for text in texts for word in letter_words(text))
    return frozenset(word for word, times in words.most_common(count) if times > 1)


def _share(claims: Sequence[bool]) -> float | None:
    return sum(claims) / len(claims) if claims else None


def _reason(name: str, measured: float | None, limit: Limit) -> str:
    return f"{name} {measured:.2f} {'>' if limit.above else '<'} {limit.value:g}"


LIMITS = {
    "wordless": Limit(0.5),
    "looping": Limit(0.5),
    "nonwords": Limit(0.5),
    "language": Limit(0.2, above=False),
    "surprise": Limit(0.7),
}
