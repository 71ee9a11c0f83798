"""The suite `traces`: are the vectors that wrote a concept's words still in the weights?

A model may stop saying what it knows and keep the knowledge where it was. What a value vector
writes (see concepts) is compared before and after unlearning, without asking the model anything.

Dimensions: V tokens, d hidden size, P vectors, k top tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from expunge.affine_heads import head_weight
from expunge.config import Section
from expunge.data.sources import Source, read_examples
from expunge.errors import EvaluationError
from expunge.evaluate import concepts
from expunge.evaluate.concepts import Head
from expunge.evaluate.numbers import Measured, resampled
from expunge.evaluate.reader import Reader
from expunge.evaluate.value_vectors import (
    Place,
    Projections,
    gathered,
    model_projections,
    stored_head,
    stored_projections,
)
from expunge.merge.sources import Opened

METRICS = ("jaccard", "cosine", "distance", "score_before", "score_after", "change", "found")
CHANCE = 0.95
"""A concept is found where its vectors score above this share of concepts dealt at random."""

DEALT = 20
"""Concepts dealt at random, at least."""

_CHUNK = 128
"""Vectors projected on the vocabulary at once."""


class Annotation(Section):
    """A value vector that is known to hold a concept."""

    concept: str
    """Name of the concept."""

    layer: int = Field(ge=0)
    """Number of the block."""

    column: int = Field(ge=0)
    """Column of its down projection."""

    tokens: tuple[int | str, ...] = Field(min_length=1)
    """The concept's tokens: ids, or texts that stand for all of their tokens."""


