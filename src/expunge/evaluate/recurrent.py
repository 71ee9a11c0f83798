"""Continuations one by one, by the model's own way: for states that no cache of slots can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel

Choose = Callable[[Tensor, Sequence[int]], list[int]]
"""(logits (R, V), prompt numbers) → the next token of each row."""


def continued_alone(
    model: PreTrainedModel,
    ends: frozenset[int],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: Choose | None = None,
) -> list[list[int]]:
    """The continuation of each prompt, without the token of `ends` that ends it."""
    device, listed = next(model.parameters()).device, sorted(ends)
    found = []
    for number, prompt in enumerate(prompts):
        tokens = torch.tensor([list(prompt)], device=device)
        made = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=listed,
            pad_token_id=listed[0],
            logits_processor=_only(choose, number),
        )
        new = made[0, len(prompt) :].tolist()
        found.append(new[:-1] if new and new[-1] in ends else new)
    return found


def _only(choose: Choose | None, number: int) -> LogitsProcessorList:
    """What leaves one token to choose from: the one that `choose` takes."""

    def process(_: Tensor, logits: Tensor) -> Tensor:
        assert choose is not None
        chosen = torch.tensor(choose(logits, [number]), device=logits.device)
        return torch.full_like(logits, float("-inf")).index_fill(1, chosen, 0.0)

    from transformers import LogitsProcessorList

    return LogitsProcessorList([process] if choose else [])  # pyright: ignore
