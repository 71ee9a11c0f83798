"""The whole evaluation of one model: generate once, score everything, keep every item."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import Field

from expunge.config import Section
from expunge.data.batches import TokenSequence, asked_tokens, encode, encode_document, prompt_tokens
from expunge.data.examples import Document, Example
from expunge.evaluate import collapse, semeval
from expunge.evaluate.balance import shape
from expunge.evaluate.generate import MAX_BATCH
from expunge.evaluate.membership import mia
from expunge.evaluate.mmlu import Mmlu, Question, answer_mmlu, choose, places_of
from expunge.evaluate.prompts import fit_prompts
from expunge.evaluate.reader import Reader
from expunge.evaluate.tables import text_hash

BESIDE = "beside.jsonl"
"""Where a run keeps the rows of `beside_items`."""


class Evaluate(Section):
    """What is measured, and how thoroughly."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest generation, in tokens; the official scores allow 256."""

    max_batch: int = Field(default=MAX_BATCH, ge=1)
    """Prompts continued at once; fewer need less memory."""

    generate_limit: int | None = Field(default=None, ge=1)
    """Items generated for each of the twelve terms, a seeded sample; null generates all."""

    document_tokens: int = Field(default=2048, ge=2)
    """Longest document the membership test reads, in tokens, where the context allows it."""

    mmlu: Mmlu | None = None
    """Which MMLU questions are asked; null asks none, and leaves the final score null."""

    partial: bool = False
    """Take the task aggregate over the terms that have items, where others have none."""

    resamples: int = Field(default=2000, ge=1)
    """Bootstrap draws behind each interval."""

    seed: int = 0
    """Draws the sample of items and the bootstrap."""


@dataclass(frozen=True)
class EvaluationData:
    """What a model is evaluated on; whatever is empty is not measured."""

    forget: Sequence[Example] = ()
    retain: Sequence[Example] = ()
    members: Sequence[Document] = ()
    nonmembers: Sequence[Document] = ()
    neutral: Sequence[Document] = collapse.NEUTRAL
    mmlu: Sequence[Question] = ()


@dataclass
class _Item:
    """One example and what came of it."""

    half: str
    example: Example
    prompt: str
    truth: str
    tokens: list[int] | None = None  # None where the sample left it out
    generation: str | None = None
    score: float | None = None
    nll: float | None = None
    complete: bool = field(default=True)  # False where generation was cut once its score was sure

    @property
    def term(self) -> str:
        return semeval.term_of(self.half, self.example)

    @property
    def owner(self) -> tuple[str, str, str]:
        """The document that it is of, with which it is drawn again."""
        return self.half, self.example.task, self.example.document


