"""What is known of a greedy text before it is written.

Where a text was scored, its answer's tokens up to the first that was not the likeliest are what
greedy generation writes after its prompt; and what was once written is written again. A model that
remembers a text is so hardly asked to write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expunge.data.batches import TokenSequence
from expunge.evaluate.tables import Generation, TokenScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Beginnings:
    """The longest known beginning of what follows each prompt, by one model."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def scored(self, sequences: Sequence[TokenSequence], found: Sequence[TokenScores]) -> None:
        """Learn from which of each text's scored tokens were the arg-max."""
        for sequence, scores in zip(sequences, found, strict=True):
            first, missed = sequence.scored_from("answer"), (~scores.hit).nonzero()[0]
            end = first + int(missed[0]) if len(missed) else len(sequence.tokens)
            self._learn(sequence.tokens[:first], sequence.tokens[first:end])

    def written(
        self,
        prompts: Sequence[Sequence[int]],
        made: Sequence[Generation],
        limit: int,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Learn from what was written, at most `limit` tokens a text."""
        end: Any = tokenizer.eos_token_id
        for prompt, text in zip(prompts, made, strict=True):
            ended = text.complete and len(text.tokens) < limit
            after = () if end is None or not ended else (int(end),)
            self._learn(tuple(prompt), (*text.tokens, *after))

    def after(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Tokens that follow a prompt, the end of text among them where it is known to end."""
        return self._known.get(tuple(prompt), ())

    def _learn(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        if len(tokens) > len(self._known.get(prompt, ())):
            self._known[prompt] = tokens
