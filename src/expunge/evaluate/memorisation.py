"""Memorisation: how much of an answer the model says by itself, token by token.

Dimensions: L scored tokens of one answer.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np

LEAST_WORDS = 4
"""Words in a row from which on a passage counts as copied: three are common to any two texts."""


def exact_memorisation(hits: Sequence[bool]) -> float | None:
    """The share of an answer's tokens that are the model's first choice, given those before.

        EM = (1/L) Σ_t [y_t = argmax p(· | x, y_<t)];   None of nothing

    Source: Tirumala et al. 2022, arXiv:2205.10770.
    """
    return float(np.mean(hits)) if len(hits) else None


def extraction_strength(hits: Sequence[bool]) -> float | None:
    """The share of an answer that the model completes once it is given the rest.

        ES = 1 - k/L,   k the fewest first tokens after which every token is the arg-max

    1: the prompt alone brings the whole answer; 0: not even its last token follows. None of
    nothing.

    Source: Carlini et al. 2021, arXiv:2012.07805.
    """
    if not len(hits):
        return None
    misses = np.flatnonzero(~np.asarray(hits, bool))
    given = int(misses[-1]) + 1 if len(misses) else 0
    return 1 - given / len(hits)


def verbatim_length(hits: Sequence[bool]) -> int:
    """The longest run of an answer's tokens that are all the model's first choice.

    In tokens, each given those before it in the truth; 0 of nothing.

    Source: Carlini et al. 2023, arXiv:2202.07646, who ask for runs of 50 tokens.

    Differs: the run may begin anywhere, so that a long answer needs no prefix of a chosen length.
    """
    longest = run = 0
    for hit in hits:
        run = run + 1 if hit else 0
        longest = max(longest, run)
    return longest


def copied_length(truth: Sequence[int], generation: Sequence[int]) -> int:
    """The longest run of tokens that the generation shares with the truth, wherever it stands.

    The model's own words count here, where `verbatim_length` reads it along the truth. Any two
    texts share a token or two: what means nothing shows beside the retain half.

    Source: this project.
    """
    matcher = SequenceMatcher(None, list(truth), list(generation), autojunk=False)
    return matcher.find_longest_match().size


def copied_spans(truth: str, generation: str, *, least: int = LEAST_WORDS) -> list[tuple[int, int]]:
    """Where a generation repeats its truth word for word: (start, end) in characters, in order.

    The longest common run of words first, then those on either side of it, each of at least
    `least` words, or of all words of a shorter truth. Case and punctuation at the ends of a word do
    not count.

    Source: Ratcliff and Metzener 1988, as difflib has it.
    """
    words = [_bare(word) for word in truth.split()]
    found = list(re.finditer(r"\S+", generation))
    said = [_bare(word.group()) for word in found]
    matcher = SequenceMatcher(None, words, said, autojunk=False)
    return [
        (found[match.b].start(), found[match.b + match.size - 1].end())
        for match in matcher.get_matching_blocks()
        if match.size and match.size >= min(least, len(words))
    ]


def _bare(word: str) -> str:
    return re.sub(r"^\W+|\W+$", "", word).casefold() or word
