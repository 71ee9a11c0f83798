"""A branch: one unlearned version of the target, as a LoRA adapter or with every weight trained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from expunge import lora, models, parallel, sharding
from expunge.config import Section
from expunge.errors import TrainingError
from expunge.lora import Lora
from expunge.registry import lookup
from expunge.unlearn.companions import Companions, on_sides
from expunge.unlearn.fit import readable_out_of_memory
from expunge.unlearn.footprint import Demand
from expunge.unlearn.halves import Halves
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.reference import Reference, cached_reference, trains_head
from expunge.unlearn.schedule import Pairing
from expunge.unlearn.sets import SETS, SIDES, Half, Side, units
from expunge.unlearn.steps import STEP_RULES, Step
from expunge.unlearn.trainer import (
    Gradient,
    Optimizer,
    autocast,
    finish,
    recompute_blocks,
    train,
)
from expunge.unlearn.watch import Watch, Watcher


class Branch(Section):
    """How one branch is trained."""

    terms: tuple[Term, ...]
    """The objective: a weighted sum of losses."""

    companions: Companions = Field(default_factory=Companions)
    """How the sets beside forget and retain are made, where a term reads one."""

    training: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter; `full` trains every weight."""

    lora: Lora = Field(default_factory=Lora)
    """The adapter, where training is `lora`."""

    schedule: Pairing = Field(default_factory=Pairing)
    """Which items each step sees."""

    step: Step = Field(default_factory=Step)
    """How a step's gradient is made."""

    optimizer: Optimizer = Field(default_factory=Optimizer)
    """Learning rate and the like."""

    watch: Watch | None = None
    """Evaluation during training; null evaluates when it has ended."""

    @model_validator(mode="after")
    def _possible(self) -> "Branch":
        sides = {SETS[term.half].side for term in self.terms}
        if "forget" not in sides:
            known = ", ".join(half for half, row in SETS.items() if row.side == "forget")
            raise ValueError(f"terms must hold at least one half: forget (or one of {known})")
        if self.step.rule == "normalized" and "retain" not in sides:
            raise ValueError("the step rule normalized needs a term with half: retain (or neutral)")
        return self

    @property
    def reads_alternates(self) -> bool:
        """Whether a term needs what only the target can write."""
        return any(term.half in ("alternate", "alternate_pair") for term in self.terms)


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
    deadline: float | None = None,
    measure: Callable[[PreTrainedModel], dict[str, float]] | None = None,
) -> None:
    """Train a branch from `model` and write it into `folder` as `adapter/` or `model/`.

    A killed run goes on from its last checkpoint. `model` is left changed. A `deadline` (a time
    of `time.monotonic`) shortens the schedule to the steps that fit before it. `measure` gives the
    numbers of an evaluation during training, where `watch` reads more than losses.
    """
    weights: models.Dtype = "float32" if model.dtype == torch.float32 else "bfloat16"
    demand = branch_demand(config, halves, seed=seed, weights=weights)
    with readable_out_of_memory(label, model, demand):
        made = prepared(model, halves, config, seed=seed)
        start = {n: sharding.local(p.detach()).clone() for n, p in made.parameters.items()}

        def evaluated() -> dict[str, float]:
            model.eval()
            with autocast(model.dtype, config.optimizer.compute, models.device()):
                found = made.passes.losses()
            if measure is not None and config.watch and config.watch.read == "evaluation":
                found |= measure(model)
            model.train()
            return found

        watched = config.watch and Watcher(config.watch, evaluated, made.parameters, folder)
        model.train()
        train(
            made.parameters,
            made.gradient,
            steps=made.steps,
            config=config.optimizer,
            seed=seed,
            folder=folder,
            label=label,
            deadline=deadline,
            watcher=watched,
        )
    model.eval()
    _check_moved(made.parameters, start, label)
    if config.training == "lora":
        lora.save_adapter(model, config.lora, folder / "adapter", base=base)
    else:
        models.save_model(model, tokenizer, folder / "model")
    finish(folder)


@dataclass(frozen=True)
class Prepared:
    """A branch ready to be trained."""

    parameters: dict[str, Parameter]
    gradient: Gradient
    """Leaves the gradient of a step in them."""
    steps: int
    passes: Passes


