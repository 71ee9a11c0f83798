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
from expunge.progress import say
from expunge.unlearn.fit import readable_out_of_memory
from expunge.unlearn.footprint import Demand, sizes
from expunge.unlearn.gradient import step_gradient
from expunge.unlearn.halves import Halves
from expunge.unlearn.masks import Mask, mask
from expunge.unlearn.objective import Half, Objective, Term
from expunge.unlearn.optimizer import Span
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.reference import Reference, cached_reference, trains_head
from expunge.unlearn.schedule import Pairing, Phase, Schedule, check_schedule
from expunge.unlearn.steps import STEP_RULES, JointStep, State, Step, StepRule
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

    training: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter; `full` trains every weight."""

    lora: Lora = Field(default_factory=Lora)
    """The adapter, where training is `lora`."""

    schedule: Schedule = Field(default_factory=Pairing)
    """Which items each step sees; a name in SCHEDULES as `kind`, pairing where none is given."""

    mask: Mask | None = None
    """Which weights may move, where training is `full`; null means all."""

    step: Step = Field(default_factory=JointStep)
    """How a step's gradient is made."""

    optimizer: Optimizer = Field(default_factory=Optimizer)
    """Learning rate and the like."""

    watch: Watch | None = None
    """Evaluation during training; null evaluates when it has ended."""

    @model_validator(mode="after")
    def _possible(self) -> "Branch":
        halves = {term.half for term in self.terms}
        if "forget" not in halves:
            raise ValueError("terms must hold at least one half: forget")
        compares = self.step.rule if self.rule.apart else None
        check_schedule(self.schedule, retains="retain" in halves, apart=compares)
        if self.mask is not None and self.training == "lora":
            raise ValueError(
                "a mask needs training: full; an adapter is confined by lora.layers and "
                "lora.targets"
            )
        if "retain" in self.rule.needs and "retain" not in halves:
            raise ValueError(f"the step rule {self.step.rule} needs a term with half: retain")
        rank = self.lora.rank if self.training == "lora" else None
        self.step.check(self.terms, self.optimizer, rank)
        return self

    @property
    def rule(self) -> StepRule:
        """The row of the step rule."""
        return STEP_RULES[self.step.rule]

    @property
    def unguarded(self) -> bool:
        """Whether a forget loss falls without end and nothing stops it."""
        endless = any(t.half == "forget" and not t.row.bounded for t in self.terms)
        return endless and (self.watch is None or self.watch.until is None)


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
        made = prepared(model, halves, config, seed=seed, folder=folder)
        start = {n: sharding.local(p.detach()).clone() for n, p in made.parameters.items()}

        def evaluated() -> dict[str, float]:
            model.eval()
            with autocast(model.dtype, config.optimizer.compute, models.device()):
                found = made.passes.losses(config.watch and config.watch.sample)
            if measure is not None and config.watch and config.watch.read == "evaluation":
                found |= measure(model)
            model.train()
            return found

        if config.unguarded:
            say(f"{label}: its forget loss falls without end, and no watch.until stops it")
        watched = config.watch and Watcher(config.watch, evaluated, made.parameters, folder)
        model.train()
        train(
            made.parameters,
            made.gradient,
            steps=sum(span.steps for span in made.spans),
            config=config.optimizer,
            seed=seed,
            folder=folder,
            label=label,
            deadline=deadline,
            watcher=watched,
            spans=made.spans,
            masks=made.masks,
            state=made.state,
        )
    model.eval()
    moved = {n: p for n, p in made.parameters.items() if n not in made.masks}
    _check_moved(moved, start, label, some=config.rule.selective)
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
    spans: list[Span]
    """The phases, as the optimiser sees them."""
    passes: Passes
    masks: dict[str, torch.Tensor]
    """Which weights of a parameter may move, where not all may."""
    state: State
    """What the step rule carries from step to step."""


