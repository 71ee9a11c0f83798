"""Make a guard: from its section, the sets and its helpers to a folder that works alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from expunge import lora, models, runs
from expunge.adapter_files import read_adapter
from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.disk import readable_errors
from expunge.errors import DataError, RecipeError
from expunge.guard.contrast import Contrast
from expunge.guard.corrupt import Corruption, search_strength
from expunge.guard.filters import outputs_of
from expunge.guard.helpers import HelperSource, HelperSpec, check_helper
from expunge.guard.made import Made, write_guard
from expunge.guard.prompting import FORGOTTEN_SUBJECT, Before, Wrapping, icul
from expunge.guard.scope import Matching, Scope, fitters, scope_of
from expunge.guard.section import (
    AnyContrast,
    Eco,
    Icul,
    InputFilter,
    Offset,
    OutputFilter,
    Prefix,
    Uld,
    Whp,
    options_of,
)
from expunge.guard.standin import StandIn
from expunge.progress import say
from expunge.scores import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST_ROOM = 64
"""Tokens of the context that a guard must leave to a prompt and its answer."""


@dataclass(frozen=True)
class Making:
    """What a guard is made of."""

    tokenizer: PreTrainedTokenizerBase
    context: int
    base: Path
    """The weights of the guarded model, without its adapter."""
    adapter: Path | None
    """Its adapter; helpers share weights only with a model that has none."""
    load: Callable[[], PreTrainedModel]
    """The guarded model."""
    forget: Sequence[Example] = ()
    retain: Sequence[Example] = ()
    separator: str = " "
    max_length: int = 256
    helpers: Mapping[str, HelperSource] = field(default_factory=dict)
    """By role."""

    def scope(self, matching: Matching) -> Scope:
        """The scope of the forget set; one that nothing is in is refused."""
        self.check(matching)
        return scope_of(matching, self.forget, self.retain)

    def check(self, matching: Matching) -> None:
        """Refuse a scope that cannot be made."""
        if not self.forget and not matching.keywords:
            raise DataError("there is no forget set, and no keywords: nothing would be in scope")
        if matching.by != "phrases" and not (self.forget and self.retain):
            raise DataError("a classifier needs a forget set and a retain set")
        if matching.by != "phrases":
            fitters()


def making_of(base: Path, adapter: Path | None, *, dtype: models.Dtype, **given: Any) -> Making:
    """What a guard of a model on disk is made of; the model is loaded where it is needed."""

    def load() -> PreTrainedModel:
        model = models.load_model(base, dtype=dtype)
        if adapter is not None:
            lora.load_adapter(model, adapter)
        return model

    if adapter is not None:
        read_adapter(adapter)  # refused now, not when the guard is loaded
    context = runs.read_json(base / "config.json").get("max_position_embeddings")
    context = context if isinstance(context, int) and context > 0 else 2**31
    return Making(models.load_tokenizer(base), context, base, adapter, load, **given)


def make_guard(section: Any, making: Making, folder: Path) -> Made:
    """Write the guard that a section describes into `folder`."""
    from expunge.guard.methods import GUARDS

    made = GUARDS[section.kind].make(section, making, folder)
    _check_room(made, making)
    write_guard(made, folder)
    return made


def check_guard(section: Any, making: Making) -> None:
    """Refuse what `make_guard` would, as far as texts and the tokenizer tell without a model."""
    from expunge.guard.methods import GUARDS

    GUARDS[section.kind].check(section, making)


def check_before(section: Prefix | Icul, making: Making) -> None:
    """What stands before a prompt is written, and must leave room."""
    if isinstance(section, Icul):
        _check_room(make_icul(section, making, Path()), making)
    else:
        _check_room(make_prefix(section, making, Path()), making)


def check_scope(section: InputFilter | OutputFilter, making: Making) -> None:
    """Something can be in scope."""
    making.check(section.match)


def check_eco(section: Eco, making: Making) -> None:
    """Something can be in scope, and a strength can be searched for."""
    making.check(section.match)
    if section.strength is None:
        _searchable(making)


def _check_room(made: Made, making: Making) -> None:
    room = Wrapping(made.before, making.tokenizer).room
    if room + LEAST_ROOM > making.context:
        raise DataError(
            f"the guard puts {room} tokens before each prompt, and the model's context is "
            f"{making.context}; take fewer or shorter examples"
        )


def make_prefix(section: Prefix, making: Making, folder: Path) -> Made:
    """An instruction."""
    text = section.text
    if section.subject is not None:
        text = FORGOTTEN_SUBJECT.format(subject=section.subject)
    style = section.style
    if style == "auto":
        style = "chat" if making.tokenizer.chat_template else "plain"
    text = f"{text}\n\n" if style == "plain" else text
    return _made(section, before=Before(text=text, style=style))


def make_icul(section: Icul, making: Making, folder: Path) -> Made:
    """Examples."""
    text = icul(
        making.forget,
        making.retain,
        items=section.items,
        correct=section.correct,
        seed=section.seed,
        separator=making.separator or " ",
    )
    return _made(section, before=Before(text=text))


def make_input_filter(section: InputFilter, making: Making, folder: Path) -> Made:
    """A scope and a refusal."""
    return _made(section, scope=making.scope(section.match), refusal=section.refusal)


def make_output_filter(section: OutputFilter, making: Making, folder: Path) -> Made:
    """The forget set's answers, a scope and a refusal."""
    how = {"ngram": section.ngram, "overlap": section.overlap, "pii": section.pii}
    return _made(
        section,
        scope=making.scope(section.match),
        outputs=outputs_of(making.forget, **how),
        refusal=section.refusal,
    )


