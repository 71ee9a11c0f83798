"""A guard at work: what it makes of prompts, models and answers. It changes no weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from expunge import runs
from expunge.data.batches import TokenSequence
from expunge.guard.contrast import combine_of
from expunge.guard.helpers import open_helpers
from expunge.guard.made import Made, read_guard
from expunge.guard.prompting import Wrapping
from expunge.guard.standin import StandIn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Guard:
    """What is made of prompts before a model reads them, of its logits, and of its answers.

    room: tokens that it puts around a prompt. Token lists begin as the tokenizer begins a text.
    """

    def __init__(
        self, made: Made, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None
    ) -> None:
        self.made, self.tokenizer, self.folder = made, tokenizer, folder
        self._wrapping = Wrapping(made.before, tokenizer)
        self.room = self._wrapping.room

    @property
    def key(self) -> str:
        """Stands for all that it does."""
        if self.folder is not None:
            return runs.hash_folder(self.folder)
        return hashlib.sha256(self.made.model_dump_json().encode()).hexdigest()

    @property
    def changes_logits(self) -> bool:
        """Whether the model must be read through a stand-in."""
        return self.made.contrast is not None or self.made.corruption is not None

    @property
    def filters_answers(self) -> bool:
        """Whether a whole answer must be there before it is tested."""
        return self.made.outputs is not None

    @property
    def refusal(self) -> list[int]:
        """The tokens of the refusal."""
        return self.tokenizer(self.made.refusal, add_special_tokens=False)["input_ids"]  # pyright: ignore

    def refuses(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt is answered by the refusal, unread."""
        scope = self.made.scope
        return self.made.refuses_prompts and scope is not None and scope.holds(self._text(prompt))

    def wrapped(self, prompt: Sequence[int]) -> list[int]:
        """A prompt with what stands before it, and after it in a chat template."""
        return self._wrapping.around(prompt, len(prompt))[0]

    def scored(self, sequence: TokenSequence) -> TokenSequence:
        """A text with its prompt wrapped; the same tokens are scored."""
        asked = min(sequence.answer_start, len(sequence.tokens))
        first = sequence.scored_from("answer")
        tokens, start = self._wrapping.around(sequence.tokens, asked)
        if not self.room:
            return sequence
        scored = len(sequence.tokens) - first
        assert start <= len(tokens) - scored
        return replace(sequence, tokens=tuple(tokens), answer_start=len(tokens) - scored)

    def corrupts(self, tokens: Sequence[int], prompt: int) -> int:
        """How many tokens of a text get noise: its prompt, or all of a text without, if in scope.

        A text without a prompt is what somebody sends to have it scored.
        """
        scope = self.made.scope
        count = prompt or len(tokens)
        if self.made.corruption is None or scope is None:
            return 0
        return count if scope.holds(self._text(tokens[:count])) else 0

    def answer(self, prompt: Sequence[int], tokens: list[int]) -> list[int]:
        """An answer, or the refusal in its place. `prompt` is the one that was asked."""
        outputs, scope = self.made.outputs, self.made.scope
        if outputs is None or scope is None:
            return tokens
        leaks = outputs.leak(self._text(prompt), self._text(tokens), scope)
        return self.refusal if leaks else tokens

    def around(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, or what stands in for it where logits or embeddings are changed."""
        if not self.changes_logits:
            return model
        made = self.made
        helpers = open_helpers(made.helpers, self.folder, model, self.tokenizer)
        combine = None if made.contrast is None else combine_of(made.contrast)
        return StandIn(model, helpers, combine, made.corruption)  # pyright: ignore[reportReturnType]

    def _text(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def open_guard(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Guard:
    """The guard of a folder."""
    return Guard(read_guard(folder), tokenizer, folder)
