"""The suite `collapse`: does a model still write language? It needs no data.

Dimensions: N texts that the model goes on from, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from expunge.config import Section
from expunge.data.batches import asked_tokens
from expunge.data.examples import Example
from expunge.data.sources import Source, read_examples
from expunge.evaluate import collapse
from expunge.evaluate.collapse import Window
from expunge.evaluate.numbers import Measured, Number, estimate, resampled
from expunge.evaluate.prompts import fit_prompts
from expunge.evaluate.reader import Reader
from expunge.evaluate.semeval import begun
from expunge.evaluate.soundness import collapse_facts, read_openings, window

LARGEST = math.log(1e300)
"""Nats a token beyond which a perplexity is no number."""

RESAMPLES = 200
_HITS = ("empty", "wordless", "looping")
"""Measures that a text has or has not."""


class Collapse(Section):
    """What is judged beside the built-in openings."""

    kept: Source | None = None
    """Items or texts that the model must have kept: it goes on from each of them, from half of a
    text without a prompt. Null judges by twenty built-in openings alone."""

    limit: int | None = Field(default=60, ge=1)
    """Of these a seeded sample of so many; the others are items without measures."""

    chat: bool = False
    """Put prompts of `kept` into the tokenizer's chat template."""

    seed: int = 0
    """Draws the sample."""


def collapse_suite(reader: Reader, section: Collapse) -> Measured:
    """Every measure of what the model writes, by group, and of how plain text surprises it.

        neutral.perplexity = exp(mean NLL a token),    surprise = mean NLL / ln V

    Intervals are Wilson's for shares of texts, else those of texts drawn anew, moved by their bias:
    texts that are drawn twice bring no new tokens, which lowers an entropy.
    """
    kept = read_examples(section.kept) if section.kept is not None else []
    rng = np.random.default_rng(section.seed)
    chosen = set(rng.permutation(len(kept))[: section.limit].tolist())
    asked = [example for number, example in enumerate(kept) if number in chosen]
    prompts, cut = fit_prompts(
        [asked_tokens(reader.tokenizer, begun(e)[0], chat=section.chat) for e in asked],
        reader.context,
        collapse.WINDOW,
    )
    made = reader.generations(prompts, max_new_tokens=collapse.WINDOW, label="kept texts")
    written = dict(zip((e.id for e in asked), made, strict=True))
    groups = {
        group: [written[e.id] for e in asked if _group(e) == group]
        for group in dict.fromkeys(map(_group, asked))
    }
    texts = [f"{e.prompt} {e.answer}" for e in kept]
    facts = collapse_facts(reader, groups, texts=texts)
    openings = read_openings(reader)
    windows = {name: [window(reader, one) for one in found] for name, found in groups.items()}
    windows["neutral"] = openings.windows
    numbers = _of_losses(openings.losses, reader.vocabulary_size)
    for group, found in windows.items():
        numbers |= _of_windows(group, found, collapse.frequent_words(texts))
    rows = [
        _row("neutral", d.id, d.text, read, nll)
        for d, read, nll in zip(collapse.NEUTRAL, openings.windows, openings.losses, strict=True)
    ]
    for example in kept:
        generation = written.get(example.id)
        read = window(reader, generation) if generation is not None else None
        rows.append(_row(_group(example), example.id, begun(example)[0], read))
    return Measured(numbers, rows, {**facts, "prompts_cut": cut})


def _group(example: Example) -> str:
    """Questions are reported and not judged: a sound base model may answer them with nothing."""
    return "retain_questions" if example.kind == "qa" else "retain"


def _of_losses(losses: Sequence[float], vocabulary: int) -> dict[str, Number]:
    nll = resampled(losses, name="neutral.nll")
    assert nll.value is not None and nll.low is not None and nll.high is not None
    low, value, high = nll.low, nll.value, nll.high
    share = math.log(vocabulary)
    perplexity = Number(None, nll.n)  # of a model that is beyond numbers
    if high < LARGEST:
        perplexity = Number(math.exp(value), nll.n, math.exp(low), math.exp(high))
    return {
        "neutral.nll": nll,
        "neutral.perplexity": perplexity,
        "surprise": Number(value / share, nll.n, low / share, high / share),
    }


def _of_windows(group: str, windows: Sequence[Window], known: frozenset[str]) -> dict[str, Number]:
    rng = np.random.default_rng(0)
    drawn = [
        collapse.measures(
            [windows[i] for i in rng.integers(len(windows), size=len(windows))], known
        )
        for _ in range(RESAMPLES)
    ]
    found = collapse.measures(windows, known)
    del found["n"]
    numbers = {
        f"{group}.{name}": _number(value, len(windows), [one[name] for one in drawn])
        for name, value in found.items()
    }
    each = [collapse.measures([one]) for one in windows]
    for name in _HITS:
        numbers[f"{group}.{name}"] = estimate([one[name] for one in each], name=name)
    return numbers


def _number(value: float | None, n: int, drawn: Sequence[float | None]) -> Number:
    known = [one for one in drawn if one is not None]
    if value is None or len(set(known)) < 2:  # all alike: no spread is seen, not none there
        return Number(value, n)
    low, high = np.quantile(known, [0.025, 0.975]) + value - np.mean(known)
    return Number(value, n, min(float(low), value), max(float(high), value))


def _row(
    group: str, name: str, prompt: str, read: Window | None, nll: float | None = None
) -> dict[str, Any]:
    row: dict[str, Any] = {"group": group, "id": name, "prompt": prompt, "nll": nll}
    row |= dict.fromkeys(("generation", "empty", "wordless", "looping", "distinct_1", "distinct_2"))
    if read is not None:
        found = collapse.measures([read])
        row |= {measure: found[measure] for measure in row.keys() & found.keys()}
        row["generation"] = read.text
    return row