def prepared(model: PreTrainedModel, halves: Halves, config: Branch, *, seed: int) -> Prepared:
    """What the loop needs of a branch: its parameters, its gradient, the number of its steps."""
    objective = Objective(config.terms)
    check_companions(objective, halves)
    model.requires_grad_(config.training == "full")
    data: dict[Half, HalfData] = {
        half: HalfData(
            halves.of(half), _reference(model, objective, half, halves, config.optimizer)
        )
        for half in halves.names
    }
    parameters = _trainable(model, config, seed)
    passes = Passes(model, data, objective, config.optimizer.max_tokens)
    steps = halves.steps(config.schedule, seed=seed)
    rule = lookup(STEP_RULES, config.step.rule, "step rule").fn
    if config.optimizer.checkpointing:
        recompute_blocks(model)

    def gradient(number: int) -> dict[str, float]:
        def backward(*asked: Side) -> dict[str, float]:
            return passes.backward([on_sides(batch, asked) for batch in steps[number]])

        with autocast(model.dtype, config.optimizer.compute, models.device()):
            return rule(backward, list(parameters.values()), config.step)

    return Prepared(parameters, gradient, len(steps), passes)


def branch_demand(config: Branch, halves: Halves, *, seed: int, weights: models.Dtype) -> Demand:
    """The memory that training a branch asks for, with the model held in the type `weights`."""
    objective, full = Objective(config.terms), config.training == "full"
    lengths = {half: [len(s.tokens) for s in halves.of(half)] for half in halves.names}
    apart = lookup(STEP_RULES, config.step.rule, "step rule").apart
    together: list[tuple[Side, ...]] = [("forget",), ("retain",)] if apart else [SIDES]
    passes, piece = set(), max(*lengths["forget"], *lengths["retain"])

    def tokens(half: Half, items: tuple[int, ...]) -> int:
        return sum(lengths[half][index] for index in items)

    for step in halves.steps(config.schedule, seed=seed):
        for sides in together:
            read = [objective.read(on_sides(batch, sides)) for batch in step]
            passes.add(tuple(sum(tokens(h, batch[h]) for h in batch) for batch in read))
            for batch in read:
                for half, items in batch.items():
                    parts = units(half, items) if objective.divisible(half) else [items]
                    piece = max([piece, *(tokens(half, part) for part in parts)])
    return Demand(
        optimizer=config.optimizer,
        weights="float32" if full else weights,
        passes=tuple(sorted(passes)),
        piece=piece,
        longest=max(max(found) for found in lengths.values()),
        rank=None if full else config.lora.rank,
        dropout=not full and config.lora.dropout > 0,
        kl=any(objective.needs_kl(half) for half in halves.names),
        kept=sum(sum(lengths[half]) for half in halves.names if objective.needs_kl(half)),
        buffers=1 + apart,  # the weights at the start; a gradient
    )


def check_companions(objective: Objective, halves: Halves) -> None:
    """Refuse terms on sets that whoever trains did not hand over."""
    for half in objective.halves:
        if half not in halves.names:
            raise TrainingError(f"a term reads {half}, and no such items were given to training")


def _reference(
    model: PreTrainedModel,
    objective: Objective,
    half: Half,
    halves: Halves,
    config: Optimizer,
) -> Reference | None:
    kl = objective.needs_kl(half)
    if not (kl or objective.needs_reference(half)):
        return None
    scope, sequences = objective.scope(half), halves.of(half)
    kept = "" if not kl else "-states" if trains_head(model) else "-rows"
    which = half if half in ("forget", "retain") else f"{half}-{halves.companions[half].key}"
    return cached_reference(
        model,
        sequences,
        scope,
        kl=kl,
        file=halves.cache / f"{halves.cache_key}-{which}-{scope}{kept}.safetensors",
        max_tokens=config.max_tokens,
    )


def _trainable(model: PreTrainedModel, config: Branch, seed: int) -> dict[str, Parameter]:
    if config.training == "lora":
        lora.add_adapter(model, config.lora, seed=seed)
    return sharding.trainable(model)


def _check_moved(
    parameters: dict[str, Parameter], start: dict[str, torch.Tensor], label: str
) -> None:
    """A matrix that training did not move was not trained at all: refuse the branch."""
    here = [n for n, p in parameters.items() if torch.equal(sharding.local(p.detach()), start[n])]
    everywhere = set[str].intersection(*map(set, parallel.gather(here)))
    still = [name for name in here if name in everywhere]
    if still:
        raise TrainingError(
            f"{label}: {len(still)} of {len(parameters)} trained matrices did not move, "
            f"{still[0]} among them; nothing reaches them"
        )
