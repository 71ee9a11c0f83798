"""Whether a model that a suite asks about still writes language: what `collapse` judges, read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expunge.data.batches import encode_document, prompt_tokens
from expunge.evaluate import collapse
from expunge.evaluate.prompts import fit_prompts
from expunge.evaluate.reader import Reader
from expunge.evaluate.tables import Generation


@dataclass(frozen=True)
class Openings:
    """What a model makes of the built-in neutral openings, one of each an opening."""

    windows: list[collapse.Window]
    losses: list[float]
    """Mean NLL a token of each opening, nats."""


def collapse_facts(
    reader: Reader,
    generations: Mapping[str, Sequence[Generation]],
    *,
    texts: Sequence[str],
) -> dict[str, Any]:
    """`collapsed`, `reasons` and every measure, for the facts of a suite.

    Judged are the neutral openings, and `generations` of the group `retain` where the suite has
    continuations of kept texts; other groups are reported beside them. `texts` are kept data, whose
    frequent words count as language.
    """
    openings = read_openings(reader)
    windows = {
        name: [window(reader, made) for made in group] for name, group in generations.items()
    }
    judged = collapse.judge(
        windows | {"neutral": openings.windows},
        known=collapse.frequent_words(texts),
        neutral_nll=float(np.mean(openings.losses)),
        vocabulary_size=reader.vocabulary_size,
    )
    return {
        "collapsed": judged["collapsed"],
        "reasons": judged["reasons"],
        "collapse": judged,
    }


def read_openings(reader: Reader) -> Openings:
    """Go on from the neutral openings, and score them as text."""
    raw = [prompt_tokens(reader.tokenizer, d.text) for d in collapse.NEUTRAL]
    prompts, _ = fit_prompts(raw, reader.context, collapse.WINDOW)
    written = reader.generations(prompts, max_new_tokens=collapse.WINDOW, label="neutral openings")
    documents = [
        encode_document(d, reader.tokenizer, max_length=reader.context) for d in collapse.NEUTRAL
    ]
    found = reader.scores(documents, label="score neutral openings")
    return Openings([window(reader, made) for made in written], [one.nll for one in found])


def window(reader: Reader, made: Generation) -> collapse.Window:
    """What is looked at of a generation."""
    tokens = made.tokens[: collapse.WINDOW]
    return collapse.Window(reader.text(tokens), tokens)
