"""What this machine does in a second, measured by a few real steps of the recipe's own stages.

All of it happens in a temporary folder, from the original model, which has the target's shape.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from expunge import lora, models
from expunge.lora import Lora
from expunge.memory import (
    forget_peak,
    hand_back,
    peak_bytes,
    peak_device_bytes,
    release_freed_memory,
)
from expunge.merge.adapters import merge_adapters, merged_deltas
from expunge.pipeline import Pipeline
from expunge.plan.pace import Pace, adapted_pace, pace_of
from expunge.plan.work import Encoded, encoded, step_tokens
from expunge.quantized import Quantize
from expunge.unlearn.footprint import Demand, Shape, memory_of, passing, shape_of
from expunge.unlearn.halves import Halves
from expunge.unlearn.preparing import branch_demand, prepared
from expunge.unlearn.schedule import MicroBatch, Phase
from expunge.unlearn.section import Branch
from expunge.unlearn.trainer import Gradient, Optimizer, train
from expunge.unlearn.tune import Tune, tune_demand, tune_gradient, tune_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEPS = 4
"""Steps that are timed, after one that is not: it sets up what the others use."""

PATIENCE = 30.0
"""Seconds after which no further step is timed."""

PROBE_BYTES = 64_000_000
"""Written, and hashed, to see how fast that is."""


@dataclass
class Rates:
    """Seconds of one of each; `scale` is a step's measured memory over the formula's."""

    shape: Shape
    load: dict[str, float] = field(default_factory=dict)
    token: dict[str, float] = field(default_factory=dict)
    """A trained token, by stage."""
    scale: dict[str, float] = field(default_factory=dict)
    plain: Pace = field(default_factory=Pace)
    """Reading and writing in the type of the base weights."""
    adapted: Pace = field(default_factory=Pace)
    """The same with an adapter."""
    written: float = 0.0
    """A byte put on disk."""
    hashed: float = 0.0
    release: float = 0.0
    """Handing freed memory back, which the loop does every few steps."""
    merge: dict[str, float] = field(default_factory=dict)
    """A merge of all layers, without the model it may be written into."""


def measure(pipeline: Pipeline, wanted: Sequence[str], where: Path) -> tuple[Rates, Encoded]:
    """Time the stages named in `wanted`, loading each kind of model once.

    `where` is a folder on the disk that the run will write to.
    """
    recipe = pipeline.recipe
    base = pipeline.original.base
    rates = Rates(shape_of(base))
    tokenizer = models.load_tokenizer(base)
    data = encoded(pipeline, tokenizer)
    with tempfile.TemporaryDirectory(dir=where, prefix=".expunge-plan-") as scratch:
        work = Path(scratch)
        _disk(rates, work)
        model = _load(rates, base, recipe.model.dtype)
        _paces(rates, pipeline, model, tokenizer, data)
        for name in recipe.merges:
            if name in wanted:
                _merging(rates, pipeline, name, model, work)
        del model
        for name in recipe.branches:
            if name in wanted:
                _branch(rates, pipeline, name, tokenizer, data, work)
        if recipe.tune is not None and "target" in wanted:
            _tune(rates, recipe.tune, base, data, work)
    release_freed_memory()
    return rates, data


def _disk(rates: Rates, work: Path) -> None:
    block = os.urandom(1 << 20) * (PROBE_BYTES >> 20)
    start = time.monotonic()
    hashlib.sha256(block).hexdigest()
    rates.hashed = (time.monotonic() - start) / len(block)
    start = time.monotonic()
    with (work / "probe").open("wb") as file:
        file.write(block)
        os.fsync(file.fileno())
    rates.written = (time.monotonic() - start) / len(block)
    (work / "probe").unlink()


def _load(
    rates: Rates, base: Path, dtype: models.Dtype, quantize: Quantize | None = None
) -> PreTrainedModel:
    release_freed_memory()
    start = time.monotonic()
    model = models.load_model(base, dtype=dtype, quantize=quantize)
    rates.load[quantize or dtype] = time.monotonic() - start
    return model


def _paces(
    rates: Rates,
    pipeline: Pipeline,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Encoded,
) -> None:
    recipe, texts = pipeline.recipe, (*data.retain, *data.forget)
    given = model, tokenizer, texts, recipe.evaluate.max_batch
    rates.plain = rates.adapted = pace_of(*given)
    adapters = [branch.lora for branch in recipe.branches.values() if branch.training == "lora"]
    if adapters:
        widest = max(adapters, key=lambda one: one.rank)
        rates.adapted = adapted_pace(*given, widest)


def _merging(
    rates: Rates, pipeline: Pipeline, name: str, model: PreTrainedModel, work: Path
) -> None:
    """A real merge of one block's layers, of branches drawn at random."""
    recipe, folders = pipeline.recipe, []
    config = recipe.merges[name]
    for number, (other, branch) in enumerate(recipe.merged_branches(name).items()):
        one = Lora(rank=branch.lora.rank, alpha=branch.lora.alpha, dropout=0, layers=(0,))
        layers = lora.add_adapter(model, one, seed=number)
        for layer in layers.values():
            torch.nn.init.normal_(layer.lora_B, std=0.01)
        folders.append(work / f"{name}-{other}")
        lora.save_adapter(model, one, folders[-1], base=str(pipeline.original.base))
        lora.remove_adapter(model)
    for attempt in range(2):  # the first may compile
        start = time.monotonic()
        if config.output == "model":
            list(merged_deltas(folders, config))
        else:
            merge_adapters(folders, config, work / f"{name}-{attempt}", base=pipeline.original.base)
        rates.merge[name] = rates.shape.layers * (time.monotonic() - start)


