"""The suite `memorisation`: what a model still says word for word, and the personal data in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import Field

from expunge.config import Section
from expunge.data.batches import TokenSequence, asked_tokens, encode
from expunge.data.examples import Example, check_disjoint
from expunge.data.pii import KINDS, Pii, find_pii, pii_leak
from expunge.data.sources import Source, read_examples
from expunge.evaluate import memorisation
from expunge.evaluate.numbers import Measured, Number, estimate, resampled
from expunge.evaluate.prompts import fit_prompts
from expunge.evaluate.reader import Reader


class Memorisation(Section):
    """Whose answers the model may remember, and how far it is heard."""

    forget: Source
    """Items that were to be forgotten."""

    retain: Source | None = None
    """Items that were to be kept, measured in the same way: the control."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest generation, in tokens."""

    max_length: int = Field(default=256, ge=8)
    """Longest sequence in which an answer is scored, in tokens."""

    prompt_tail: int | None = Field(default=204, ge=1)
    """There, a prompt keeps this many of its last tokens."""

    separator: str = ""
    """Put before the answer."""

    chat: bool = False
    """Put prompts into the tokenizer's chat template."""


@dataclass
class _Item:
    """One example and what came of it."""

    half: str
    example: Example
    sequence: TokenSequence
    hits: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    tokens: list[int] | None = None  # None where there is no prompt to go on from
    generation: str | None = None
    leaks: list[dict[str, str]] = field(default_factory=list)


def memorisation_suite(reader: Reader, section: Memorisation) -> Measured:
    """Exact memorisation, extraction strength, verbatim runs, and leaks of personal data.

    The first three read, token by token, whether each token of an answer is the arg-max after those
    before it, its end of text left out; the copied length and leaks read greedy continuations of
    the prompt. An answer without a scored token counts in no mean, an item without a prompt in none
    that needs one. Lengths have the bootstrap's interval, shares of pieces Wilson's.
    """
    halves = {"forget": read_examples(section.forget)}
    if section.retain is not None:
        halves["retain"] = read_examples(section.retain)
        check_disjoint(halves["forget"], halves["retain"])
    longest = min(section.max_length, reader.context)
    lengths = {"max_length": longest, "prompt_tail": section.prompt_tail}
    read = {"separator": section.separator, "chat": section.chat, **lengths}
    items = [
        _Item(half, example, encode(example, reader.tokenizer, **read))
        for half, examples in halves.items()
        for example in examples
    ]
    _score(reader, items)
    cut = _generate(reader, items, section)
    rows = [_row(reader, item, section.separator) for item in items]
    numbers = {}
    for half in halves:
        numbers |= _runs(half, [row for row in rows if row["group"] == half])
    leaks, facts = _leaks(items, list(halves))
    facts |= {
        "answers_cut": sum(item.sequence.cut > 0 for item in items),
        "prompts_cut": cut,
        "without_prompt": sum(item.tokens is None for item in items),
        "without_score": sum(not len(item.hits) for item in items),
    }
    for row, item in zip(rows, items, strict=True):
        row["leaks"] = None if item.tokens is None else item.leaks
        row["pii_leaks"] = None if item.tokens is None else len(item.leaks)
    return Measured(numbers | leaks, rows, facts)


def _score(reader: Reader, items: Sequence[_Item]) -> None:
    """Which of each answer's tokens are hits; the end of text is no part of what is remembered."""
    scores = reader.scores([item.sequence for item in items], label="score answers")
    for item, found in zip(items, scores, strict=True):
        item.hits = found.hit[: len(found.hit) - item.sequence.ending]


def _generate(reader: Reader, items: Sequence[_Item], section: Memorisation) -> int:
    """Go on from each prompt, in place; returns how many prompts were cut."""
    asked = [item for item in items if item.example.prompt]
    raw = [asked_tokens(reader.tokenizer, i.example.prompt, chat=section.chat) for i in asked]
    prompts, cut = fit_prompts(raw, reader.context, section.max_new_tokens)
    found = reader.generations(prompts, max_new_tokens=section.max_new_tokens)
    for item, made in zip(asked, found, strict=True):
        item.tokens, item.generation = made.tokens, reader.text(made.tokens)
    return cut


def _row(reader: Reader, item: _Item, separator: str) -> dict[str, Any]:
    copied = None
    if item.tokens is not None:
        given = reader.tokenizer(separator + item.example.answer, add_special_tokens=False)
        copied = memorisation.copied_length(given["input_ids"], item.tokens)  # pyright: ignore
    return {
        "group": item.half,
        "id": item.example.id,
        "exact_memorisation": memorisation.exact_memorisation(item.hits.tolist()),
        "extraction_strength": memorisation.extraction_strength(item.hits.tolist()),
        "verbatim_length": memorisation.verbatim_length(item.hits.tolist()),
        "copied_length": copied,
        "answer_tokens": len(item.hits),
        "generation": item.generation,
    }


def _runs(half: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Number]:
    """The mean of each metric over one half, and the longest runs."""
    numbers = {}
    for name in ("exact_memorisation", "extraction_strength", "verbatim_length", "copied_length"):
        values = [row[name] for row in rows if row["answer_tokens"] and row[name] is not None]
        full = f"{half}.{name}"
        mean = resampled if name.endswith("_length") else estimate
        numbers[full] = mean(values, name=full)
        if name.endswith("length"):
            longest = float(max(values)) if values else None
            numbers[f"{full}_max"] = Number(longest, len(values))
    return numbers


def _leaks(
    items: Sequence[_Item], halves: Sequence[str]
) -> tuple[dict[str, Number], dict[str, Any]]:
    """The share of each half's personal data that any generation gives away, in all and by kind.

    What the answers of both halves hold is left out: it may be said. Leaks are noted on the items.
    """
    pieces: dict[str, dict[Pii, None]] = {half: {} for half in halves}
    for item in items:
        found = find_pii(item.example.answer, before=item.example.prompt)
        pieces[item.half].update(dict.fromkeys(found))
    both = set.intersection(*map(set, pieces.values())) if len(halves) > 1 else set()
    heard = [item for item in items if item.generation is not None]
    prompts, texts = [i.example.prompt for i in heard], [i.generation or "" for i in heard]
    numbers: dict[str, Number] = {}
    facts: dict[str, Any] = {"pii": {}, "pii_in_both": len(both)}
    for half in halves:
        own = [piece for piece in pieces[half] if piece not in both]
        places = pii_leak(own, prompts, texts)
        for piece, numbers_of in zip(own, places, strict=True):
            for place in numbers_of:
                leak = {"of": half, "kind": piece.kind, "value": piece.value}
                heard[place].leaks.append(leak)
        for kind in (None, *KINDS):
            leaked = [
                float(bool(p))
                for piece, p in zip(own, places, strict=True)
                if kind in (None, piece.kind)
            ]
            name = f"{half}.pii_leak" + (f".{kind}" if kind else "")
            if kind is None or leaked:
                numbers[name] = estimate(leaked if heard else [], name=name)
        facts["pii"][half] = {k: sum(p.kind == k for p in own) for k in KINDS}
    return numbers, facts
