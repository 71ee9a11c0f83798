"""Levels: the NLL that each forget item would have, had it not been learnt, found before training.

Dimensions: F forget items, N scored tokens of one.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from expunge import models, parallel, runs
from expunge.data.batches import TokenSequence
from expunge.data.examples import Example
from expunge.errors import ModelError
from expunge.unlearn.levels import quantile_levels
from expunge.unlearn.reference import cached_reference

FILE = "levels.safetensors"
PACK_TOKENS = 4096  # of a forward pass


def write_levels(model: PreTrainedModel, forget: Sequence[TokenSequence], folder: Path) -> None:
    """Of each forget item the log-probs that `model` gives to its tokens."""
    scored = folder / "scores.safetensors"
    told = cached_reference(model, forget, "document", file=scored, max_tokens=PACK_TOKENS)
    _keep(told.logps, folder)


def write_unseen_levels(
    model: PreTrainedModel,
    unseen: Sequence[TokenSequence],
    forget: Sequence[TokenSequence],
    examples: Sequence[Example],
    folder: Path,
) -> None:
    """Of each forget item one level, so that all lie as the NLLs of `unseen` do: the same log-prob
    for each of its tokens. `examples` are the forget items as text."""
    scored = folder / "scores.safetensors"
    told = cached_reference(model, unseen, "document", file=scored, max_tokens=PACK_TOKENS)
    found = [-float(logps.mean()) for logps in told.logps if len(logps)]
    levels = quantile_levels(found, [example.prompt + example.answer for example in examples])
    _keep(
        [torch.full((len(s.tokens) - 1,), -v) for s, v in zip(forget, levels, strict=True)], folder
    )


def read_levels(folder: Path) -> list[Tensor]:
    """The level log-probs of each forget item, each (N,)."""
    found = load_file(folder / FILE)
    return [found[str(item)] for item in range(len(found))]


def check_vocabulary(base: Path, other: Path, origin: str) -> None:
    """Refuse a model for levels whose tokens are not those of the model in `base`."""
    own, its = (models.load_tokenizer(folder).get_vocab() for folder in (base, other))
    if own != its:
        raise ModelError(
            f"{origin} has another vocabulary ({len(its)} tokens) than the model of the recipe "
            f"({len(own)}), so it says nothing of its tokens; name one that has the same"
        )


def _keep(levels: Sequence[Tensor], folder: Path) -> None:
    if parallel.is_main():
        with runs.replacing(folder / FILE) as temporary, runs.safetensors_errors():
            save_file({str(item): logps for item, logps in enumerate(levels)}, temporary)
