"""Levels: the NLL that each forget item would have, had it not been learnt, found before training.

Dimensions: F forget items, N scored tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from expunge import models, parallel, runs
from expunge.data.batches import TokenSequence
from expunge.data.examples import Example
from expunge.disk import safetensors_errors
from expunge.errors import ModelError
from expunge.lora import adapters_of
from expunge.unlearn.levels import compression, counterparts, profile
from expunge.unlearn.reference import Asked, cached_reference, scores_now
from expunge.unlearn.tensor_files import opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "levels.safetensors"
PACK_TOKENS = 4096  # of a forward pass


def write_levels(model: PreTrainedModel, forget: Sequence[TokenSequence], folder: Path) -> None:
    """Of each forget item the log-probs that `model` gives to its tokens, also standardised."""
    _keep(_told(model, forget, folder), folder)


@dataclass(frozen=True)
class UnseenLevels:
    """Of each forget item the sorted log-probs, plain and standardised, of its counterpart among
    unseen texts, at as many tokens as it has."""

    unseen: Sequence[TokenSequence]
    forget: Sequence[TokenSequence]
    counterpart: Sequence[int]
    """Of each forget item the place of its unseen text: (F,)."""

    @classmethod
    def of(
        cls,
        unseen: Sequence[TokenSequence],
        forget: Sequence[TokenSequence],
        texts: Sequence[Example],
        examples: Sequence[Example],
    ) -> UnseenLevels:
        """Questions have counterparts among unseen questions, texts among texts, each task over all
        of them; where there are none of a kind, among all of the unseen.

        `unseen` are the tokens of `texts`, `forget` those of the forget items, `examples`.
        """
        readable = [place for place, text in enumerate(unseen) if len(text.tokens) > 1]
        counterpart = [0] * len(forget)
        for asked in (True, False):
            items = [i for i, example in enumerate(examples) if (example.kind == "qa") == asked]
            alike = [place for place in readable if (texts[place].kind == "qa") == asked]
            among = alike or readable
            rates = [_rate(examples[item], forget[item]) for item in items]
            others = [_rate(texts[place], unseen[place]) for place in among]
            found = counterparts(rates, others, [examples[item].task for item in items])
            for item, place in zip(items, found, strict=True):
                counterpart[item] = among[place]
        return cls(unseen, forget, counterpart)

    def write(self, model: PreTrainedModel, folder: Path) -> None:
        """The levels that `model` gives, with the adapter on it if it has one, into `folder`."""
        adapted = bool(adapters_of(model))  # which a reference would be without
        _keep(self._at_lengths(_told(model, self.unseen, None if adapted else folder)), folder)

    def now(self, model: PreTrainedModel) -> list[Tensor]:
        """The levels that `model` gives with the adapter that is trained on it."""
        return self._at_lengths(_told(model, self.unseen))

    def _at_lengths(self, told: Sequence[Tensor]) -> list[Tensor]:
        levels = []
        for item, place in zip(self.forget, self.counterpart, strict=True):
            columns = told[place].double().T
            profiles = [profile(column.numpy(), len(item.tokens) - 1) for column in columns]
            levels.append(torch.from_numpy(np.stack(profiles, axis=1)).float())
        return levels


def read_levels(folder: Path) -> list[Tensor]:
    """The level log-probs of each forget item, and these standardised, each (N, 2)."""
    with opened(folder / FILE, f"delete {folder}, and levels are read again") as stored:
        return [stored.get_tensor(str(item)) for item in range(len(stored.keys()))]


def check_vocabulary(base: Path, other: Path, origin: str) -> None:
    """Refuse a model for levels whose tokens are not those of the model in `base`."""
    own, its = (models.load_tokenizer(folder).get_vocab() for folder in (base, other))
    if own != its:
        raise ModelError(
            f"{origin} has another vocabulary ({len(its)} tokens) than the model of the recipe "
            f"({len(own)}), so it says nothing of its tokens; name one that has the same"
        )


def _told(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], folder: Path | None = None
) -> list[Tensor]:
    """Log-probs of each sequence, and these standardised: (T - 1, 2). With a `folder` they are the
    reference's, kept there; else the model's as training has it."""
    if folder is None:
        told = scores_now(model, sequences, max_tokens=PACK_TOKENS)
    else:
        told = cached_reference(
            model,
            sequences,
            "document",
            file=folder / "scores.safetensors",
            max_tokens=PACK_TOKENS,
            asked=Asked(logps=True, standardized=True),
        )
    assert told.standardized is not None
    return [torch.stack(both, dim=1) for both in zip(told.logps, told.standardized, strict=True)]


def _rate(example: Example, sequence: TokenSequence) -> float:
    """How well a text compresses, with what was cut off its tokens."""
    count = len(sequence.tokens) + sequence.cut - 1
    return compression(example.prompt + example.answer, count)


def _keep(levels: Sequence[Tensor], folder: Path) -> None:
    if parallel.is_main():
        with runs.replacing(folder / FILE) as temporary, safetensors_errors():
            save_file({str(item): logps for item, logps in enumerate(levels)}, temporary)