class Traces(Section):
    """Which vectors are looked at, and in which two models."""

    before: str = Field(min_length=1)
    """The model before unlearning: `smollm2`, id, folder or GGUF; `MODEL+ADAPTER` with a LoRA."""

    forget: Source | None = None
    """Items that were to be forgotten; the answers of one document are one concept."""

    retain: Source | None = None
    """Items that were to be kept, the control: their vectors should stay as they are."""

    annotated: tuple[Annotation, ...] = ()
    """In place of `forget`: vectors that are known, and need not be found."""

    vectors: int = Field(default=5, ge=1)
    """Vectors looked for, for each concept."""

    concept_tokens: int = Field(default=16, ge=1)
    """Tokens that stand for a concept: those of its answers that set it apart."""

    top_tokens: int = Field(default=200, ge=1)
    """Tokens that a vector raises most, k, whose overlap is measured."""

    random: int = Field(default=100, ge=0)
    """Vectors drawn at random from the others, as a control."""

    seed: int = 0
    """Draws them."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.forget is None) != bool(self.annotated):
            raise ValueError("give either forget or annotated")
        return self


@dataclass(frozen=True)
class Concept:
    """What is looked at in one row: a concept and its vectors, or one random vector."""

    group: str
    id: str
    tokens: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)


def traces_suite(reader: Reader, section: Traces) -> Measured:
    """Each concept's vectors before and after, beside those of kept concepts and of none.

        change = score_after - score_before,    found = score_before > q_0.95 of chance

    A search among all vectors finds some for any tokens: `found` says of how many concepts the
    vectors score above 95 % of tokens dealt at random, and only of those does the rest say
    anything. A number is the mean over the concepts of a group, each the mean over its vectors;
    concepts are drawn anew for its interval.
    """
    source = Opened().source(section.before)
    old, new = stored_projections(source), model_projections(reader.model)
    heads = (
        concepts.head_of(stored_head(source)),
        concepts.head_of(head_weight(reader.model)),
    )
    _check_alike(section, old, new, *heads)
    named = _named(reader, section)
    tokens = [concept.tokens for concept in named]
    directions = [concepts.concept_directions(head, tokens) for head in heads]
    sought, _ = concepts.strongest_vectors(old, heads[0], directions[0], section.vectors)
    chance = _chance(section, tokens, old, heads[0])
    rows = [
        concept if concept.places else replace(concept, places=places)
        for concept, places in zip(named, sought, strict=True)
    ]
    taken = {place for concept in rows for place in concept.places}
    for place in concepts.random_places(old, taken, section.random, seed=section.seed):
        rows.append(Concept("random", f"{place[0]}.{place[1]}", places=[place]))
    places = list(dict.fromkeys(place for concept in rows for place in concept.places))
    _check_places(section.before, places, old, new)
    vectors = gathered(old, places), gathered(new, places)
    _check_finite(section.before, places, *vectors)
    scores = [
        concepts.concept_scores(*given) for given in zip(heads, directions, vectors, strict=True)
    ]
    items = _items(reader, rows, places, _plain(heads, vectors, section.top_tokens), scores)
    for item, concept in zip(items, named, strict=False):
        if chance and not concept.places:
            limit = float(np.quantile(chance, CHANCE))
            item["found"] = float(item["score_before"] is not None and item["score_before"] > limit)
    return _measured(items, chance)


def _chance(
    section: Traces, tokens: Sequence[list[int]], projections: Projections, head: Head
) -> list[float]:
    """What the best vectors score for tokens dealt at random, DEALT times or more.

    Nothing of one concept, whose tokens cannot be dealt, and where all vectors are given.
    """
    if len(tokens) < 2 or section.annotated:
        return []
    found: list[float] = []
    for deal in range(-(-DEALT // len(tokens))):
        cards = concepts.concept_directions(head, concepts.dealt(tokens, seed=section.seed + deal))
        scores = concepts.strongest_vectors(projections, head, cards, section.vectors)[1]
        found.extend(scores.tolist())
    return found


def _items(
    reader: Reader,
    rows: Sequence[Concept],
    places: Sequence[Place],
    columns: Mapping[str, Tensor],
    scores: Sequence[Tensor],
) -> list[dict[str, Any]]:
    """A row for each concept and each random vector: the means over its vectors."""
    index = {place: number for number, place in enumerate(places)}
    items = []
    for number, concept in enumerate(rows):
        own = [index[place] for place in concept.places]
        values = {name: float(column[own].mean()) for name, column in columns.items() if own}
        if own and concept.tokens:
            first, last = (float(table[number, own].mean()) for table in scores)
            values |= {"score_before": first, "score_after": last, "change": last - first}
        items.append(
            {
                "group": concept.group,
                "id": concept.id,
                **{name: values.get(name) for name in METRICS},
                "vectors": [list(place) for place in concept.places],
                "words": [reader.text([token]) for token in concept.tokens],
            }
        )
    return items


def _named(reader: Reader, section: Traces) -> list[Concept]:
    """The concepts of both halves, each with its tokens; given vectors where they are known."""
    texts: dict[tuple[str, str], list[int]] = {}
    for half, source in (("forget", section.forget), ("retain", section.retain)):
        for example in read_examples(source) if source else ():
            key = (half, example.document)
            texts.setdefault(key, []).extend(_tokens(reader, example.answer))
    given: dict[str, Concept] = {}
    for one in section.annotated:
        concept = given.setdefault(one.concept, Concept("forget", one.concept))
        for token in one.tokens:
            ids = [token] if isinstance(token, int) else _tokens(reader, token)
            if any(not 0 <= i < reader.vocabulary_size for i in ids):
                raise EvaluationError(f"traces: {one.concept} names {token}, which is no token")
            concept.tokens.extend(i for i in ids if i not in concept.tokens)
        concept.places.append((one.layer, one.column))
    own = concepts.distinctive_tokens(
        list(texts.values()),
        lambda token: any(c.isalnum() for c in reader.text([token])),
        section.concept_tokens,
    )
    found = [Concept(*key, tokens) for key, tokens in zip(texts, own, strict=True)]
    return [*given.values(), *found]


def _tokens(reader: Reader, text: str) -> list[int]:
    return reader.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore


def _plain(heads: tuple[Head, Head], vectors: tuple[Tensor, Tensor], k: int) -> dict[str, Tensor]:
    """What needs no concept: jaccard, cosine and distance of every vector, (P,) each."""
    overlaps = [
        concepts.jaccard(heads[0].weight, a, heads[1].weight, b, k=k)
        for a, b in zip(*(side.split(_CHUNK) for side in vectors), strict=True)
    ]
    return {
        "jaccard": torch.cat(overlaps),
        "cosine": concepts.cosine(*vectors),
        "distance": concepts.distance(*vectors),
    }


def _measured(items: list[dict[str, Any]], chance: Sequence[float]) -> Measured:
    """The mean of each metric over the concepts of each group that have it, and chance."""
    found = Measured(items=items)
    for group in ("forget", "retain", "random"):
        own = [item for item in items if item["group"] == group]
        for metric in METRICS:
            values = [item[metric] for item in own if item[metric] is not None]
            if values:
                name = f"{group}.{metric}"
                found.numbers[name] = resampled(values, name=f"traces.{name}")
        found.facts[f"{group}_without_vectors"] = [i["id"] for i in own if not i["vectors"]]
    if chance:
        found.numbers["chance.score_before"] = resampled(chance, name="traces.chance")
    if "forget.jaccard" not in found.numbers:
        raise EvaluationError("traces: no concept to forget has words and vectors of its own")
    return found


def _check_alike(section: Traces, old: Projections, new: Projections, a: Head, b: Head) -> None:
    if old.keys() != new.keys() or a.weight.shape != b.weight.shape:
        raise EvaluationError(
            f"traces: before={section.before} has {len(old)} layers and a head of "
            f"{list(a.weight.shape)}, the model {len(new)} and {list(b.weight.shape)}; only "
            "versions of one model can be compared"
        )
    if section.top_tokens >= len(a.weight):
        raise EvaluationError(f"traces: top_tokens must be below {len(a.weight)}, the vocabulary")


def _check_places(before: str, places: Sequence[Place], old: Projections, new: Projections) -> None:
    shapes = {layer: read().shape for layer, read in old.items()}
    for layer, column in places:
        if layer not in shapes or column >= shapes[layer][1]:
            raise EvaluationError(f"traces: {before} has no column {column} in layer {layer}")
    for layer in {layer for layer, _ in places}:
        if new[layer]().shape != shapes[layer]:
            raise EvaluationError(f"traces: layer {layer} has another shape than in {before}")


def _check_finite(before: str, places: Sequence[Place], old: Tensor, new: Tensor) -> None:
    for (layer, column), a, b in zip(places, old, new, strict=True):
        where = f"column {column} of layer {layer}"
        if not (a.isfinite().all() and b.isfinite().all()):
            raise EvaluationError(f"traces: {where} is not finite; the model is broken")
        if not a.any():
            raise EvaluationError(f"traces: {where} of {before} is zero, so it holds no concept")
