"""Prompts and the model's context: what fits, what is cut, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expunge import runs
from expunge.data.batches import TokenSequence
from expunge.errors import EvaluationError, ModelError
from expunge.models import config_field

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit_prompts(
    prompts: Sequence[Sequence[int]], context: int, max_new_tokens: int
) -> tuple[list[list[int]], int]:
    """The prompts with room for the answer, cut from the left; and how many had to be cut."""
    room = context - max_new_tokens
    if room < 1:
        raise EvaluationError(
            f"max_new_tokens is {max_new_tokens}, but the model's context holds only "
            f"{context} tokens, prompt included"
        )
    return [list(prompt[-room:]) for prompt in prompts], sum(len(p) > room for p in prompts)


def check_sequences(sequences: Sequence[TokenSequence], context: int) -> None:
    """Refuse a text of which nothing is scored, and one longer than the model reads."""
    for sequence in sequences:
        if sequence.scored_from("answer") >= len(sequence.tokens):
            raise EvaluationError(f"{sequence.id!r} has no token to score")
        if len(sequence.tokens) > context:
            raise EvaluationError(
                f"{sequence.id!r} has {len(sequence.tokens)} tokens, and the model reads {context}"
            )


def context_length(model: PreTrainedModel) -> int:
    """Tokens that the model's positions reach."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2**31)


def sizes_of(path: Path) -> tuple[int, int]:
    """The context and the vocabulary that a config.json names, without loading the model."""
    config = runs.read_json(path)
    if isinstance(config, dict):
        config = config.get("text_config", config)
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise ModelError(f"{path} names no vocab_size, so it is not a language model's")
    context = config_field(config, "max_position_embeddings")
    return context if isinstance(context, int) and context > 0 else 2**31, config["vocab_size"]


def check_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Refuse an empty prompt, and one that leaves no room for its answer."""
    longest = context_length(model)
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise EvaluationError(f"prompt {number} holds no token, so nothing can continue it")
        total = len(prompt) + max_new_tokens
        if total > longest:
            raise EvaluationError(
                f"prompt {number} and {max_new_tokens} new tokens exceed the model's context of "
                f"{longest}; fit_prompts cuts prompts to fit"
            )
