"""The gradient of a branch's steps: its passes, handed to its step rule one step at a time."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from expunge import models, sharding
from expunge.unlearn.companions import Chosen, on_sides
from expunge.unlearn.passes import Passes
from expunge.unlearn.sets import SETS, Side
from expunge.unlearn.steps import STEP_RULES, Now, State, Step
from expunge.unlearn.trainer import Gradient, Optimizer, autocast


def step_gradient(
    passes: Passes,
    parameters: Mapping[str, Parameter],
    steps: Sequence[Sequence[Chosen]],
    step: Step,
    optimizer: Optimizer,
    *,
    seed: int,
    note: Mapping[str, float],
    masks: Mapping[str, Tensor],
) -> tuple[Gradient, State]:
    """What leaves the gradient of step n in the parameters, and what it carries between steps.

    `note` is logged with the first. `masks` says which weights of a parameter may move, where not
    all may.
    """
    model, objective = passes.model, passes.objective
    recalling, state = passes.recalling(), step.start(optimizer.lr)
    rest = ["retain"] if any(SETS[half].side == "retain" for half in objective.halves) else []
    rule = STEP_RULES[step.rule].fn
    held = {parameters[name]: mask for name, mask in masks.items()}

    def gradient(number: int) -> dict[str, float]:
        def chosen(*sides: Side) -> list[Chosen]:
            return [on_sides(batch, sides) for batch in steps[number]]

        def backward(*sides: Side, scale: Mapping[str, float] | None = None) -> dict[str, float]:
            return passes.backward(chosen(*sides), scale)

        def losses(*sides: Side) -> dict[str, float]:
            with now.without_dropout(), torch.no_grad():
                found = passes.backward(chosen(*sides))
            sharding.release(model)
            return found

        def recall() -> dict[str, float]:
            found = recalling.backward(chosen("forget"), {"forget": -1.0})
            return {"nll": -found["forget"]} if found else {}

        now = Now(
            parameters=list(parameters.values()),
            backward=backward,
            losses=losses,
            recall=recall,
            rest=rest,
            masks=held,
            model=model,
            forwarding=passes.forwarding,
            state=state,
            number=number,
            seed=f"{seed}:{number}",
        )
        with autocast(model.dtype, optimizer.compute, models.device()):
            return rule(now, step) | (dict(note) if number == 0 else {})

    return gradient, state
