"""Training as ours does it, on the steps that train.py lays down for both."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_items import sequences

from expunge import lora, models
from expunge.unlearn.companions import Chosen
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.reference import cached_reference
from expunge.unlearn.sets import Half
from expunge.unlearn.steps import STEP_RULES, JointStep, Now
from expunge.unlearn.trainer import Optimizer, autocast, train

NPO, KL, NLL = 0.4, 0.4, 0.2


def unlearn(spec: dict[str, Any], wait: Callable[[int], None]) -> tuple[list[float], float]:
    """NPO + KL + NLL with a LoRA: a loss a step, and seconds of the reference."""
    model = models.load_model(Path(spec["model"]), dtype=spec["dtype"])
    model.requires_grad_(False)
    objective = Objective(
        (
            Term(half="forget", loss="npo_batch", weight=NPO, options={"beta": 0.1}),
            Term(half="retain", loss="kl", weight=KL, scope="document"),
            Term(half="retain", loss="nll", weight=NLL),
        )
    )
    config = _optimizer(spec)
    names: tuple[Half, Half] = ("forget", "retain")
    halves = {half: sequences(spec[half]) for half in names}
    begin = time.perf_counter()
    references = {
        half: cached_reference(
            model,
            halves[half],
            objective.scope(half),
            kl=objective.needs_kl(half),
            file=Path(spec["folder"]) / f"{half}.safetensors",
            max_tokens=config.max_tokens,
        )
        for half in names
    }
    seconds = time.perf_counter() - begin
    lora.load_adapter(model, Path(spec["factors"]))
    layers = lora.adapters_of(model)
    parameters = {
        f"{name}.{factor}": getattr(layer, factor)
        for name, layer in layers.items()
        for factor in ("lora_A", "lora_B")
    }
    data: dict[Half, HalfData] = {half: HalfData(halves[half], references[half]) for half in names}
    passes = Passes(model, data, objective, config.max_tokens)
    rule = STEP_RULES["joint"].fn

    def gradient(number: int) -> dict[str, float]:
        wait(number)
        step: list[Chosen] = [
            {"forget": tuple(f), "retain": tuple(r)} for f, r in spec["steps"][number]
        ]

        def backward(*halves: Half) -> dict[str, float]:
            return passes.backward([{half: batch[half] for half in halves} for batch in step])

        return rule(Now(list(parameters.values()), backward), JointStep())

    model.train()
    log = train(parameters, gradient, **_how(spec, config))
    return [record["forget"] + record["retain"] for record in log], seconds


def full(spec: dict[str, Any], wait: Callable[[int], None]) -> tuple[list[float], float]:
    """Every weight on whole items: a loss a step."""
    model = models.load_model(Path(spec["model"]), dtype="float32")
    model.requires_grad_(True)
    config = _optimizer(spec)
    term = Term(half="retain", loss="nll", scope="document")
    items = sequences(spec["items"])
    passes = Passes(model, {"retain": HalfData(items)}, Objective((term,)), config.max_tokens)

    def gradient(number: int) -> dict[str, float]:
        wait(number)
        with autocast(model.dtype, config.compute, "cpu"):
            return passes.backward([{"retain": tuple(spec["steps"][number])}])

    model.train()
    log = train(dict(model.named_parameters()), gradient, **_how(spec, config))
    return [record["retain.nll"] for record in log], 0.0


def _optimizer(spec: dict[str, Any]) -> Optimizer:
    return Optimizer(
        max_tokens=1024,  # what the peer forwards at once at most
        checkpoint_seconds=1e9,  # nor does the peer write any
        lr=spec["lr"],
        warmup=spec["warm"] / len(spec["steps"]),
        weight_decay=spec["weight_decay"],
        clip=spec["clip"],
        compute=spec["compute"],
    )


def _how(spec: dict[str, Any], config: Optimizer) -> dict[str, Any]:
    steps, folder = len(spec["steps"]), Path(spec["folder"])
    return {"steps": steps, "config": config, "seed": 0, "folder": folder, "label": "ours"}
