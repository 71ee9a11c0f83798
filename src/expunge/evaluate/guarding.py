"""What a reader does through its guard; without one, nothing is changed.

What is generated, scored and chosen goes through the guard: prompts are wrapped and refused,
logits changed, answers replaced. A filter changes no log-probability, for the weights give those as
before. What reads the weights themselves (gradients, traces) is unguarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expunge.data.batches import TokenSequence
from expunge.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from expunge.guard.guard import Guard


class Guarding:
    """A guard, or none, as a reader asks it."""

    def __init__(self, guard: Guard | None) -> None:
        self._guard = guard
        self.room = 0 if guard is None else guard.room
        self._speaker: Any = None

    def __bool__(self) -> bool:
        return self._guard is not None

    @property
    def filters_answers(self) -> bool:
        """Whether whole answers are tested, so that none may be stopped early."""
        return self._guard is not None and self._guard.filters_answers

    def speaker(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, or what stands in for it; made once."""
        if self._guard is None:
            return model
        if self._speaker is None:
            self._speaker = self._guard.around(model)
        return self._speaker

    def refused(self, prompts: Sequence[Sequence[int]]) -> list[bool]:
        """Which prompts the model never sees."""
        guard = self._guard
        return [guard is not None and guard.refuses(prompt) for prompt in prompts]

    def refusal(self, max_new_tokens: int) -> dict[str, Any]:
        """The row of a refused generation."""
        assert self._guard is not None
        return {"tokens": self._guard.refusal[:max_new_tokens], "complete": True}

    def wrapped(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Prompts as the model sees them."""
        if self._guard is None:
            return [list(prompt) for prompt in prompts]
        made = [self._guard.wrapped(prompt) for prompt in prompts]
        self._note({tuple(tokens): len(tokens) for tokens in made})
        return made

    def scored(self, sequences: Sequence[TokenSequence], context: int) -> list[TokenSequence]:
        """Texts as the model sees them, the same tokens scored."""
        if self._guard is None:
            return list(sequences)
        for sequence in sequences:
            if len(sequence.tokens) > context:
                raise EvaluationError(
                    f"{sequence.id!r} has {len(sequence.tokens)} tokens, and beside the guard's "
                    f"{self.room} the model's context holds {context}"
                )
        made = [self._guard.scored(sequence) for sequence in sequences]
        self._note({s.tokens: s.answer_start for s in made})
        return made

    def filtered(
        self, prompts: Sequence[Sequence[int]], written: list[list[int]], limit: int
    ) -> list[list[int]]:
        """Each answer, or what replaces it."""
        guard = self._guard
        if guard is None:
            return written
        return [guard.answer(p, tokens)[:limit] for p, tokens in zip(prompts, written, strict=True)]

    def _note(self, asked: dict[tuple[int, ...], int]) -> None:
        """Tell the stand-in which texts, by the length of their prompts, get noise."""
        assert self._guard is not None
        if self._guard.made.corruption is not None:
            corrupted = {text: self._guard.corrupts(text, n) for text, n in asked.items()}
            self._speaker.corrupted = corrupted
