"""Generation for many prompts at once, with a cache of slots that are refilled as rows end.

Dimensions: R live rows of S slots, C columns of the cache (one a token), d width, V vocabulary.
Prompts are read in packs, without padding. Each row then writes at its own column, and a mask
hides the columns beyond it, so rows of any length share a step, a waiting prompt can take the
slot of a finished one, and a padding token never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.data.chat import ends_of
from expunge.errors import EvaluationError
from expunge.evaluate.prompts import check_prompts
from expunge.evaluate.recurrent import Choose, continued_alone
from expunge.packs import (
    Pack,
    beyond_window,
    decoded,
    has_logits_of_its_own,
    hidden_states,
    in_buckets,
    token_logits,
)
from expunge.progress import progress

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

MAX_BATCH = 64
"""Rows decoded at once. Each holds a cache of the longest prompt and answer: for SmolLM2 in
bfloat16, 64 rows of 500 tokens take 0.7 GB."""

PACK_TOKENS = 4096
"""Prompt tokens read in one forward pass."""

EARLIEST_STOP = 48
"""New tokens after which, and after every as many more, `settled` is asked."""

Settled = Callable[[int, list[int]], bool]
"""(prompt number, new tokens) → whether no further token can change what is measured."""


def last_asked(length: int) -> int:
    """After how many of a row's tokens `settled` was asked last; 0 where it was not."""
    return length - length % EARLIEST_STOP


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    max_batch: int = MAX_BATCH,
    settled: Settled | None = None,
    choose: Choose | None = None,
    known: Sequence[Sequence[int]] = (),
    label: str = "generate",
) -> list[list[int]]:
    """A continuation of each prompt, without its end-of-text token.

    Each token is the likeliest, or what `choose` takes. A row ends at end of text, at
    `max_new_tokens`, or where `settled` says so. `settled` exists because a destroyed model never
    ends its text: whoever knows the metrics may cut what cannot change them, never before
    EARLIEST_STOP tokens, which is the text that collapse measures read. `known` are the first
    tokens of each continuation, where they are known (see Beginnings): they are read, not written.
    """
    check_prompts(model, prompts, max_new_tokens)
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if in_buckets(model) or beyond_window(model, longest):
        if has_logits_of_its_own(model):
            raise EvaluationError(
                f"a prompt and {max_new_tokens} new tokens exceed the model's sliding window, "
                "which a guard that changes logits or embeddings cannot follow"
            )
        ends = end_tokens(model, tokenizer)
        return continued_alone(model, ends, prompts, max_new_tokens, choose)
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # taken from the end
    slots = min(max_batch, len(prompts))
    rows = _Rows(model, tokenizer, slots, settled, max_new_tokens, choose, known)
    with progress(label, len(prompts), "prompts") as bar:
        waiting = [number for number in waiting if not rows.ends_as_known(number)]
        bar(len(prompts) - len(waiting))
        while waiting or rows.live:
            free = rows.slots - len(rows.live)
            if waiting and (free >= max(1, rows.slots // 8) or not rows.live):
                joining = [waiting.pop() for _ in range(min(free, len(waiting)))]
                bar(rows.join(joining, prompts))
            if rows.live:
                bar(rows.step())
    return [rows.done[i] for i in range(len(prompts))]


def end_pack(sequences: Sequence[Sequence[int]], device: torch.device, start: int = 0) -> Pack:
    """A pack read at the last token of each sequence; positions count from `start`."""
    lengths = tuple(map(len, sequences))
    tokens = torch.tensor([token for tokens in sequences for token in tokens], device=device)
    places = [start + i for length in lengths for i in range(length)]
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    owner = torch.arange(len(lengths), device=device)
    positions = torch.tensor(places, device=device)
    return Pack(tokens, positions, lengths, ends, tokens[ends], owner, ("",) * len(lengths))


@dataclass
class _Row:
    """One prompt that is being continued; its next token is the last of `new`."""

    number: int
    length: int  # tokens in the cache
    new: list[int]


@dataclass
class Frontier:
    """Where the current step writes, shared by every layer's slots."""

    columns: Tensor  # (R,)
    width: int  # columns that the step reads


@dataclass
class _Rows:
    """The live rows, at the front of the slots, and what has been finished."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    slots: int
    settled: Settled | None
    max_new_tokens: int
    choose: Choose | None = None
    known: Sequence[Sequence[int]] = ()
    live: list[_Row] = field(default_factory=list)
    done: dict[int, list[int]] = field(default_factory=dict)
    cache: Cache | None = None

    def __post_init__(self) -> None:
        self.ends = end_tokens(self.model, self.tokenizer)
        self.device = next(self.model.parameters()).device
        self.frontier = Frontier(torch.empty(0), 0)

    def ends_as_known(self, number: int) -> bool:
        """Whether a prompt's known tokens are all that would be written; then they are kept."""
        row = _Row(number, 0, [])
        for token in self._begun(number):
            row.new.append(token)
            if self._has_ended(row):
                self.done[number] = row.new
                return True
        return False

    def join(self, numbers: list[int], prompts: Sequence[Sequence[int]]) -> int:
        """Read the given prompts (longest first) into free slots; returns how many ended at once.

        Columns are made for the first prompt to join, which is the longest of all.
        """
        columns = len(prompts[numbers[0]]) + self.max_new_tokens
        group: list[int] = []
        before = len(self.live)
        for number in numbers:
            texts = [*group, number]
            if group and sum(len(prompts[i]) + len(self._begun(i)) for i in texts) > PACK_TOKENS:
                self._read(group, prompts, columns)
                group = []
            group.append(number)
        self._read(group, prompts, columns)
        return self._retire(first=before)

    def step(self) -> int:
        """One more token for every live row; returns how many rows ended."""
        lengths = torch.tensor([row.length for row in self.live], device=self.device)  # (R,)
        width = max(row.length for row in self.live) + 1
        self.frontier.columns, self.frontier.width = lengths, width
        hidden = torch.arange(width, device=self.device) > lengths[:, None]  # (R, width)
        mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=self.device)
        mask = mask.masked_fill(hidden, float("-inf"))[:, None, None]  # (R, 1, 1, width)
        tokens = torch.tensor([[row.new[-1]] for row in self.live], device=self.device)
        states = decoded(
            self.model,
            input_ids=tokens,
            position_ids=lengths[:, None],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )[:, 0]  # (R, d)
        numbers = [row.number for row in self.live]
        for row, token in zip(self.live, self._next(states, numbers), strict=True):
            row.length += 1
            row.new.append(token)
        return self._retire()

    def _read(self, numbers: list[int], prompts: Sequence[Sequence[int]], columns: int) -> None:
        """Forward the prompts as one pack, and copy each one's keys and values to a slot."""
        from transformers import DynamicCache

        packed = DynamicCache()
        texts = [[*prompts[i], *self._begun(i)] for i in numbers]
        pack = end_pack(texts, self.device)
        states = hidden_states(self.model, pack, packed)
        if self.cache is None:
            self.cache = self._empty_cache(packed, columns)
        start = 0
        chosen = self._next(states, numbers)
        for number, text, token in zip(numbers, texts, chosen, strict=True):
            length, slot = len(text), len(self.live)
            for source, target in zip(packed.layers, self.cache.layers, strict=True):
                target.keys[slot, :, :length] = source.keys[0, :, start : start + length]  # pyright: ignore
                target.values[slot, :, :length] = source.values[0, :, start : start + length]  # pyright: ignore
            self.live.append(_Row(number, length, [*self._begun(number), token]))
            start += length

    def _empty_cache(self, like: DynamicCache, columns: int) -> Cache:
        from transformers import Cache

        from expunge.evaluate.slots import Slots

        layers = []
        for layer in like.layers:
            # Zeros, for a masked column is still multiplied, and 0 · NaN would be NaN.
            held: Any = layer
            keys, values = (
                one.new_zeros(self.slots, one.shape[1], columns, one.shape[3])
                for one in (held.keys, held.values)
            )
            layers.append(Slots(keys, values, self.frontier))
        return Cache(layers=layers)

    def _next(self, states: Tensor, numbers: Sequence[int]) -> list[int]:
        logits = token_logits(self.model, states, choosing=True)
        return self.choose(logits, numbers) if self.choose else logits.argmax(-1).tolist()

    def _retire(self, first: int = 0) -> int:
        """Take out the rows that ended, from slot `first` on; the last row moves to the gap."""
        ended = 0
        for slot in reversed(range(first, len(self.live))):
            row = self.live[slot]
            if not self._has_ended(row):
                continue
            self.done[row.number] = row.new
            last = len(self.live) - 1
            if slot != last:
                self.live[slot] = self.live[last]
                for layer in self.cache.layers:  # pyright: ignore[reportOptionalMemberAccess]
                    layer.keys[slot] = layer.keys[last]  # pyright: ignore
                    layer.values[slot] = layer.values[last]  # pyright: ignore
            self.live.pop()
            ended += 1
        return ended

    def _has_ended(self, row: _Row) -> bool:
        """Whether no token follows; an end of text is taken off the row."""
        if row.new[-1] in self.ends:
            row.new.pop()
            return True
        return len(row.new) >= self.max_new_tokens or (
            self.settled is not None
            and len(row.new) % EARLIEST_STOP == 0
            and self.settled(row.number, row.new)
        )

    def _begun(self, number: int) -> Sequence[int]:
        return self.known[number] if self.known else ()


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text, of the tokenizer and the model's generation settings."""
    return ends_of(tokenizer, getattr(model.generation_config, "eos_token_id", None))
