"""ROUGE-L, of words of any script."""

import re
import unicodedata
from functools import cache
from typing import Any, NamedTuple

from expunge.evaluate.words import marks

_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Thai to Khmer, kana and ideographs: written without blanks."""


class RougeL(NamedTuple):
    """With LCS the longest common subsequence of words: precision, recall, and their F1."""

    precision: float
    recall: float
    f1: float


def rouge_l(truth: str, text: str, *, stem: bool) -> RougeL:
    """LCS / |text|, LCS / |truth| and their harmonic mean; 0 where either has no word.

    Of a truth that is mostly of other letters than Latin ones, words are those of Unicode (NFC,
    letters with their marks), not stemmed, and each character one where a script has no blanks.

    Source: Lin 2004, through rouge-score, which sees Latin letters and digits alone.
    """
    seen = [character for character in truth.lower() if character.isalnum()]
    latin = 2 * sum(character.isascii() for character in seen) >= len(seen)
    found = _scorer(latin, stem).score(truth, text)["rougeL"]
    return RougeL(float(found.precision), float(found.recall), float(found.fmeasure))


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return _word().findall(unicodedata.normalize("NFC", text).lower())


@cache
def _word() -> re.Pattern[str]:
    return re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}_])[\w{marks()}])+")


@cache
def _scorer(latin: bool, stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], stem, tokenizer=None if latin else _Words())