def prepared(
    model: PreTrainedModel,
    halves: Halves,
    config: Branch,
    *,
    seed: int,
    folder: Path | None = None,
    made: list[Phase] | None = None,
) -> Prepared:
    """What the loop needs of a branch: its parameters, its gradient, its phases.

    `made` are phases over `halves` in place of the schedule's. A mask is kept in `folder`.
    """
    objective = Objective(config.terms)
    config.step.check_model(model)
    if sharding.is_sharded(model) and not config.rule.sharded:
        raise TrainingError(
            f"the step rule {config.step.rule} needs whole weights, and each process holds a slice "
            "of them; launch without FSDP and ZeRO-3"
        )
    model.requires_grad_(config.training == "full")
    masks = {}
    if config.mask is not None:
        given = halves.forget, halves.retain, config.optimizer
        masks = mask(model, config.mask, *given, seed=seed, folder=folder)
    own = len(halves.retain)
    if made is None:
        made, halves = halves.planned(config.schedule, seed=seed)
    data: dict[Half, HalfData] = {
        half: HalfData(
            halves.of(half),
            _reference(model, objective, half, halves, config.optimizer),
            own if half == "retain" else None,
        )
        for half in ("forget", "retain")
    }
    parameters = _trainable(model, config, seed)
    passes = Passes(model, data, objective, config.optimizer.max_tokens)
    steps = [step for phase in made for step in phase.steps]
    if config.optimizer.checkpointing:
        recompute_blocks(model)
    note = {"unguarded": 1.0} if config.unguarded else {}
    given = passes, parameters, steps, config.step, config.optimizer
    gradient, state = step_gradient(*given, seed=seed, note=note)
    spans = [Span(len(phase.steps), phase.lr) for phase in made]
    return Prepared(parameters, gradient, spans, passes, masks, state)


def branch_demand(
    config: Branch,
    halves: Halves,
    *,
    seed: int,
    weights: models.Dtype,
    made: list[Phase] | None = None,
) -> Demand:
    """The memory that training a branch asks for, with the model held in the type `weights`.

    `made` are phases over `halves` in place of the schedule's.
    """
    if made is None:
        made, halves = halves.planned(config.schedule, seed=seed)
    forget, retain = ([len(s.tokens) for s in half] for half in (halves.forget, halves.retain))
    objective, full = Objective(config.terms), config.training == "full"
    passes, pieces = set(), [max(forget), max(retain)]
    for step in (step for phase in made for step in phase.steps):
        one = sizes([batch.forget for batch in step], forget)
        two = sizes([batch.retain for batch in step], retain)
        pieces += [0 if objective.divisible("forget") else max(one)]
        pieces += [0 if objective.divisible("retain") else max(two)]
        if config.rule.apart or not objective.on("retain"):
            passes |= {one, two} if objective.on("retain") else {one}
        else:
            passes.add(tuple(map(sum, zip(one, two, strict=True))))
    return Demand(
        optimizer=config.optimizer,
        weights="float32" if full else weights,
        passes=tuple(sorted(passes)),
        piece=max(pieces),
        longest=max(*forget, *retain),
        rank=None if full else config.lora.rank,
        mask=config.mask,
        dropout=not full and config.lora.dropout > 0,
        kl=any(objective.needs_kl(half) for half in ("forget", "retain")),
        kept=sum(
            sum(len(s.tokens) for s in halves.of(half))
            for half in ("forget", "retain")
            if objective.needs_kl(half)
        ),
        buffers=1 + config.rule.buffers,  # the weights at the start; what the rule holds
    )


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
    scope = objective.scope(half)
    kept = "" if not kl else "-states" if trains_head(model) else "-rows"
    name = f"{halves.cache_key}-{half}-{scope}{kept}.safetensors"
    return cached_reference(
        model,
        halves.of(half),
        scope,
        kl=kl,
        file=halves.cache / name,
        max_tokens=config.max_tokens,
    )


def _trainable(model: PreTrainedModel, config: Branch, seed: int) -> dict[str, Parameter]:
    if config.training == "lora":
        lora.add_adapter(model, config.lora, seed=seed)
    return sharding.trainable(model)


def _check_moved(
    parameters: dict[str, Parameter], start: dict[str, torch.Tensor], label: str, *, some: bool
) -> None:
    """A matrix that training did not move was not trained at all: refuse the branch. With `some`
    a rule or mask chooses what moves, and only a branch of which nothing moved is refused."""
    here = [n for n, p in parameters.items() if torch.equal(sharding.local(p.detach()), start[n])]
    everywhere = set[str].intersection(*map(set, parallel.gather(here)))
    still = [name for name in here if name in everywhere]
    if still and not (some and len(still) < len(parameters)):
        raise TrainingError(
            f"{label}: {len(still)} of {len(parameters)} trained matrices did not move, "
            f"{still[0]} among them; nothing reaches them"
        )
