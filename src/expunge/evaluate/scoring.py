"""What a model says of the tokens of many texts: in packs, what all texts begin with read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expunge.data.batches import TokenSequence, pack, packs_by_length
from expunge.errors import EvaluationError
from expunge.evaluate.generate import end_pack
from expunge.packs import (
    has_logits_of_its_own,
    hidden_states,
    hidden_states_after,
    output_head,
    token_logits,
)
from expunge.scores import logits_statistics, token_statistics

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

LEAST_SHARED = 32
"""Tokens that all texts must begin with to be read apart: a pack attends slower to a prefix."""

COLUMNS = ("logp", "rank", "hit", "entropy", "variance")

Scored = list[tuple[TokenSequence, dict[str, Any]]]
"""Texts and the columns of their rows in the table of scores."""


def score_texts(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], *, max_tokens: int
) -> Iterator[Scored]:
    """Each text with its row, a pack at a time, the longest first."""
    shared = 0 if getattr(model, "reads_whole", False) else shared_start(sequences)
    prefix = _read(model, sequences[0].tokens[:shared]) if shared else None
    rest = [
        TokenSequence(str(i), s.tokens[shared:], s.scored_from("answer") - shared)
        for i, s in enumerate(sequences)
    ]
    for group in packs_by_length(rest, max_tokens=max_tokens):
        columns, bounds = _columns(model, group, prefix, shared)
        scored: Scored = []
        for part, begin, end in zip(group, bounds, bounds[1:], strict=False):
            sequence = sequences[int(part.id)]
            row = {name: column[begin:end].tolist() for name, column in columns.items()}
            if not np.isfinite(columns["logp"][begin:end]).all():
                raise EvaluationError(
                    f"the log-probabilities of {sequence.id!r} are not finite; the model is broken"
                )
            scored.append((sequence, row))
        yield scored


def shared_start(sequences: Sequence[TokenSequence]) -> int:
    """How many tokens all texts begin with before any that is scored; 0 where few or one text."""
    if len(sequences) < 2:
        return 0
    shared = min(sequence.scored_from("answer") for sequence in sequences) - 1
    first = sequences[0].tokens
    while any(sequence.tokens[:shared] != first[:shared] for sequence in sequences):
        shared -= 1
    return shared if shared >= LEAST_SHARED else 0


@torch.inference_mode()
def _read(model: PreTrainedModel, tokens: Sequence[int]) -> Cache:
    from transformers import DynamicCache

    cache = DynamicCache()
    hidden_states(model, end_pack([tokens], next(model.parameters()).device), cache)
    return cache


@torch.inference_mode()
def _columns(
    model: PreTrainedModel, group: Sequence[TokenSequence], prefix: Cache | None, start: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each statistic of all scored tokens of a pack, and where each text's begin and end."""
    packed = pack(group, "answer", next(model.parameters()).device, position=start)
    if prefix is None:
        states = hidden_states(model, packed)
    else:
        states = hidden_states_after(model, packed, prefix)
    if has_logits_of_its_own(model):
        found = logits_statistics(states, packed.targets, lambda s: token_logits(model, s))
    else:
        found = token_statistics(states, output_head(model), packed.targets)
    owner = packed.sequence.cpu().numpy()
    bounds = np.searchsorted(owner, np.arange(len(group) + 1))
    return {name: getattr(found, name).cpu().numpy() for name in COLUMNS}, bounds