def _branch(
    rates: Rates,
    pipeline: Pipeline,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    data: Encoded,
    work: Path,
) -> None:
    base, recipe = pipeline.original.base, pipeline.recipe
    config, how, seed = recipe.branches[name], recipe.model, recipe.seeds[0]
    model = _load(rates, base, "float32" if config.training == "full" else how.dtype, how.quantize)
    phase, halves = _first(config, data.halves(name, work / name), seed)
    forget_peak()
    plain = tuple(term.model_copy(update={"weighting": None}) for term in config.terms)
    short = config.model_copy(update={"terms": plain})
    made = prepared(model, halves, short, seed=seed, made=[phase])
    tokens = step_tokens(config, halves, [phase])
    held = {"weights": how.dtype, "quantized": how.quantize is not None}
    demand = branch_demand(config, halves, seed=seed, made=[phase], **held)
    model.train()
    parts = made.parameters, made.gradient, tokens
    _time(rates, name, *parts, config.optimizer, demand, work)


def _first(config: Branch, halves: Halves, seed: int) -> tuple[Phase, Halves]:
    """The first steps of a branch, over the items that they read alone."""
    phases, halves = halves.planned(config.schedule, seed=seed)
    steps = [step for phase in phases for step in phase.steps][: STEPS + 1]
    forget = sorted({i for step in steps for b in step for i in b.forget} or {0})
    first = range(min(1, len(halves.retain)))
    retain = sorted({i for step in steps for b in step for i in b.retain} or first)
    places = [{item: place for place, item in enumerate(items)} for items in (forget, retain)]
    moved = [
        [
            MicroBatch(
                tuple(places[0][i] for i in batch.forget),
                tuple(places[1][i] for i in batch.retain),
            )
            for batch in step
        ]
        for step in steps
    ]
    turns = sum(len(batch.retain or batch.forget) for step in steps for batch in step)
    return Phase(moved), replace(
        halves,
        forget=[halves.forget[i] for i in forget],
        retain=[halves.retain[i] for i in retain],
        levels=halves.levels and [halves.levels[i] for i in forget],
        companions={half: own.only(forget, turns) for half, own in halves.companions.items()},
    )


def _tune(rates: Rates, config: Tune, base: Path, data: Encoded, work: Path) -> None:
    model = _load(rates, base, "float32")
    every = [*data.forget, *data.retain]
    steps = tune_steps(config, len(every), len(data.neutral))[: STEPS + 1]
    read = [every[i] for step in steps for i in step.items]
    items = [replace(text, id=str(number)) for number, text in enumerate(read)]
    neutral = [data.neutral[i] for i in sorted({i for step in steps for i in step.neutral})]
    short = config.model_copy(update={"epochs": 1})
    folder = work / "target"
    folder.mkdir()
    forget_peak()
    parameters, gradient, count = tune_gradient(model, items, neutral, short, folder=folder)
    tokens = [
        sum(len(items[i].tokens) for i in step.items)
        + sum(len(neutral[i].tokens) for i in step.neutral)
        for step in tune_steps(short, len(items), len(neutral))
    ]
    model.train()
    demand = tune_demand(short, items, neutral)
    _time(rates, "target", parameters, gradient, tokens[:count], config.optimizer, demand, work)


def _time(
    rates: Rates,
    name: str,
    parameters: dict[str, Parameter],
    gradient: Gradient,
    tokens: Sequence[int],
    config: Optimizer,
    demand: Demand,
    work: Path,
) -> None:
    """Run a few steps of the real loop and note when each begins."""
    begins: list[float] = []

    def noted(number: int) -> dict[str, float]:
        begins.append(time.monotonic())
        return gradient(number)

    def enough(log: list[dict[str, float]]) -> bool:
        return len(log) > 1 and time.monotonic() - begins[0] > PATIENCE

    folder = work / f"steps-{name}"
    folder.mkdir()
    quiet = config.model_copy(update={"checkpoint_seconds": 1e9})
    count = min(len(tokens), STEPS + 1)
    options = {"steps": count, "config": quiet, "seed": 0, "folder": folder, "label": name}
    train(parameters, noted, stop=enough, **options)
    begins.append(time.monotonic())
    taken = [(end - begin) / n for (begin, end), n in zip(pairwise(begins), tokens, strict=False)]
    rates.token[name] = median(taken[1:] or taken)
    measured = peak_device_bytes() or peak_bytes()
    start = time.monotonic()
    hand_back()
    rates.release = max(rates.release, time.monotonic() - start)
    spare = measured - (memory_of(rates.shape, demand) - passing(rates.shape, demand))
    rates.scale[name] = min(3.0, max(0.5, spare / passing(rates.shape, demand)))
