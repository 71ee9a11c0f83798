"""Helpers: the further models that a contrast listens to, sharing weights with the guarded one.

A helper is the guarded model itself, its first blocks, either with an adapter; or a model of its
own folder. Whatever it shares is held once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from torch import nn

from expunge import lora, models, runs, sharding
from expunge.adapter_files import blocks_of, read_adapter
from expunge.affine_heads import output_head
from expunge.config import Section
from expunge.errors import ModelError
from expunge.merge.checkpoint import Checkpoint
from expunge.merge.updates import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INSIDE = r"^helpers/[A-Za-z0-9][\w.-]*/(base|adapter)$"


class HelperSpec(Section):
    """One helper, as guard.json names it."""

    blocks: int | None = Field(default=None, ge=1)
    """The first blocks of the guarded model; null means all."""

    model: str | None = Field(default=None, pattern=_INSIDE)
    """A model folder within the guard's, in place of the guarded model."""

    adapter: str | None = Field(default=None, pattern=_INSIDE)
    """An adapter folder within the guard's, on it."""

    @model_validator(mode="after")
    def _one_base(self) -> HelperSpec:
        if self.model is not None and self.blocks is not None:
            raise ValueError("blocks are of the guarded model; a model of its own has its own")
        return self

    @property
    def is_itself(self) -> bool:
        """Whether it is the guarded model and nothing else, whose logits are there already."""
        return self == HelperSpec()


@dataclass(frozen=True)
class HelperSource:
    """Where a helper lies while its guard is being made."""

    base: Path
    adapter: Path | None = None
    blocks: int | None = None
    trunk: Path | None = None
    """The model whose first blocks `base` is, where it is that."""


def first_blocks(model: PreTrainedModel, count: int | None) -> PreTrainedModel:
    """The first blocks of a model with its embeddings, norm and head: the same weights, held once.

    A new model object: what is put on its layers leaves the given one as it is. An adapter on the
    model is left out. `models.save_model` writes it as a folder that an assistant is trained on.
    """
    if sharding.is_sharded(model):
        raise ModelError("a model whose weights are sharded cannot lend its blocks to a helper")
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()} | {
        id(buffer): buffer for buffer in model.buffers()
    }
    made = copy.deepcopy(model, shared)
    lora.remove_adapter(made)
    if count is None:
        return made
    decoder, config = made.get_decoder(), made.config
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"{type(model).__name__} has no list of blocks to take the first of")
    if not 1 <= count <= len(layers):
        raise ModelError(f"blocks is {count}, but the model has {len(layers)}")
    decoder.layers = layers[:count]  # pyright: ignore
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    return made


def open_helpers(
    specs: tuple[HelperSpec, ...],
    folder: Path | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[PreTrainedModel | None]:
    """The helpers of a guard, beside the model it guards; None is that model itself."""
    found: list[PreTrainedModel | None] = []
    for spec in specs:
        if spec.is_itself:
            found.append(None)
            continue
        if (spec.model or spec.adapter) and folder is None:
            raise ModelError("this guard has helpers of its own; load it from its folder")
        if spec.model is not None:
            assert folder is not None
            dtype = str(model.dtype).removeprefix("torch.")
            if dtype not in models.DTYPES:
                raise ModelError(f"helpers are not run in {dtype}")
            helper = models.load_model(folder / spec.model, dtype=dtype)  # pyright: ignore
            _check_tokenizer(folder / spec.model, tokenizer)
        else:
            helper = first_blocks(model, spec.blocks)
        if spec.adapter is not None:
            assert folder is not None
            lora.load_adapter(helper, folder / spec.adapter)
        if len(output_head(helper)) != len(output_head(model)):
            raise ModelError(
                f"a helper has {len(output_head(helper))} logits and the model "
                f"{len(output_head(model))}; they must share their vocabulary"
            )
        found.append(helper.eval())  # pyright: ignore[reportArgumentType]
    return found


def adapted_blocks(adapter: Path) -> int:
    """How many blocks an adapter reaches, by the layers that it names."""
    factors, _ = read_adapter(adapter)
    return blocks_of(factors)


def check_helper(source: HelperSource, guarded: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse, from its files, a helper that could not be opened beside the guarded model."""
    if source.adapter is not None:
        Adapter(source.adapter).check(Checkpoint(source.base))
    _check_tokenizer(source.base, tokenizer)
    logits, own = (
        models.config_field(runs.read_json(place / "config.json"), "vocab_size")
        for place in (source.base, guarded)
    )
    if logits != own:
        raise ModelError(
            f"{source.base} has {logits} logits and {guarded} {own}; they must share their "
            "vocabulary"
        )


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    if models.load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"{folder} has another vocabulary than the guarded model")
