"""What an edit is told: models on disk, sets, options, and where to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge import models
from expunge.config import Section
from expunge.data.batches import TokenSequence
from expunge.data.examples import Example
from expunge.errors import EditError
from expunge.lora import adapters_of, load_adapter, remove_adapter
from expunge.merge.sources import Opened, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Encode = Callable[[list[Example], "PreTrainedTokenizerBase"], list[TokenSequence]]


@dataclass(frozen=True)
class Weights:
    """A model on disk: a base folder, and perhaps an adapter on it."""

    base: Path
    adapter: Path | None = None
    guard: Path | None = None
    """The folder of a guard before it."""

    @property
    def folder(self) -> Path:
        """What the stage that made these weights wrote."""
        return self.guard or self.adapter or self.base


@dataclass(frozen=True)
class Task:
    """One edit to be done."""

    method: str
    options: Section
    seed: int
    of: Weights
    others: tuple[Weights, ...]
    base: Path | None
    """θ, from which updates are counted; None where no method asks for it."""

    out: Path
    """The model or adapter folder to write."""

    sets: Mapping[str, list[Example]] = field(default_factory=dict)
    """`forget` and `retain`, where they are given."""

    encode: Encode | None = None

    @property
    def told(self) -> dict[str, Any]:
        """The options as a function takes them."""
        return dict(self.options)

    @property
    def models(self) -> tuple[Weights, ...]:
        """Every model that the edit takes, in order."""
        return self.of, *self.others

    @property
    def adapters(self) -> list[Path] | None:
        """The adapters of the models; None unless each is an adapter on the base."""
        found = [m.adapter for m in self.models if m.adapter and m.base == self.base]
        return found if len(found) == len(self.models) else None

    def start(self) -> Path:
        """The base, or an error that says how to give it."""
        if self.base is None:
            raise EditError(f"{self.method} counts an update from its base: give --base")
        return self.base

    def source(self, weights: Weights) -> Source:
        """A model's tensors, read where they lie."""
        return Opened(Path).source(spelled(weights))

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model to be edited, in float32, its adapter added to the weights."""
        model = models.load_model(self.of.base)
        if self.of.adapter is not None:
            load_adapter(model, self.of.adapter)
            for layer in adapters_of(model).values():
                delta = layer.scale * (layer.lora_B.detach() @ layer.lora_A.detach())
                layer.base.weight.detach().add_(delta)
            remove_adapter(model)
        model.requires_grad_(False)
        return model, models.load_tokenizer(self.of.base, model)

    def texts(self, name: str, tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
        """The items of a set as tokens."""
        if not self.sets.get(name):
            raise EditError(f"{self.method} needs a {name} set: give --{name} FILE")
        assert self.encode is not None
        return self.encode(self.sets[name], tokenizer)


def spelled(weights: Weights) -> dict[str, Any]:
    """A model as merge files name it."""
    model: dict[str, Any] = {"model": str(weights.base)}
    return model | ({"lora": str(weights.adapter)} if weights.adapter else {})
