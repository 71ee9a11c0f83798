"""Filters: a request or an answer that speaks of what is to be forgotten becomes a refusal."""

from collections.abc import Sequence
from functools import cached_property

from pydantic import Field

from expunge.config import Section
from expunge.data.examples import Example
from expunge.data.pii import Pii, find_pii, pii_leak
from expunge.guard.scope import Scope, runs_of, words_of

REFUSAL = "I'm sorry, I cannot help with that."


class Item(Section):
    """What is to be forgotten, as an output filter compares answers with it."""

    prompt: str
    """What the answer answers."""

    answer: str
    """What must not be said."""


class Outputs(Section):
    """What an answer is compared with."""

    items: tuple[Item, ...] = ()
    """The forget set."""

    ngram: int = Field(default=3, ge=1)
    """Words of a run that counts as common to two texts."""

    overlap: float = Field(default=0.5, gt=0, le=1)
    """Share of a forget answer's runs that an answer may not reach."""

    pii: bool = True
    """Personal data of the forget set is found however it is written."""

    @cached_property
    def _long(self) -> dict[str, list[int]]:
        """The answers of `ngram` words or more that hold a run, by number."""
        found: dict[str, list[int]] = {}
        for number, item in enumerate(self.items):
            for run in set(runs_of(words_of(item.answer), self.ngram)):
                found.setdefault(run, []).append(number)
        return found

    @cached_property
    def _sizes(self) -> list[int]:
        return [len(set(runs_of(words_of(item.answer), self.ngram))) for item in self.items]

    @cached_property
    def _short(self) -> Scope:
        words = [words_of(item.answer) for item in self.items]
        return Scope(phrases=tuple({" ".join(w) for w in words if 0 < len(w) < self.ngram}))

    @cached_property
    def _pieces(self) -> list[Pii]:
        pieces = (find_pii(item.answer, before=item.prompt) for item in self.items)
        return list({piece: None for found in pieces for piece in found})

    def copied(self, answer: str) -> float:
        """The greatest ROUGE-n recall of a forget answer of `ngram` words or more: 0 to 1."""
        counts: dict[int, int] = {}
        for run in set(runs_of(words_of(answer), self.ngram)):
            for number in self._long.get(run, ()):
                counts[number] = counts.get(number, 0) + 1
        return max((n / self._sizes[number] for number, n in counts.items()), default=0.0)

    def leak(self, prompt: str, answer: str, scope: Scope) -> bool:
        """Whether an answer gives away what is to be forgotten; see `output_filter`."""
        if self.copied(answer) >= self.overlap:
            return True
        if self.pii and any(pii_leak(self._pieces, [prompt], [answer])):
            return True
        return self._short.holds(answer) and scope.holds(f"{prompt}\n{answer}")


def input_filter(prompt: str, scope: Scope) -> bool:
    """Refuse a prompt that speaks of the forget set, before the model reads it.

        refuse(x)  =  x holds a phrase of the forget set,  or  σ(b + Σ_{n-grams of x} w) >= t

    Phrases are names and rare runs of words that the retain set lacks, and keywords of your own;
    the classifier is a logistic regression over words and pairs of words, kept as numbers. A
    paraphrase without a name passes. Log-probabilities of given texts are the model's own: the
    weights are unchanged, and membership is not helped. A refused multiple-choice question counts
    as four equal logits.

    Source: Thaker et al. 2024 (guardrail baselines), arXiv:2403.03329.
    Differs: phrases and a bag-of-words classifier where the paper also asks a language model.
    """
    return scope.holds(prompt)


def output_filter(prompt: str, answer: str, scope: Scope, outputs: Outputs) -> bool:
    """Generate, test, and replace by a refusal what gives a forget answer away.

        leak(x, y)  =  max_i ROUGE-n recall(y_i, y) >= share
                       or y holds personal data of the forget set that x does not hold
                       or y holds a forget answer of fewer than n words, and x y is in scope

    The whole answer must be there before it is tested. Log-probabilities are the model's own: the
    weights are unchanged, and membership and multiple choice are not helped.

    Source: Thaker et al. 2024 (guardrail baselines), arXiv:2403.03329.
    Differs: overlap and personal data where the paper asks a language model or a classifier.
    """
    return outputs.leak(prompt, answer, scope)


def outputs_of(forget: Sequence[Example], *, ngram: int, overlap: float, pii: bool) -> Outputs:
    """What an output filter of a forget set compares with."""
    items = tuple(Item(prompt=e.prompt, answer=e.answer) for e in forget)
    return Outputs(items=items, ngram=ngram, overlap=overlap, pii=pii)
