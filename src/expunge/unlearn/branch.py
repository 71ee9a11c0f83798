"""A branch: one unlearned version of the target, as a LoRA adapter or with every weight trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from expunge import lora, models, parallel, sharding
from expunge.errors import TrainingError
from expunge.progress import say
from expunge.quantized import is_quantized
from expunge.unlearn.fit import readable_out_of_memory
from expunge.unlearn.halves import Halves
from expunge.unlearn.preparing import branch_demand, prepared
from expunge.unlearn.relevel import FILE as LEVELS
from expunge.unlearn.relevel import Releveller
from expunge.unlearn.section import Branch
from expunge.unlearn.snapshots import Keeper
from expunge.unlearn.trainer import (
    AtSteps,
    autocast,
    finish,
    train,
)
from expunge.unlearn.watch import Watcher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_branch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    halves: Halves,
    config: Branch,
    *,
    seed: int,
    folder: Path,
    base: str,
    label: str,
    begun: Path | None = None,
    deadline: float | None = None,
    measure: Callable[[PreTrainedModel], dict[str, float]] | None = None,
) -> None:
    """Train a branch from `model` and write it into `folder` as `adapter/` or `model/`.

    A killed run goes on from its last checkpoint, and a folder that holds the branch is left so.
    `model` is left changed. `begun` is the folder of the adapter that the branch goes on from,
    where it comes `after` another. A `deadline` (a time of `time.monotonic`) shortens the schedule
    to the steps that fit before it. `measure` gives the numbers of an evaluation during training,
    where `watch` reads more than losses.
    """
    result = folder / ("adapter" if config.training == "lora" else "model")
    if parallel.from_main(result.exists()):  # it was killed just before its stage was sealed
        finish(folder, LEVELS)
        return
    _check_watch(model, config, label)
    weights: models.Dtype = "float32" if model.dtype == torch.float32 else "bfloat16"
    held = any(map(is_quantized, model.modules()))
    demand = branch_demand(config, halves, seed=seed, weights=weights, quantized=held)

    def write(place: Path) -> None:
        lora.save_adapter(model, config.lora, place, base=base)

    with readable_out_of_memory(label, model, demand):
        told = {"seed": seed, "tokenizer": tokenizer, "folder": folder, "begun": begun}
        made = prepared(model, halves, config, **told)
        start = {n: sharding.local(p.detach()).clone() for n, p in made.parameters.items()}

        def evaluated() -> dict[str, float]:
            model.eval()
            with autocast(model.dtype, config.optimizer.compute, models.device()):
                found = made.passes.losses(config.watch and config.watch.sample)
            if measure is not None and config.watch and config.watch.read == "evaluation":
                found |= measure(model)
            model.train()
            return found

        def relevelled() -> list[torch.Tensor]:
            assert halves.relevel is not None
            with autocast(model.dtype, config.optimizer.compute, models.device()):
                return halves.relevel(model)

        if config.unguarded:
            say(f"{label}: its forget loss falls without end, and no watch.until stops it")
        steps, others = sum(span.steps for span in made.spans), list[AtSteps]()
        if config.watch is not None:
            config.watch.check(steps, label)
        watched = config.watch and Watcher(
            config.watch, evaluated, made.parameters, folder, f"{label} watch"
        )
        if config.keep is not None:
            others.append(Keeper(config.keep, write, made.ends, folder, steps=steps, label=label))
        if halves.relevel is not None:
            assert config.levels is not None and halves.levels is not None
            given = config.levels.every, halves.levels, relevelled, folder
            others.append(Releveller(*given, steps=steps))
        model.train()
        log = train(
            made.parameters,
            made.gradient,
            steps=steps,
            config=config.optimizer,
            seed=seed,
            folder=folder,
            label=label,
            deadline=deadline,
            watcher=watched,
            others=others,
            spans=made.spans,
            masks=made.masks,
            state=made.state,
        )
    model.eval()
    moved = {n: p for n, p in made.parameters.items() if n not in made.masks}
    rate = max(record.get("lr", 0.0) for record in log)
    _check_moved(moved, start, label, rate, some=config.rule.selective)
    if config.training == "lora":
        write(result)
    else:
        models.save_model(model, tokenizer, result)
    finish(folder, LEVELS)


def _check_watch(model: PreTrainedModel, config: Branch, label: str) -> None:
    """Refuse an evaluation in which each rank would read texts of its own with its slices."""
    if config.watch and config.watch.read == "evaluation" and sharding.is_sharded(model):
        raise TrainingError(
            f"{label}: watch.read: evaluation needs the whole model in each process, and each "
            "holds a slice of it; set watch.read: losses, or launch with ddp.yaml"
        )


def _check_moved(
    parameters: dict[str, Parameter],
    start: dict[str, torch.Tensor],
    label: str,
    rate: float,
    *,
    some: bool,
) -> None:
    """A matrix that training did not move was not trained at all: refuse the branch. With `some`
    a rule or mask chooses what moves, and only a branch of which nothing moved is refused."""
    here = [n for n, p in parameters.items() if torch.equal(sharding.local(p.detach()), start[n])]
    everywhere = set[str].intersection(*map(set, parallel.gather(here)))
    still = [name for name in here if name in everywhere]
    if still and not (some and len(still) < len(parameters)):
        raise TrainingError(
            f"{label}: {len(still)} of {len(parameters)} trained matrices did not move, "
            f"{still[0]} among them; no loss reaches them, or the rate is too small for them (it "
            f"was {rate:g} at most, and a warmup begins at 0)"
        )
