"""What a candidate is screened by: log-probabilities of items and documents, no generation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from expunge.data.batches import TokenSequence, encode, encode_document
from expunge.data.examples import Document, Example
from expunge.data.sets import Sets
from expunge.evaluate.attacks import Read
from expunge.evaluate.balance import attacked, balance, furthest, midway
from expunge.evaluate.collapse import NEUTRAL
from expunge.evaluate.reader import Reader
from expunge.evaluate.semeval import task_aggregate, term_of, terms_of
from expunge.evaluate.tables import TokenScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = TypeVar("Text", Example, Document)


@dataclass(frozen=True)
class Material:
    """The texts of one fold as a model reads them."""

    items: Sequence[tuple[str, TokenSequence]]
    """(term, sequence) of each item."""

    members: Sequence[tuple[str, TokenSequence]]
    """(text, sequence) of each document."""

    nonmembers: Sequence[tuple[str, TokenSequence]]
    neutral: Sequence[TokenSequence]
    tasks: tuple[Sequence[str], Sequence[str]] | None = None
    """The task of each member and of each non-member, where tasks are balanced apart."""


@dataclass(frozen=True)
class Reading:
    """What one model showed on one fold; membership by attack (and task), as balance() gives it."""

    terms: Mapping[str, float | None]
    """Teacher-forced: the share of a completion's tokens that are the likeliest, and the share of
    questions of which all are. A proxy of the generated scores, and named so wherever printed."""

    membership: Mapping[str, Mapping[str, float]]
    neutral: float
    """NLL of neutral texts."""

    generated: bool = False
    """Whether the terms were generated and scored officially."""

    documents: int | None = None
    """Members and non-members that the attacks read."""

    @property
    def aggregate(self) -> float:
        """The harmonic mean of the terms that there are."""
        return task_aggregate(self.terms, partial=True) or 0.0

    @property
    def forgetting(self) -> float:
        """1 - the mean of the forget terms."""
        return 1 - (self._mean("forget/") or 0.0)

    @property
    def retention(self) -> float:
        """The mean of the retain terms."""
        return self._mean("retain/") or 0.0

    @property
    def auc(self) -> float:
        """Midway between the greatest and the least AUC of the attacks."""
        return midway(found["auc"] for found in self.membership.values())

    @property
    def gap(self) -> float:
        """The same of the separation, in spreads."""
        return midway(found["gap"] for found in self.membership.values())

    @property
    def mia(self) -> float:
        """The least MIA score, 1 - 2 |AUC - 1/2|, over the attacks."""
        return min(1 - 2 * abs(found["auc"] - 0.5) for found in self.membership.values())

    @property
    def two_sided(self) -> float:
        """The two-sided AUC that lies furthest from 1/2, over the attacks."""
        return furthest(found["two_sided"] for found in self.membership.values())

    @property
    def ks(self) -> float:
        """The greatest Kolmogorov-Smirnov distance over the attacks."""
        return max(found["ks"] for found in self.membership.values())

    @property
    def membership_balance(self) -> float:
        """The lesser of the MIA score and what a two-sided attack leaves of it."""
        return min(self.mia, 1 - 2 * abs(self.two_sided - 0.5))

    def _mean(self, half: str) -> float | None:
        found = [v for t, v in self.terms.items() if t.startswith(half) and v is not None]
        return fmean(found) if found else None

    def as_json(self) -> dict[str, Any]:
        """Every number of it."""
        return {
            "aggregate": self.aggregate,
            "forgetting": self.forgetting,
            "retention": self.retention,
            "mia": self.mia,
            "auc": self.auc,
            "two_sided": self.two_sided,
            "ks": self.ks,
            "balance": self.membership_balance,
            "neutral_nll": self.neutral,
            "documents": self.documents,
            "generated": self.generated,
            "terms": dict(self.terms),
            "membership": {name: dict(found) for name, found in self.membership.items()},
        }


def material(
    sets: Sets,
    tokenizer: PreTrainedTokenizerBase,
    *,
    how: Mapping[str, Any],
    document_tokens: int,
    seed: int = 0,
    per_term: int | None = None,
    documents: int | None = None,
    by_task: bool = False,
) -> Material:
    """The texts of some sets, at most so many of each (with `by_task`, of each task), the same for
    the same seed; `how` says how items are cut and joined."""
    by_term: dict[str, list[Example]] = {t: [] for t in terms_of(sets.forget, sets.retain)}
    for half in ("forget", "retain"):
        for example in getattr(sets, half):
            by_term[term_of(half, example)].append(example)
    items = [
        (term, encode(example, tokenizer, **how))
        for term, examples in by_term.items()
        for example in _drawn(examples, per_term, seed)
    ]

    def read(given: Sequence[Document]) -> list[tuple[str, TokenSequence]]:
        return [(d.text, encode_document(d, tokenizer, max_length=document_tokens)) for d in given]

    def drawn(given: Sequence[Document]) -> list[Document]:
        kinds = sorted({d.task for d in given}) if by_task else [None]
        each = [[d for d in given if kind in (None, d.task)] for kind in kinds]
        return [d for mine in each for d in _drawn(mine, documents, seed)]

    members, nonmembers = drawn(sets.members), drawn(sets.nonmembers)
    tasks = ([d.task for d in members], [d.task for d in nonmembers]) if by_task else None
    neutral = [encode_document(d, tokenizer, max_length=document_tokens) for d in NEUTRAL]
    return Material(items, read(members), read(nonmembers), neutral, tasks)


def documents_of(
    reader: Reader, given: Material, attacks: Sequence[str]
) -> dict[str, tuple[list[float], list[float]]]:
    """Both sides' scores under each attack, and on each task where these are balanced apart."""
    both = [*given.members, *given.nonmembers]
    scores = reader.scores([sequence for _, sequence in both], label="screen documents")
    reads = [
        Read(found, reader.text(sequence.tokens) if sequence.cut else text)
        for (text, sequence), found in zip(both, scores, strict=True)
    ]
    cut = len(given.members)
    sides = reads[:cut], reads[cut:]
    found = attacked(*sides, attacks)
    for task in sorted({*given.tasks[0]}) if given.tasks else ():
        mine = [
            [read for read, own in zip(side, whose, strict=True) if own == task]
            for side, whose in zip(sides, given.tasks or (), strict=True)
        ]
        of_task = attacked(mine[0], mine[1], attacks)
        found |= {f"{attack} of {task}": scores for attack, scores in of_task.items()}
    return found


