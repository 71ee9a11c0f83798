"""Edits of updates, done on folders: adapters stay adapters, whole models are streamed.

Dimensions: M models, r rank, (out, in) the shape of a linear layer.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge import models, runs
from expunge.adapter_files import CONFIG, PREFIX, WEIGHTS, read_adapter
from expunge.adapter_files import write_adapter as write_folder
from expunge.data.batches import TokenSequence
from expunge.edit import arithmetic
from expunge.edit.arithmetic import Pair
from expunge.edit.observe import sketches
from expunge.edit.repair import response, row_blocks, sage
from expunge.edit.task import Task, spelled
from expunge.edit.write import delta_rows, summed_job, write_jobs
from expunge.errors import EditError, ModelError
from expunge.linear import is_linear
from expunge.merge.adapters import merge_adapters
from expunge.merge.branches import Branch, read_branches, same_ranks
from expunge.merge.checkpoint import FLOATS, map_file, read_header
from expunge.merge.companions import copy_companions
from expunge.merge.compat import Input, MergeFile
from expunge.merge.engine import Job, merge_to_folder
from expunge.merge.factoring import write_factors
from expunge.merge.operands import KINDS, Update, Whole, decode
from expunge.merge.plan import Plan
from expunge.merge.section import Merge


def sum_updates(task: Task, coefficients: tuple[float, ...]) -> dict[str, Any]:
    """θ + Σ c_i τ_i: one adapter is scaled, several are laid side by side, models are streamed."""
    if not all(map(math.isfinite, coefficients)) or not any(coefficients):
        raise EditError(f"{task.method}: the weights must be finite and not all zero")
    if task.adapters is None:
        return {"coefficients": list(coefficients), **_streamed(task, coefficients)}
    if len(task.adapters) == 1:
        branch = read_branches(task.adapters)[0]
        pairs = {n: arithmetic.scaled(pair, coefficients[0]) for n, pair in branch.factors.items()}
        return {"coefficients": list(coefficients), **_write_alike(task, branch, pairs)}
    config = Merge(method="linear", weights=coefficients, space="delta")
    made = merge_adapters(task.adapters, config, task.out, base=task.start())
    changed = sorted(read_branches(task.adapters)[0].factors)
    return {"coefficients": list(coefficients), "tensors": changed, **made}


def average_factors(task: Task) -> dict[str, Any]:
    """A's and B's averaged apart, written as an adapter of the same rank."""
    branches = read_branches(task.adapters or [])
    same_ranks(branches)
    made, square = [], 0.0
    for layer in branches[0].factors:
        pairs = [
            (b.factors[layer][0], b.scales[layer] * b.factors[layer][1]) for b in branches
        ]  # the scale goes with B
        a, b = arithmetic.pem_add(pairs, **task.told)
        made.append((layer, a, b))
        square += float((b @ a).square().sum())
    first = branches[0]
    write_factors(made, first.base, task.out, transposed=first.transposed)
    tensors = sorted(layer for layer, _, _ in made)
    return {"tensors": tensors, "norm": square**0.5, "storage_survival": None}


def mirror_ia3(task: Task) -> dict[str, Any]:
    """An (IA)³ adapter folder with its vectors mirrored at 1."""
    folder = task.of.adapter
    if folder is None:
        raise EditError(f"{task.method} edits an (IA)³ adapter: give --adapter")
    vectors, config = read_ia3(folder)
    made = {key: arithmetic.ia3_negate(vector, **task.told) for key, vector in vectors.items()}
    write_folder(made, config, task.out)
    square = sum(float((made[k] - vectors[k]).square().sum()) for k in made)
    return {"tensors": sorted(made), "norm": square**0.5, "storage_survival": None}


def repair(task: Task) -> dict[str, Any]:
    """Bend the update of an adapter or a model away from the retain set, layer by layer."""
    base = task.start()
    model, tokenizer = models.load_model(base), models.load_tokenizer(base)
    told = task.told
    texts = spread(task.texts("retain", tokenizer), told.pop("items"))
    rank = told.pop("rank")
    if task.adapters is not None:
        return _repair_adapter(task, model, texts, rank, told)
    return _repair_model(task, model, texts, rank, told)


def spread(texts: list[TokenSequence], count: int) -> list[TokenSequence]:
    """At most so many texts, evenly spread."""
    if count >= len(texts):
        return texts
    return [texts[i * len(texts) // count] for i in range(count)]


def read_ia3(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The vectors of a peft (IA)³ folder by their keys, in float32, and its config."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no {name}, so it is not an adapter folder")
    config = runs.read_json(folder / CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else json.dumps(config)[:40]
    if kind != "IA3":
        raise ModelError(f"{folder} is a {kind} adapter, not (IA)³")
    raw, found = map_file(folder / WEIGHTS), {}
    for key, stored in read_header(folder / WEIGHTS).items():
        if not key.endswith(".ia3_l"):
            raise ModelError(f"{folder}: {key} is not an (IA)³ vector")
        if stored.dtype not in FLOATS:
            raise ModelError(f"{folder}: {key} is {stored.dtype}, not a float")
        numbers = decode(raw[stored.offset : stored.offset + stored.nbytes], KINDS[stored.dtype])
        if not np.isfinite(numbers).all():
            raise ModelError(f"{folder}: {key} holds NaN or infinite numbers")
        found[key] = torch.from_numpy(numbers.reshape(stored.shape).copy())
    if not found:
        raise ModelError(f"{folder} holds no (IA)³ vector")
    return found, config


def named(layer: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The factors of a layer as peft names them."""
    return {
        f"{PREFIX}{layer}.lora_A.weight": a.contiguous(),
        f"{PREFIX}{layer}.lora_B.weight": b.contiguous(),
    }


