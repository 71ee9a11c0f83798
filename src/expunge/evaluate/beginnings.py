"""What scoring has shown of a greedy text before it is written.

Where a text was scored, its answer's tokens up to the first that was not the likeliest are what
greedy generation writes after its prompt. A model that remembers a text is so hardly asked to write
it.
"""

from __future__ import annotations

from collections.abc import Sequence

from expunge.data.batches import TokenSequence
from expunge.evaluate.tables import TokenScores


class Beginnings:
    """The longest beginning of what follows each prompt that scoring one model has shown."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def scored(self, sequences: Sequence[TokenSequence], found: Sequence[TokenScores]) -> None:
        """Learn from which of each text's scored tokens were the arg-max."""
        for sequence, scores in zip(sequences, found, strict=True):
            first, missed = sequence.scored_from("answer"), (~scores.hit).nonzero()[0]
            end = first + int(missed[0]) if len(missed) else len(sequence.tokens)
            prompt = sequence.tokens[:first]
            if end - first > len(self.after(prompt)):
                self._known[prompt] = sequence.tokens[first:end]

    def after(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Tokens that follow a prompt, the end of text among them where it is known to end."""
        return self._known.get(tuple(prompt), ())