def evaluate(
    reader: Reader,
    data: EvaluationData,
    config: Evaluate,
    *,
    max_length: int,
    prompt_tail: int | None,
    separator: str,
    chat: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entry of results.json, and one row for each given item, in the order given.

    `max_length` (at most the context) and `prompt_tail` cut only where the answers' losses are
    measured, as training does; a prompt is generated from whole, and documents are read up to
    `document_tokens`.
    """
    terms = semeval.terms_of(data.forget, data.retain)
    items = [_Item("forget", e, *semeval.begun(e)) for e in data.forget]
    items += [_Item("retain", e, *semeval.begun(e)) for e in data.retain]
    lengths = {"max_length": min(max_length, reader.context), "prompt_tail": prompt_tail}
    read = {"separator": separator, "chat": chat, **lengths}
    sequences = [encode(item.example, reader.tokenizer, **read) for item in items]
    for item, found in zip(items, reader.scores(sequences, label="score answers"), strict=True):
        item.nll = found.nll
    documents = _documents(reader, data, config)
    losses = document_losses(reader, documents)
    cut = _generate_items(reader, items, config, chat=chat)
    neutral = _neutral_windows(reader, data.neutral)
    mmlu = answer_mmlu(reader, data.mmlu, config.mmlu) if config.mmlu else None
    entry = {
        "semeval": _semeval(items, terms, losses, mmlu, config),
        "collapse": collapse.judge(
            _windows(items, reader) | {"neutral": neutral},
            known=collapse.frequent_words([f"{e.prompt} {e.answer}" for e in data.retain]),
            neutral_nll=semeval.mean(losses["neutral"]),
            vocabulary_size=reader.vocabulary_size,
            letters=mmlu and mmlu["letters"],
        ),
        "nll": {name: semeval.mean(values) for name, values in losses.items()}
        | {h: semeval.mean([i.nll for i in items if i.half == h]) for h in semeval.HALVES},  # pyright: ignore
        "prompts_cut": cut,
        "texts_cut": {
            name: sum(text.cut > 0 for text in texts)
            for name, texts in {"answers": sequences, **documents}.items()
        },
    }
    return entry, [_row(item) for item in items]


def drawn(terms: Sequence[str], config: Evaluate) -> list[int]:
    """Numbers of the items that are generated from, given the term of each: all, or at most
    `generate_limit` of each term, drawn by seed, in their order."""
    if config.generate_limit is None:
        return list(range(len(terms)))
    chosen: set[int] = set()
    for term in set(terms):
        numbers = [number for number, own in enumerate(terms) if own == term]
        rng = np.random.default_rng([config.seed, zlib.crc32(term.encode())])
        chosen.update(rng.permutation(numbers)[: config.generate_limit].astype(int).tolist())
    return sorted(chosen)


def document_losses(
    reader: Reader, documents: Mapping[str, Sequence[TokenSequence]]
) -> dict[str, list[float]]:
    """The NLL a token of each member, non-member and neutral text."""
    return {
        name: [found.nll for found in reader.scores(texts, label="score documents")]
        for name, texts in documents.items()
    }


def beside_items(reader: Reader, data: EvaluationData, config: Evaluate) -> list[dict[str, Any]]:
    """A row for each member, non-member and question asked: what `evaluate` found of them.

    After `evaluate` nothing is read anew.
    """
    losses = document_losses(reader, _documents(reader, data, config))
    rows: list[dict[str, Any]] = [
        {"group": side, "id": document.id, "text": text_hash(document.text), "nll": nll}
        for side in ("members", "nonmembers")
        for document, nll in zip(getattr(data, side), losses[side], strict=True)
    ]
    if config.mmlu is None:
        return rows
    asked, chosen, _ = choose(reader, data.mmlu, config.mmlu)
    places = places_of(data.mmlu)
    return rows + [
        {
            "group": f"mmlu.{q.subject}",
            "id": places[id(q)],
            "text": q.hash,
            "correct": choice == q.answer,
        }
        for q, choice in zip(asked, chosen, strict=True)
    ]


def _documents(
    reader: Reader, data: EvaluationData, config: Evaluate
) -> dict[str, list[TokenSequence]]:
    """Members, non-members and neutral texts as they are read, cut where they are longer."""
    length = min(config.document_tokens, reader.context)
    return {
        name: [encode_document(d, reader.tokenizer, max_length=length) for d in getattr(data, name)]
        for name in ("members", "nonmembers", "neutral")
    }


def _generate_items(reader: Reader, items: Sequence[_Item], config: Evaluate, *, chat: bool) -> int:
    """Generate and score the sampled items, in place; returns how many prompts were cut."""
    chosen = [items[number] for number in drawn([item.term for item in items], config)]
    raw = [
        asked_tokens(reader.tokenizer, item.prompt, chat=chat and bool(item.example.prompt))
        for item in chosen
    ]
    prompts, cut = fit_prompts(raw, reader.context, config.max_new_tokens)

    proofs = {kind: semeval.proof(kind) for kind in semeval.KINDS}

    def settled(number: int, tokens: list[int]) -> bool:
        item = chosen[number]
        proof = proofs[item.example.kind]
        return proof is not None and proof(item.truth, reader.text(tokens))

    found = reader.generations(prompts, max_new_tokens=config.max_new_tokens, settled=settled)
    for item, made in zip(chosen, found, strict=True):
        item.tokens, item.complete = made.tokens, made.complete
        item.generation = reader.text(made.tokens)
        item.score = semeval.SCORES[item.example.kind](item.truth, item.generation)
    return cut


def _neutral_windows(reader: Reader, documents: Sequence[Document]) -> list[collapse.Window]:
    raw = [prompt_tokens(reader.tokenizer, document.text) for document in documents]
    prompts, _ = fit_prompts(raw, reader.context, collapse.WINDOW)
    found = reader.generations(prompts, max_new_tokens=collapse.WINDOW)
    return [collapse.Window(reader.text(made.tokens), made.tokens) for made in found]


def _windows(items: Sequence[_Item], reader: Reader) -> dict[str, list[collapse.Window]]:
    """What the collapse measures read, by group; only completions are judged."""
    groups: dict[str, list[collapse.Window]] = {
        name: [] for name in ("retain", "retain_questions", "forget", "forget_questions")
    }
    for item in items:
        if item.tokens is not None:
            tokens = item.tokens[: collapse.WINDOW]
            name = item.half + ("_questions" if item.example.kind == "qa" else "")
            groups[name].append(collapse.Window(reader.text(tokens), tokens))
    return groups


def _semeval(
    items: Sequence[_Item],
    names: Sequence[str],
    losses: dict[str, list[float]],
    mmlu: dict[str, Any] | None,
    config: Evaluate,
) -> dict[str, Any]:
    scored = {name: [i for i in items if i.term == name and i.score is not None] for name in names}
    scores = {name: [i.score for i in own if i.score is not None] for name, own in scored.items()}
    owners = {name: [i.owner for i in own] for name, own in scored.items()}
    terms = {name: semeval.mean(values) for name, values in scores.items()}
    own = tuple(names) != semeval.TERMS
    partial = config.partial or own
    task = semeval.task_aggregate(terms, partial=partial)
    membership = None
    if losses["members"] or losses["nonmembers"]:
        sides = losses["members"], losses["nonmembers"]
        draws = config.resamples
        membership = mia(*sides, seed=config.seed, resamples=draws) | shape(*sides, resamples=draws)
    return {
        "terms": terms,
        "counts": {term: len(values) for term, values in scores.items()},
        "given": {name: sum(i.term == name for i in items) for name in names},
        "intervals": semeval.intervals(
            scores, owners, seed=config.seed, resamples=config.resamples, partial=partial
        ),
        "task_aggregate": task,
        "partial": own or (config.partial and None in terms.values()),
        "mia": membership,
        "mmlu": mmlu,
        "final": semeval.final(task, _part(membership, "score"), _part(mmlu, "accuracy")),
    }


def _part(result: dict[str, Any] | None, name: str) -> float | None:
    return None if result is None else result[name]


def _row(item: _Item) -> dict[str, Any]:
    return {
        "id": item.example.id,
        "half": item.half,
        "task": semeval.task_of(item.example),
        "kind": item.example.kind,
        "prompt": item.prompt,
        "truth": item.truth,
        "generation": item.generation,
        "score": item.score,
        "tokens": None if item.tokens is None else len(item.tokens),
        "complete": item.complete,
        "nll": item.nll,
    }
