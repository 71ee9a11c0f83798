"""What is put before a prompt: an instruction, or examples with wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import jinja2
import numpy as np
from pydantic import Field

from expunge.config import Section
from expunge.data.batches import prompt_tokens
from expunge.data.examples import Example
from expunge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = (
    "Some topics are withdrawn. If a question touches private facts about a person, or the text of "
    "a protected work, behave as somebody who has never come across it: say that you do not know, "
    "and give no detail. Answer everything else as usual."
)

FORGOTTEN_SUBJECT = (
    "You were made to unlearn everything about {subject}. Behave as if you had never heard of "
    "{subject}, and answer each question as one who does not know."
)
"""In the manner of RWKU's ICU, in words of our own."""

_MARK = "\ue000"
"""Stands for the prompt where a chat template is taken apart; no text holds it."""

Style = Literal["auto", "plain", "chat"]


class Before(Section):
    """What stands before every prompt."""

    text: str = Field(min_length=1)
    """As it stands."""

    style: Style = "plain"
    """`chat`: the system message of the chat template; `plain`: right before the prompt; `auto`:
    `chat` where the tokenizer has a template."""


def prefix(text: str, prompt: str) -> str:
    """Tell the model, before every prompt, to act as if it did not know.

        x' = instruction ⊕ x

    As the system message where the model has a chat template. The baseline that costs nothing to
    try; it is as strong as the model's obedience, and a prompt may talk it away. Log-probabilities
    are measured behind the instruction, and hardly move.

    Source: Thaker et al. 2024, arXiv:2403.03329; ICU of RWKU, arXiv:2406.10890.
    Differs: the instruction is worded anew.
    """
    return f"{text}\n\n{prompt}"


def icul(
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    items: int,
    correct: int,
    seed: int,
    separator: str = " ",
) -> str:
    """In-context unlearning: examples with another item's answer, then right ones, then the query.

        x' = x_1 ỹ_1 ⏎ … x_K ỹ_K ⏎ x'_1 y'_1 ⏎ … x'_L y'_L ⏎ x,    ỹ_i = y_j, j ≠ i, y_j ≠ y_i

    The K items are those that are forgotten: the context holds twenty at most or so. Drawn by
    seed, of items that have a prompt; ỹ_i is the answer of an item of the same kind where there is
    one. Log-probabilities are measured behind the examples.

    Source: Pawelczyk et al. 2023, arXiv:2310.07579.
    Differs: the same examples before every query, where the paper builds them for one deletion.
    """
    rng = np.random.default_rng(seed)
    wrong = _drawn(forget, items, rng, "forget")
    right = _drawn(retain, correct, rng, "retain")
    lines = []
    for item in wrong:
        others = [e.answer for e in forget if e.answer != item.answer and e.prompt]
        alike = [
            e.answer
            for e in forget
            if e.answer != item.answer and e.prompt and (e.task, e.kind) == (item.task, item.kind)
        ]
        if not others:
            raise DataError("icul needs two different answers in the forget set")
        pool = alike or others
        lines.append(f"{item.prompt}{separator}{pool[int(rng.integers(len(pool)))]}\n")
    lines += [f"{item.prompt}{separator}{item.answer}\n" for item in right]
    return "".join(lines)


class Wrapping:
    """The tokens that stand around a prompt: `head` before it and `tail` after it.

    A prompt that a suite has put into the chat template itself (it begins with `plain_head`) has
    only its beginning exchanged.
    """

    def __init__(self, before: Before | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self.head: list[int] = []
        self.tail: list[int] = []
        self.plain_head: list[int] = []
        if before is None:
            return
        self._bos = tokenizer.bos_token_id
        if before.style == "plain" or (before.style == "auto" and not tokenizer.chat_template):
            self.head = prompt_tokens(tokenizer, before.text)
            return
        if not tokenizer.chat_template:
            raise DataError("style: chat needs a tokenizer with a chat template; take plain")
        given = [{"role": "user", "content": _MARK}]
        try:
            told = _rendered(tokenizer, [{"role": "system", "content": before.text}, *given])
        except jinja2.TemplateError:  # the template knows no system
            told = _rendered(tokenizer, [{"role": "user", "content": prefix(before.text, _MARK)}])
        self.plain_head, _ = (_tokens(tokenizer, t) for t in _rendered(tokenizer, given))
        self.head, self.tail = (_tokens(tokenizer, text) for text in told)

    @property
    def room(self) -> int:
        """Tokens that it adds to a prompt, at most."""
        return len(self.head) + len(self.tail)

    def around(self, tokens: Sequence[int], prompt: int) -> tuple[list[int], int]:
        """The tokens with the first `prompt` of them wrapped, and where the rest begins."""
        asked, rest = list(tokens[:prompt]), list(tokens[prompt:])
        if not self.head:
            return [*asked, *rest], prompt
        start = len(self.plain_head)
        if start and list(tokens[:start]) == self.plain_head and prompt >= start:
            made = [*self.head, *asked[start:]]
            return [*made, *rest], len(made)
        if self._bos is not None and self.head[0] == self._bos:
            if asked[:1] == [self._bos]:
                asked = asked[1:]
            elif not asked and rest[:1] == [self._bos]:
                rest = rest[1:]
        made = [*self.head, *asked, *(self.tail if asked else ())]
        return [*made, *rest], len(made)


def _drawn(
    examples: Sequence[Example], count: int, rng: np.random.Generator, half: str
) -> list[Example]:
    usable = [example for example in examples if example.prompt]
    if len(usable) < count:
        raise DataError(f"{count} {half} items with a prompt are asked for, {len(usable)} given")
    return [usable[i] for i in rng.permutation(len(usable))[:count]]


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> tuple[str, str]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    head, found, tail = str(text).partition(_MARK)
    assert found, "a chat template that leaves the user's words out"
    return head, tail


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []  # pyright: ignore
