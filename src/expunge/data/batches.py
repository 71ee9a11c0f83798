"""Token sequences and packed batches: many sequences in one row, without padding.

Dimensions: B sequences, T tokens of a pack, N scored tokens among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from expunge.data.chat import chat_tokens, turn_end
from expunge.data.examples import Document, Example, Items
from expunge.errors import DataError
from expunge.packs import Pack
from expunge.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scope = Literal["answer", "document"]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """The tokens of one example: prompt, answer, end of text."""

    id: str
    tokens: tuple[int, ...]
    answer_start: int
    """Position of the first answer token."""
    cut: int = 0
    """How many tokens did not fit and were left out."""
    asks: bool = False
    """Whether the example is a question."""
    ending: int = 0
    """How many of the last tokens end the text and are no part of what is said."""

    def is_among(self, items: Items) -> bool:
        """Whether this is one of these items."""
        return items == "all" or self.asks == (items == "questions")

    def scored_from(self, scope: Scope) -> int:
        """First position whose token is scored; position 0 has nothing before it to predict it."""
        return max(1, self.answer_start if scope == "answer" else 1)


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    prompt_tail: int | None = None,
    separator: str = "",
    chat: bool = False,
) -> TokenSequence:
    """Tokens of prompt + answer + EOS, no chat template (BOS first where the tokenizer adds one).

    A prompt keeps its last `prompt_tail` tokens, and an answer that still does not fit loses its
    end (and its EOS). `cut` counts what was lost. The separator is the answer's first character,
    so that the prompt alone is what generation starts from. With `chat` the prompt is the user's
    turn in the tokenizer's chat template, whole, and the answer ends as turns do there.
    """
    if chat and example.prompt:
        return _encode_turn(example, tokenizer, max_length)
    prompt = prompt_tokens(tokenizer, example.prompt)
    joint = separator if example.prompt else ""
    answer = answer_tokens(tokenizer, joint + example.answer)
    tail = max_length if prompt_tail is None else prompt_tail
    kept_prompt = prompt[-tail:] if tail else []
    tokens = (kept_prompt + answer)[:max_length]
    if len(tokens) <= len(kept_prompt):
        kept_prompt = kept_prompt[-(max_length // 2) :]
        tokens = (kept_prompt + answer)[:max_length]
    return TokenSequence(
        id=example.id,
        tokens=tuple(tokens),
        answer_start=len(kept_prompt),
        cut=len(prompt) + len(answer) - len(tokens),
        asks=example.kind == "qa",
        ending=int(tokens[len(kept_prompt) :] == answer),
    )


def _encode_turn(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TokenSequence:
    prompt = chat_tokens(tokenizer, example.prompt)
    if len(prompt) >= max_length:
        raise DataError(
            f"the prompt of item {example.id} takes {len(prompt)} tokens in the chat template, and "
            f"model.max_length is {max_length}; raise it"
        )
    end = turn_end(tokenizer) or [_eos(tokenizer)]
    whole = [*prompt, *_tokens(tokenizer, example.answer), *end]
    cut = max(0, len(whole) - max_length)
    return TokenSequence(
        id=example.id,
        tokens=tuple(whole[:max_length]),
        answer_start=len(prompt),
        cut=cut,
        asks=example.kind == "qa",
        ending=max(0, len(end) - cut),
    )


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    prompt_tail: int | None = None,
    separator: str = "",
    chat: bool = False,
) -> list[TokenSequence]:
    """Token sequences of examples, saying what is cut."""
    cuts = {"max_length": max_length, "prompt_tail": prompt_tail}
    sequences = [
        encode(example, tokenizer, separator=separator, chat=chat, **cuts) for example in examples
    ]
    cut = [sequence for sequence in sequences if sequence.cut]
    if cut:
        worst = max(cut, key=lambda sequence: sequence.cut)
        say(
            f"{len(cut)} of {len(sequences)} items are longer than {max_length} tokens or "
            f"their prompts than {prompt_tail}; {sum(s.cut for s in cut)} tokens are cut, "
            f"most ({worst.cut}) from {worst.id}"
        )
    return sequences


def encode_document(
    document: Document, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> TokenSequence:
    """Tokens of a whole text, without EOS, scored from its second token on."""
    tokens = prompt_tokens(tokenizer, document.text)
    if len(tokens) < 2:
        raise DataError(f"document {document.id} has fewer than two tokens, so nothing to score")
    kept = tuple(tokens[:max_length])
    return TokenSequence(id=document.id, tokens=kept, answer_start=0, cut=len(tokens) - len(kept))


def pack(
    sequences: Sequence[TokenSequence],
    scope: Scope | Sequence[Scope],
    device: str | torch.device,
    *,
    position: int = 0,
) -> Pack:
    """Lay the sequences end to end and mark what is scored; each begins at `position`.

    The scope is one for all, or one for each.
    """
    scopes: Sequence[Scope] = [scope] * len(sequences) if isinstance(scope, str) else scope  # pyright: ignore
    tokens: list[int] = []
    positions: list[int] = []
    scored: list[int] = []
    owner: list[int] = []
    for number, (sequence, its_scope) in enumerate(zip(sequences, scopes, strict=True)):
        start, length = len(tokens), len(sequence.tokens)
        first = sequence.scored_from(its_scope)
        tokens.extend(sequence.tokens)
        positions.extend(range(position, position + length))
        scored.extend(range(start + first - 1, start + length - 1))
        owner.extend([number] * (length - first))
    flat = torch.tensor(tokens, device=device)
    index = torch.tensor(scored, device=device, dtype=torch.int64)
    return Pack(
        tokens=flat,
        positions=torch.tensor(positions, device=device),
        lengths=tuple(len(sequence.tokens) for sequence in sequences),
        scored=index,
        targets=flat[index + 1],
        sequence=torch.tensor(owner, device=device, dtype=torch.int64),
        ids=tuple(sequence.id for sequence in sequences),
    )


def packs_by_length(
    sequences: Iterable[TokenSequence], *, max_tokens: int
) -> Iterator[list[TokenSequence]]:
    """Group sequences, longest first, so that no group exceeds `max_tokens` (one may, alone)."""
    group: list[TokenSequence] = []
    size = 0
    for sequence in sorted(sequences, key=lambda s: (-len(s.tokens), s.id)):
        if group and size + len(sequence.tokens) > max_tokens:
            yield group
            group, size = [], 0
        group.append(sequence)
        size += len(sequence.tokens)
    if group:
        yield group


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text as the model expects it to begin: with BOS where the tokenizer adds one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prefixed = tokenizer("")["input_ids"][:1] == start  # pyright: ignore
    return [*(start if prefixed else []), *_tokens(tokenizer, text)]  # pyright: ignore


def asked_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> list[int]:
    """Tokens of what is continued: a prompt, as the user's turn where the model chats."""
    return chat_tokens(tokenizer, prompt) if chat else prompt_tokens(tokenizer, prompt)


def answer_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of an answer, and the end of text."""
    return [*_tokens(tokenizer, text), _eos(tokenizer)]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []  # pyright: ignore


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer names no end-of-text token, so answers cannot be ended")
    return int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
