"""Scope: whether a text speaks of what is to be forgotten.

A scope is phrases (runs of words) and perhaps a linear classifier over words and pairs of words.
Texts are compared as words: case, accents and punctuation do not matter, and nothing in them is
read as a pattern.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from expunge.config import Section
from expunge.data.examples import Example
from expunge.data.neutral import neutral_texts
from expunge.errors import RecipeError

SINGLE = 4
"""Letters from which on one capitalised word, not at the start of a sentence, is a name."""

LONGEST_NAME = 4
"""Words of the longest name."""


class Matching(Section):
    """How a scope is made of the forget set."""

    by: Literal["phrases", "classifier", "both"] = "phrases"
    """`phrases`: names and rare runs of words of the forget set that the retain set lacks.
    `classifier`: a logistic regression that tells forget from retain texts. `both`: either."""

    keywords: tuple[str, ...] = ()
    """Words and phrases of your own that are always in scope."""

    ngram: int = Field(default=5, ge=0)
    """Words of a run that counts as rare; 0 takes names only."""

    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Probability from which on the classifier says that a text is in scope."""

    @property
    def retain_readers(self) -> tuple[str, ...]:
        """What of it cannot do without retain items, as a recipe names it."""
        return () if self.by == "phrases" else (f".match.by ({self.by})",)


class Scope(Section):
    """What a text is compared with."""

    phrases: tuple[str, ...] = ()
    """Runs of words, in lower case, a space between; a text that holds one is in scope."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Of the classifier, by word or pair of words."""

    bias: float = 0.0
    """Of the classifier."""

    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Of the classifier."""

    @model_validator(mode="after")
    def _finite(self) -> "Scope":
        if not all(map(math.isfinite, [*self.weights.values(), self.bias])):
            raise ValueError("the weights of a classifier must be finite")
        return self

    @cached_property
    def _runs(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for phrase in self.phrases:
            found.setdefault(phrase.count(" ") + 1, set()).add(phrase)
        return found

    def holds(self, text: str) -> bool:
        """Whether a text is in scope."""
        words = words_of(text)
        for length, phrases in self._runs.items():
            if any(run in phrases for run in runs_of(words, length)):
                return True
        return bool(self.weights) and self.probability(text) >= self.threshold

    def probability(self, text: str) -> float:
        """Of the classifier: σ(bias + Σ weights of the words and pairs that the text holds)."""
        logit = self.bias + sum(self.weights.get(name, 0.0) for name in _features(text))
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, logit))))


def scope_of(matching: Matching, forget: Sequence[Example], retain: Sequence[Example]) -> Scope:
    """The scope of a forget set."""
    phrases = {" ".join(words_of(keyword)) for keyword in matching.keywords} - {""}
    weights, bias = {}, 0.0
    if matching.by != "classifier":
        phrases |= set(rare_phrases(forget, retain, matching.ngram))
    if matching.by != "phrases":
        weights, bias = classifier(forget, retain)
    return Scope(
        phrases=tuple(sorted(phrases)), weights=weights, bias=bias, threshold=matching.threshold
    )


def rare_phrases(forget: Sequence[Example], retain: Sequence[Example], ngram: int) -> Iterator[str]:
    """Names, and runs of `ngram` words without one, that the forget set has and the rest lacks.

    A name is a capitalised word that is never written small, or up to four in a row; two or more
    in a row may begin a sentence.
    """
    wanted, others = [_whole(e) for e in forget], [*map(_whole, retain), *neutral_texts()]
    known: dict[int, set[str]] = {
        n: {run for text in others for run in runs_of(words_of(text), n)}
        for n in {*range(1, LONGEST_NAME + 1), ngram} - {0}
    }
    small = {word for text in wanted for word in re.findall(r"\b[a-z]\w*", text)}
    names = {
        name
        for text in wanted
        for name in _names(text)
        if name not in known[name.count(" ") + 1] and name not in small
    }
    names = {n for n in names if not any(part in names for part in n.split() if part != n)}
    yield from names
    if ngram:
        has_name = Scope(phrases=tuple(names))
        runs = {run for text in wanted for run in runs_of(words_of(text), ngram)}
        yield from (r for r in runs - known[ngram] if not has_name.holds(r))


def classifier(
    forget: Sequence[Example], retain: Sequence[Example]
) -> tuple[dict[str, float], float]:
    """Weights of words and pairs of words, and a bias: logistic regression, forget against rest.

    It sees prompts alone, and prompts with answers; the rest is the retain set and neutral texts.
    """
    vectorizer, regression = fitters()
    ours = [text for e in forget for text in (e.prompt, _whole(e)) if text]
    theirs = [text for e in retain for text in (e.prompt, _whole(e)) if text]
    theirs += neutral_texts()
    vectors = vectorizer()
    inputs = vectors.fit_transform([dict.fromkeys(_features(t), 1.0) for t in ours + theirs])
    labels = np.array([1] * len(ours) + [0] * len(theirs))
    model = regression(C=10.0, class_weight="balanced", max_iter=2000).fit(inputs, labels)
    names = vectors.get_feature_names_out()
    found = zip(names, model.coef_[0], strict=True)
    weights = {str(name): round(float(w), 5) for name, w in found if abs(w) >= 1e-4}
    return weights, round(float(model.intercept_[0]), 5)


def fitters() -> tuple[Any, Any]:
    """What a classifier is fitted by; without scikit-learn a `RecipeError`."""
    try:
        from sklearn.feature_extraction import DictVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise RecipeError(
            "a classifier is fitted by scikit-learn: pip install 'expunge[guards]', or match by "
            "phrases"
        ) from None
    return DictVectorizer, LogisticRegression


def words_of(text: str) -> list[str]:
    """The words of a text, small, without accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c)))


def runs_of(words: Sequence[str], length: int) -> Iterator[str]:
    """Every run of so many words."""
    return (" ".join(words[i : i + length]) for i in range(len(words) - length + 1))


def _features(text: str) -> set[str]:
    words = words_of(text)
    return {*words, *runs_of(words, 2)}


def _names(text: str) -> Iterator[str]:
    """Capitalised words, and all that stand in a row, as phrases."""
    for sentence in re.split(r"[.!?:\n]\s*", text):
        for found in re.finditer(r"\b[A-Z]\w*(?:[ '-]+[A-Z]\w*)*", sentence):
            words = words_of(found[0])
            if found.start() and len(words) == 1 and len(words[0]) >= SINGLE:
                yield words[0]
            for length in range(2, LONGEST_NAME + 1):
                yield from runs_of(words, length)


def _whole(example: Example) -> str:
    return f"{example.prompt} {example.answer}".strip()
