"""Merge the adapters of a merge file into one adapter: what `output: adapter` does.

Dimensions: M models, r rank, (out, in) the shape of a linear layer. Every tensor is merged under
the settings that `output: model` has for it, and only what is added to the base is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.config import parse_section
from expunge.errors import MergeError
from expunge.merge.adapters import merge_adapters
from expunge.merge.compat import MergeFile
from expunge.merge.engine import Bounds, Job, model_bounds
from expunge.merge.factoring import Pair, coefficients, factored, write_factors
from expunge.merge.families import Piece, Span
from expunge.merge.operands import Operand, Update, Whole, blame, constant, decode
from expunge.merge.plan import Plan
from expunge.merge.section import Merge
from expunge.merge.tally import Tally
from expunge.merge.tensor import merged_float32, operations
from expunge.merge.updates import Adapter
from expunge.progress import progress

_INSTEAD = "say output: model, which takes it"


@dataclass(frozen=True)
class Layer:
    """One linear layer that an adapter changes."""

    name: str
    job: Job
    """How `output: model` would merge its weight."""

    updates: tuple[Update | None, ...]
    """One a model; None where it leaves the layer alone."""


def merge_to_adapter(plan: Plan, out: Path) -> dict[str, Any]:
    """Write the adapter folder `out`; the report is that of merge.adapters.merge_adapters."""
    if plan.file.space == "factors":
        _check(plan)
        return _merge_factors(plan, out)
    jobs, layers = settled(plan)
    if out.is_dir() and any(out.iterdir()):
        raise MergeError(f"{out} exists and is not empty; choose another folder")
    bounds, tally = model_bounds(jobs, operations()), Tally(len(layers[0].updates))
    write_factors(_factors(layers, plan, bounds, tally), plan.donor.checkpoint.name, out)
    return tally.report()


def settled(plan: Plan) -> tuple[list[Job], list[Layer]]:
    """What is merged, layer by layer; all that no adapter can be is refused."""
    _check(plan)
    jobs = plan.jobs()
    for job in jobs:
        _check_sum(plan.file, job)
    return jobs, _layers(plan, jobs)


def _check(plan: Plan) -> None:
    """Refuse what no adapter can be: by models, method and fields of the file."""
    file, how = plan.file, plan.file.row.how
    if file.models is None:
        raise MergeError("output: adapter needs models, not slices")
    for field in ("tokenizer", "tokenizer_source", "chat_template"):
        if getattr(file, field) is not None:
            raise MergeError(
                f"an adapter has no tokenizer: leave {field} out, or say output: model"
            )
    named = [plan.source(given.model) for given in file.models]
    loose = [s for s in named if s.adapter is None and s != plan.base]
    folders = {source.checkpoint.folder for source in plan.sources}
    if loose or len(folders) > 1 or (plan.base and plan.base.adapter):
        raise MergeError(
            "output: adapter needs every model as base+lora, all of one base, or as lora alone"
        )
    if isinstance(how, Piece) and how.looks and plan.donor.alone:
        raise MergeError(
            f"{file.name} looks at the base's weights, and adapters alone have none: write each "
            "model as base+lora"
        )
    of = how.of if isinstance(how, Span) and how.measures else "deltas"
    if of == "weights" or (of == "either" and plan.base is None):
        more = "" if of == "weights" else " where no base_model is given"
        raise MergeError(
            f"{file.name} merges whole weights{more}, and an adapter holds only their change; "
            f"{_INSTEAD}"
        )


def _check_sum(file: MergeFile, job: Job) -> None:
    """Refuse a sum of whole weights that is not a mean: the base itself would be scaled."""
    if not isinstance(file.row.how, Span) or file.row.how.of != "weights":
        return
    assert job.settings is not None
    sums = coefficients(file.row, job.settings)
    total = 1.0 if sums is None else float(sums.sum())
    if abs(total - 1) > 1e-6:
        raise MergeError(
            f"{file.name} would multiply {job.name} of the base by {total:g}, which no adapter "
            f"can do; let the weights sum to 1, take task_arithmetic, or {_INSTEAD}"
        )


def _layers(plan: Plan, jobs: Sequence[Job]) -> list[Layer]:
    """The layers that at least one adapter changes; whatever else one changes is refused."""
    sources = [plan.source(given.model) for given in plan.slices[0].sources]
    for source in sources:
        reason = _beyond_lora(source.adapter) if source.adapter else None
        if reason is not None:
            raise MergeError(
                f"{source.name} {reason}, which is not written to an adapter; {_INSTEAD}"
            )
    changed = {name for source in sources if source.adapter for name in source.adapter.names()}
    layers = []
    for job in jobs:
        if job.name not in changed:
            continue
        if job.settings is None:
            raise MergeError(f"{job.name} is stored as {job.dtype}; only floats can be merged")
        merged = sources
        if len(job.settings.weights) < len(sources):  # the base is not one of those merged
            merged = [source for source in sources if source != plan.base]
        parts = [s.adapter.part(job.name, s.checkpoint) if s.adapter else None for s in merged]
        updates = tuple(part if isinstance(part, Update) else None for part in parts)
        layers.append(Layer(job.name.removesuffix(".weight"), job, updates))
    if not layers:
        raise MergeError("output: adapter needs adapters that change a layer, and none does")
    return layers


def _beyond_lora(adapter: Adapter) -> str | None:
    """What an adapter does beside adding B A to linear layers."""
    for layer, found in adapter.factors.items():
        if "embedding_a" in found or "embedding_b" in found:
            return f"adapts the embedding {layer}"
        if "magnitude" in found:
            return f"scales the rows of {layer} (DoRA)"
    if adapter.replaced:
        return f"replaces {min(adapter.replaced)} whole"
    return "has fan_in_fan_out" if adapter.config.get("fan_in_fan_out") else None


def _factors(
    layers: Sequence[Layer], plan: Plan, bounds: Bounds, tally: Tally
) -> Iterator[tuple[str, Tensor, Tensor]]:
    dtype = getattr(torch, plan.file.stored or "float32")
    with progress("merge", len(layers), "layers") as bar:
        for layer in layers:
            job = layer.job
            assert job.method is not None and job.settings is not None
            delta = _delta(layer, bounds.get(job.name))
            sums = coefficients(job.method, job.settings)
            pairs = [(number, _pair(u)) for number, u in enumerate(layer.updates) if u is not None]
            own = None if sums is None else [float(sums[number]) for number, _ in pairs]
            a, b, cut = factored([pair for _, pair in pairs], own, plan.file.rank, delta)
            tally.count(delta, [_formed(update, job.shape) for update in layer.updates])
            if cut:
                tally.cut(delta, b @ a)
            yield layer.name, a.to(dtype), b.to(dtype)
            bar()


def _delta(layer: Layer, bounds: np.ndarray | None) -> Tensor:
    """What the merge adds to the base's weight, in float32: (out, in)."""
    job, shape = layer.job, layer.job.shape
    assert job.method is not None and job.settings is not None and job.operand is not None
    parts = [u or constant(np.zeros(shape, np.float32)) for u in layer.updates]
    sums = coefficients(job.method, job.settings)
    if sums is not None:
        given = zip(sums, layer.updates, strict=True)
        return sum((float(c) * _formed(u, shape) for c, u in given), torch.zeros(shape))
    nothing = Update(lambda first, last: np.zeros((last - first, shape[1]), np.float32), whole=True)
    base = nothing
    if isinstance(job.method.how, Piece) and job.method.how.looks:
        assert isinstance(job.operand.base, Whole)
        base = job.operand.base
    operand = Operand(job.name, shape, base, parts)
    how = {"bounds": bounds, "statistics": job.statistics}
    merged = merged_float32(operand, job.method, job.settings, **how)
    if not np.isfinite(merged).all():
        raise MergeError(blame(operand))
    if isinstance(base, Whole):
        raw, kind = base.read(0, operand.size, operand.columns)
        merged = merged - decode(raw, kind).reshape(shape)
    return torch.from_numpy(merged)


