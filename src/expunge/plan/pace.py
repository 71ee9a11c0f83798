"""How fast a model reads and writes on this machine, with an adapter and without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from expunge import lora
from expunge.data.batches import TokenSequence
from expunge.evaluate.generate import generate
from expunge.evaluate.reader import PACK_TOKENS
from expunge.evaluate.scoring import score_texts
from expunge.lora import Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCORED_TOKENS, NEW_TOKENS = 4000, 6


@dataclass(frozen=True)
class Pace:
    """Seconds of a token read, and of a step of generation: as such, and for each row."""

    read: float = 0.0
    step: float = 0.0
    row: float = 0.0


def pace_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[TokenSequence],
    rows: int,
) -> Pace:
    """Read some of the texts and write a few tokens after at most so many of their prompts."""
    chosen, tokens = [], 0
    for text in texts:
        if tokens < SCORED_TOKENS:
            chosen.append(text)
            tokens += len(text.tokens)
    warm = chosen[: max(1, len(chosen) // 4)]
    list(score_texts(model, warm, max_tokens=PACK_TOKENS))
    start = time.monotonic()
    list(score_texts(model, chosen, max_tokens=PACK_TOKENS))
    read = (time.monotonic() - start) / tokens
    prompts = [text.tokens[: text.answer_start] for text in chosen if text.answer_start]
    rows = min(rows, len(prompts))
    few = max(1, rows // 4)
    many, one = (_step(model, tokenizer, prompts[:count]) for count in (rows, few))
    each = max(0.0, (many - one) / (rows - few)) if rows > few else 0.0
    return Pace(read, max(0.0, one - few * each), each)


def adapted_pace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[TokenSequence],
    rows: int,
    adapter: Lora,
) -> Pace:
    """The same with an adapter on the model, which is taken off again."""
    for layer in lora.add_adapter(model, adapter, seed=0).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    found = pace_of(model, tokenizer, texts, rows)
    lora.remove_adapter(model)
    return found


def _step(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> float:
    """Seconds of a step of generation over these prompts, reading them left out."""

    def seconds(count: int) -> float:
        start = time.monotonic()
        generate(model, tokenizer, prompts, max_new_tokens=count, max_batch=len(prompts))
        return time.monotonic() - start

    short = min(seconds(1) for _ in range(2))
    long = min(seconds(NEW_TOKENS + 1) for _ in range(2))
    return max(0.0, long - short) / NEW_TOKENS