def _write_alike(task: Task, branch: Branch, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """Write an adapter of the same ranks and scales: its config is kept."""
    square = sum(
        branch.scales[layer] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
        for layer, (a, b) in pairs.items()
    )
    tensors = {k: t for layer, pair in pairs.items() for k, t in named(layer, *pair).items()}
    write_folder(tensors, read_adapter(branch.folder)[1], task.out)
    return {
        "tensors": sorted(pairs),
        "norm": max(0.0, square) ** 0.5,
        "storage_survival": None,
    }


def _streamed(task: Task, coefficients: tuple[float, ...]) -> dict[str, Any]:
    """θ + Σ c_i τ_i of whole models, tensor by tensor."""
    given = [
        Input(model=spelled(model), parameters={"weight": c})
        for model, c in zip(task.models, coefficients, strict=True)
    ]
    file = MergeFile(method="task_arithmetic", base_model=str(task.start()), models=tuple(given))
    plan = Plan(file)
    donor = plan.donor.checkpoint
    jobs = plan.jobs()
    report = merge_to_folder(
        jobs,
        task.out,
        lambda folder: copy_companions(donor.folder, folder, plan.config_changes()),
        description=plan.description(),
    )
    operands = {job.name: job.operand for job in jobs if job.operand is not None}
    weights = np.array(coefficients, np.float32)
    pieces = (weights @ piece.deltas for operand in operands.values() for piece in operand)
    norm = sum(float(np.square(piece, dtype=np.float64).sum()) for piece in pieces) ** 0.5
    return {
        "tensors": list(operands),
        "norm": norm,
        "storage_survival": report.storage_survival,
    }


def _repair_adapter(
    task: Task, model: Any, texts: list[TokenSequence], rank: int, told: dict[str, Any]
) -> dict[str, Any]:
    branch = read_branches(task.adapters or [])[0]
    _check_layers(task, model, list(branch.factors))
    found = sketches(model, texts, list(branch.factors), rank)
    pairs, before, after = {}, 0.0, 0.0
    squares = [0.0, 0.0]
    for layer, (a, b) in branch.factors.items():
        sketch = found[layer]
        pairs[layer] = (sage(a, sketch.space, **told), b)
        small = torch.linalg.qr(b).R * branch.scales[layer]  # |B x| = |R x|
        before += response(small @ a, sketch)
        after += response(small @ pairs[layer][0], sketch)
        squares[0] += float((small @ a).square().sum())
        squares[1] += float((small @ pairs[layer][0]).square().sum())
    return {
        **_write_alike(task, branch, pairs),
        **_shares(squares, before, after),
        "items": len(texts),
    }


def _repair_model(
    task: Task, model: Any, texts: list[TokenSequence], rank: int, told: dict[str, Any]
) -> dict[str, Any]:
    """The same of a whole model's update: its rows are repaired as they are streamed."""
    tuned, base = task.source(task.of), task.source(type(task.of)(task.start()))
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m != head]
    if not linear:
        raise EditError(f"{type(model).__name__} has no linear layers of torch's to repair")
    found = sketches(model, texts, linear, rank)
    spaces = {f"{name}.weight": sketch.space for name, sketch in found.items()}
    missing = sorted(set(tuned.checkpoint) ^ set(base.checkpoint))
    if missing:
        raise EditError(f"{missing[0]} is in one of {tuned.name} and {base.name}. Same model?")
    squares, outputs = [0.0, 0.0], [0.0, 0.0]

    def job(name: str) -> Job | None:
        stored = base.checkpoint[name]
        whole = Whole(base.checkpoint.raw(name), stored.dtype, str(stored.file))
        part = tuned.part(name, base)
        if tuned.checkpoint[name].shape != stored.shape:
            raise EditError(f"{name} has another shape in {tuned.name} than in {base.name}")
        if stored.dtype not in FLOATS:
            return None
        if name not in spaces:
            return summed_job(name, stored, whole, part)
        rows = delta_rows(part, whole, stored.shape[-1])

        def repaired(first: int, last: int) -> np.ndarray:
            return sage(rows(first, last), spaces[name], **told).numpy()

        _measure(name.removesuffix(".weight"), stored.shape[0], rows, repaired)
        return summed_job(name, stored, whole, Update(repaired))

    def _measure(layer: str, count: int, rows: Any, repaired: Any) -> None:
        for first, last in row_blocks(count):
            pieces = rows(first, last), torch.from_numpy(repaired(first, last))
            for place, piece in enumerate(pieces):
                squares[place] += float(piece.square().sum())
                outputs[place] += response(piece, found[layer])

    made = write_jobs(base, task.out, job, f"sage {task.options} {tuned.fingerprint()}")
    return {**made, **_shares(squares, *outputs), "items": len(texts)}


def _shares(squares: list[float], before: float, after: float) -> dict[str, Any]:
    """What is left of the update, and of what it changes in outputs on the retain items."""
    return {
        "norm": squares[1] ** 0.5,
        "norm_kept": (squares[1] / squares[0]) ** 0.5 if squares[0] else None,
        "retain_change_kept": (after / before) ** 0.5 if before else None,
    }


def _check_layers(task: Task, model: Any, names: list[str]) -> None:
    known = {name for name, m in model.named_modules() if is_linear(m)}
    for name in names:
        if name not in known:
            raise EditError(f"{task.of.adapter} adapts {name}, which {task.base} does not have")