def _pair(update: Update) -> Pair:
    """A and B of a plain LoRA, its scale within B."""
    assert update.factors is not None
    a, b = update.factors()
    return torch.from_numpy(a), torch.from_numpy(b)


def _formed(update: Update | None, shape: tuple[int, ...]) -> Tensor:
    """ΔW of one model, in float32: (out, in)."""
    return torch.zeros(shape) if update is None else torch.from_numpy(update.rows(0, shape[0]))


def _merge_factors(plan: Plan, out: Path) -> dict[str, Any]:
    """Merge A's with A's and B's with B's, under one setting for all layers."""
    file, else_say = plan.file, "space: delta takes it"
    layers = _layers(plan, plan.jobs())
    if any(update is None for layer in layers for update in layer.updates):
        raise MergeError(f"space: factors needs adapters of the same layers; {else_say}")
    if file.stored not in (None, "float32"):
        raise MergeError(f"space: factors writes float32, not {file.stored}; {else_say}")
    told = [layer.job.settings for layer in layers if layer.job.settings is not None]
    weights, options = told[0].weights, dict(told[0].options)
    if any((one.weights, one.options) != (weights, options) for one in told):
        raise MergeError(f"space: factors has one setting for all layers; {else_say}")
    for option, value in options.items():
        if isinstance(value, tuple):
            if len(set(value)) > 1:
                raise MergeError(f"space: factors has one {option} for all models; {else_say}")
            options[option] = value[0]
    if options.get("divide") == "weights":
        raise MergeError(f"space: factors cannot divide by weights, only their roots; {else_say}")
    if isinstance(file.row.how, Span):
        sums = coefficients(file.row, told[0])
        weights, options = () if sums is None else tuple(sums.tolist()), {}
    named = {name: options.pop(name) for name in ("density", "vote") if name in options}
    fields = {"method": file.name, "weights": weights, **named, "options": options}
    merge = parse_section({**fields, "seed": file.seed}, Merge, origin="space: factors")
    folders = [plan.source(given.model).adapter for given in file.models or ()]
    adapters = [adapter.folder for adapter in folders if adapter is not None]
    base = None if plan.donor.alone else plan.donor.checkpoint.folder
    return merge_adapters(adapters, merge, out, base=base)
