"""A branch: one unlearned version of the target, as a LoRA adapter or with every weight trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from expunge import lora, models, parallel, sharding
from expunge.config import Section
from expunge.data.batches import TokenSequence
from expunge.errors import TrainingError
from expunge.lora import Lora
from expunge.registry import lookup
from expunge.unlearn.fit import readable_out_of_memory
from expunge.unlearn.footprint import Demand, sizes
from expunge.unlearn.objective import Half, Objective, Term
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.reference import Reference, cached_reference, trains_head
from expunge.unlearn.schedule import Pairing, paired_steps
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

    training: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter; `full` trains every weight."""

    blocks: int | None = Field(default=None, ge=1)
    """Train on the target's first blocks with its norm and head, as a guard's assistant; null: on
    all of it."""

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
        halves = {term.half for term in self.terms}
        if "forget" not in halves:
            raise ValueError("terms must hold at least one half: forget")
        if self.step.rule == "normalized" and "retain" not in halves:
            raise ValueError("the step rule normalized needs a term with half: retain")
        return self


@dataclass(frozen=True)
class Halves:
    """The tokens of both halves, and where their reference scores are cached."""

    forget: Sequence[TokenSequence]
    retain: Sequence[TokenSequence]
    cache: Path
    """Folder of the reference files."""
    cache_key: str
    """Stands for the target model and the data."""

    def of(self, half: Half) -> Sequence[TokenSequence]:
        """The sequences of one half."""
        return self.forget if half == "forget" else self.retain


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
    model.requires_grad_(config.training == "full")
    data: dict[Half, HalfData] = {
        half: HalfData(
            halves.of(half), _reference(model, objective, half, halves, config.optimizer)
        )
        for half in ("forget", "retain")
    }
    parameters = _trainable(model, config, seed)
    passes = Passes(model, data, objective, config.optimizer.max_tokens)
    steps = paired_steps(config.schedule, len(halves.forget), len(halves.retain), seed=seed)
    rule = lookup(STEP_RULES, config.step.rule, "step rule").fn
    if config.optimizer.checkpointing:
        recompute_blocks(model)

    def gradient(number: int) -> dict[str, float]:
        def backward(*asked: Half) -> dict[str, float]:
            return passes.backward([batch.of(*asked) for batch in steps[number]])

        with autocast(model.dtype, config.optimizer.compute, models.device()):
            return rule(backward, list(parameters.values()), config.step)

    return Prepared(parameters, gradient, len(steps), passes)


def branch_demand(config: Branch, halves: Halves, *, seed: int, weights: models.Dtype) -> Demand:
    """The memory that training a branch asks for, with the model held in the type `weights`."""
    forget, retain = ([len(s.tokens) for s in half] for half in (halves.forget, halves.retain))
    objective, full = Objective(config.terms), config.training == "full"
    apart = lookup(STEP_RULES, config.step.rule, "step rule").apart
    passes, pieces = set(), [max(forget), max(retain)]
    for step in paired_steps(config.schedule, len(forget), len(retain), seed=seed):
        one = sizes([batch.forget for batch in step], forget)
        two = sizes([batch.retain for batch in step], retain)
        pieces += [0 if objective.divisible("forget") else max(one)]
        pieces += [0 if objective.divisible("retain") else max(two)]
        if apart or not objective.on("retain"):
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
        dropout=not full and config.lora.dropout > 0,
        kl=any(objective.needs_kl(half) for half in ("forget", "retain")),
        kept=sum(
            sum(len(s.tokens) for s in halves.of(half))
            for half in ("forget", "retain")
            if objective.needs_kl(half)
        ),
        buffers=1 + apart,  # the weights at the start; a gradient
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