def make_contrast(section: Uld | Offset | Whp | AnyContrast, making: Making, folder: Path) -> Made:
    """Helpers, their weights and the rule."""
    if isinstance(section, Uld):
        joined = Contrast(weights=(section.weight,), tau=section.tau)
    elif isinstance(section, Offset):
        joined = Contrast(weights=(section.weight, -section.weight))
    elif isinstance(section, Whp):
        joined = Contrast(rule="whp", weights=(section.alpha,))
    else:
        joined = Contrast(weights=tuple(section.weights.values()), tau=section.tau)
    specs = []
    for role in section.helpers:
        source = making.helpers[role]
        if isinstance(section, Uld) and section.blocks is not None:
            if making.adapter is not None or source.base != making.base:
                raise RecipeError("blocks cuts a guarded model without an adapter; leave it out")
            there = runs.read_json(making.base / "config.json").get("num_hidden_layers")
            if isinstance(there, int) and section.blocks > there:
                raise RecipeError(f"blocks is {section.blocks}, but the model has {there}")
            source = HelperSource(making.base, source.adapter, section.blocks, making.base)
        specs.append(_brought(role, source, making, folder))
    return _made(section, contrast=joined, helpers=tuple(specs))


def make_eco(section: Eco, making: Making, folder: Path) -> Made:
    """A scope and a strength, given or searched for."""
    scope = making.scope(section.match)
    strength = section.strength or _searched(section, making)
    corruption = Corruption(strength=strength, seed=section.seed)
    return _made(section, scope=scope, corruption=corruption)


def _made(section: Any, **steps: Any) -> Made:
    return Made(format=1, kind=section.kind, options=options_of(section), **steps)


def _searched(section: Eco, making: Making) -> float:
    """The strength at which the answers of some forget items reach the target NLL."""
    usable = _searchable(making)
    order = np.random.default_rng(section.seed).permutation(len(usable))
    how = {"max_length": making.max_length, "separator": making.separator}
    sequences = [encode(usable[i], making.tokenizer, **how) for i in order[: section.search_items]]
    model = making.load()
    device = next(model.parameters()).device

    @torch.inference_mode()
    def loss(strength: float) -> float:
        standin = StandIn(model, corruption=Corruption(strength=strength, seed=section.seed))
        standin.corrupted = {s.tokens: s.answer_start for s in sequences}
        found = []
        for sequence in sequences:
            packed = pack([sequence], "answer", device)
            found.append(float(score(standin, packed).nll))  # pyright: ignore[reportArgumentType]
        return sum(found) / len(found)

    strength = search_strength(loss, section.target, steps=section.search_steps)
    say(f"eco: at {strength:.3g} the forget answers have {loss(strength):.2f} nats a token")
    return strength


def _searchable(making: Making) -> list[Example]:
    usable = [e for e in making.forget if e.prompt]
    if not usable:
        raise DataError("eco searches its strength on forget items that have a prompt; give one")
    return usable


def _brought(role: str, source: HelperSource, making: Making, folder: Path) -> HelperSpec:
    """A helper's files in the guard's folder, and how they are put together again."""
    place = f"helpers/{''.join(c if c.isalnum() else '-' for c in role).strip('-') or 'helper'}"
    found: dict[str, Any] = {}
    check_helper(source, making.base, making.tokenizer)
    if source.adapter is not None:
        _copy(source.adapter, folder / place / "adapter")
        found["adapter"] = f"{place}/adapter"
    trunk = source.base if source.trunk is None else source.trunk
    if making.adapter is None and trunk.resolve() == making.base.resolve():
        found["blocks"] = source.blocks
    else:
        _copy(source.base, folder / place / "base")
        found["model"] = f"{place}/base"
    return HelperSpec(**found)


def _copy(source: Path, target: Path) -> None:
    """A folder's files, linked where the disk allows it, so that weights are not held twice."""
    if target.exists():
        shutil.rmtree(target)

    def link(here: str, there: str) -> str:
        try:
            os.link(here, there)
        except OSError:
            shutil.copyfile(here, there)
        return there

    with readable_errors(target):
        shutil.copytree(source, target, copy_function=link)
