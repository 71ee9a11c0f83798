"""Logits of a few option tokens after each of many prompts, what the prompts share read once.

The questions of a group begin alike (few-shot examples), so that is read once; a pack then holds
many questions that continue that one cached prefix. Dimensions: Q questions, d width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expunge.data.batches import TokenSequence, packs_by_length, prompt_tokens
from expunge.errors import EvaluationError
from expunge.evaluate.generate import end_pack
from expunge.evaluate.reader import Reader
from expunge.evaluate.tables import key_of, looked_up
from expunge.heads import blocks
from expunge.packs import (
    has_logits_of_its_own,
    hidden_states,
    hidden_states_after,
    output_head,
    token_logits,
)
from expunge.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LETTERS = "ABCD"

PACK_TOKENS = 2048
"""Question tokens read in one forward pass."""


def option_logits(
    reader: Reader,
    prompts: Sequence[list[int]],
    groups: Sequence[Hashable],
    options: Sequence[int],
    *,
    label: str = "MMLU",
) -> np.ndarray:
    """Logits of the tokens `options` after each prompt: (Q, options).

    The prompts of a group begin alike (few-shot examples), and what they share is read once. A
    prompt that the reader's guard refuses has options of logit 0: it tells nothing apart.
    """
    keys = [key_of("options", tuple(prompt), tuple(options)) for prompt in prompts]

    def compute(missing: list[int]) -> Iterator[list[dict[str, Any]]]:
        together: dict[Hashable, list[int]] = defaultdict(list)
        refused = reader.guard.refused([prompts[i] for i in missing])
        equal = [i for i, no in zip(missing, refused, strict=True) if no]
        reader.forwards += len(missing) - len(equal)
        yield [{"key": keys[i], "logits": [0.0] * len(options)} for i in equal]
        for number, no in zip(missing, refused, strict=True):
            if not no:
                together[groups[number]].append(number)
        with progress(label, len(missing) - len(equal), "questions") as bar:
            for numbers in together.values():
                speaker = reader.speaker
                asked = reader.guard.wrapped([prompts[i] for i in numbers])
                found = _option_logits(speaker, asked, options)
                if not np.isfinite(found).all():
                    raise EvaluationError(
                        f"{label}: an option's logit is not finite; the model is broken"
                    )
                bar(len(numbers))
                yield [
                    {"key": keys[i], "logits": row}
                    for i, row in zip(numbers, found.tolist(), strict=True)
                ]

    rows = looked_up(reader.options, keys, compute, [len(prompt) for prompt in prompts])
    return np.array([row["logits"] for row in rows], np.float32)


def letter_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token of each letter as it follows `Answer:`, its space included where they are one."""
    whole = [prompt_tokens(tokenizer, f"Answer: {letter}") for letter in LETTERS]
    last = [tokens[-1] for tokens in whole]
    if len({tuple(tokens[:-1]) for tokens in whole}) != 1 or len(set(last)) != 4:
        raise EvaluationError("this tokenizer does not write A, B, C and D as one token each")
    return last


@torch.inference_mode()
def _option_logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], options: Sequence[int]
) -> np.ndarray:
    states = _last_states(model, prompts)
    if has_logits_of_its_own(model):
        chosen = [token_logits(model, states[b])[:, list(options)] for b in blocks(len(states))]
        return torch.cat(chosen).float().cpu().numpy()
    head = output_head(model)[list(options)]  # (options, d)
    return (states @ head.T.to(states.dtype)).float().cpu().numpy()


def _last_states(model: PreTrainedModel, prompts: Sequence[list[int]]) -> torch.Tensor:
    """The hidden state at the end of each prompt (Q, d); what all begin with is read once.

    The common part is taken from the tokens, not the text, so no merge across its end can differ.
    """
    device = next(model.parameters()).device
    shared = 0 if getattr(model, "reads_whole", False) else min(len(p) for p in prompts) - 1
    while any(p[:shared] != prompts[0][:shared] for p in prompts):
        shared -= 1
    from transformers import DynamicCache

    cache = DynamicCache()
    if shared:
        hidden_states(model, end_pack([prompts[0][:shared]], device), cache)
    order = [
        TokenSequence(str(i), tuple(p[shared:]), answer_start=0) for i, p in enumerate(prompts)
    ]
    states: dict[int, torch.Tensor] = {}
    for group in packs_by_length(order, max_tokens=PACK_TOKENS):
        tokens = [list(sequence.tokens) for sequence in group]
        found = hidden_states_after(model, end_pack(tokens, device, start=shared), cache)
        states.update({int(s.id): state for s, state in zip(group, found, strict=True)})
    return torch.stack([states[i] for i in range(len(prompts))])