def screen(
    reader: Reader, given: Material, attacks: Sequence[str], *, resamples: int = 0
) -> Reading:
    """Everything that log-probabilities say of a candidate."""
    membership = balance(documents_of(reader, given, attacks), resamples=resamples)
    sequences = [sequence for _, sequence in given.items]
    scores = reader.scores(sequences, label="screen items")
    by_term: dict[str, list[float]] = {}
    for (term, sequence), found in zip(given.items, scores, strict=True):
        by_term.setdefault(term, []).append(recalled(term, sequence, found))
    neutral = fmean(found.nll for found in reader.scores(list(given.neutral), label="screen"))
    terms = {term: fmean(values) for term, values in by_term.items()}
    count = len(given.members) + len(given.nonmembers)
    return Reading(terms, membership, neutral, documents=count)


def recalled(term: str, sequence: TokenSequence, scores: TokenScores) -> float:
    """How much of an answer the model would choose, each token after the true ones before it.

    Of a completion the share of tokens, without what ends the text; of a question all or nothing.
    """
    if term.endswith("/qa"):
        return float(scores.hit.all())
    said = len(scores.hit) - sequence.ending
    return float(np.mean(scores.hit[:said] if said > 0 else scores.hit))


def officially(reading: Reading, entry: Mapping[str, Any]) -> Reading:
    """The same reading with the terms that an official evaluation generated."""
    return replace(reading, terms=dict(entry["semeval"]["terms"]), generated=True)


def _drawn(given: Sequence[Text], most: int | None, seed: int) -> list[Text]:
    """At most so many, drawn by id for good, in their order."""
    if most is None or len(given) <= most:
        return list(given)
    ranked = sorted(given, key=lambda one: hashlib.sha256(f"{seed}:{one.id}".encode()).hexdigest())
    chosen = {one.id for one in ranked[:most]}
    return [one for one in given if one.id in chosen]
