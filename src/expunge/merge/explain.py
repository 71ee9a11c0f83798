"""What a merge does to each layer: how much stays, where signs clash, who wins, which way it goes.

Dimensions: M models, n weights of a tensor.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from expunge.errors import MergeError
from expunge.merge.families import Elect
from expunge.merge.operands import Operand, decode
from expunge.merge.plan import Plan
from expunge.merge.tensor import merged_float32, operations
from expunge.merge.trim import find_trim
from expunge.progress import progress


@dataclass(frozen=True)
class TensorExplained:
    """One tensor of a merge."""

    name: str
    norm: float
    """Of the merged delta."""

    relative: float | None
    """That norm over the base's."""

    kept: tuple[float, ...] | None
    """Share of each model's entries that the trim keeps; None where nothing is trimmed."""

    conflicts: float
    """Share of the entries, among those that two models change, where their signs differ."""

    won: tuple[float, ...]
    """Share of the conflicting entries at which each model has the sign of the merged delta."""

    cosine: tuple[float, ...]
    """Of the merged delta to each model's."""


def explain(plan: Plan) -> list[dict[str, Any]]:
    """A row for each merged tensor that has a base; a merge of none is refused."""
    merged_ones = [job for job in plan.jobs() if job.operand is not None]
    jobs = [job for job in merged_ones if job.operand and job.operand.base is not None]
    if merged_ones and not jobs:
        raise MergeError(
            f"--explain counts each model's update from a base, and {plan.file.name} is given "
            "none: name a base_model"
        )
    rows = []
    with progress("explain", len(jobs), "tensors") as bar:
        for job in jobs:
            assert job.operand is not None and job.method is not None and job.settings is not None
            how, kept = job.method.how, None
            if isinstance(how, Elect) and how.keep not in ("all", "variance"):
                kept = _kept(job.operand, how, job.settings)
            merged = merged_float32(job.operand, job.method, job.settings).reshape(-1)
            rows.append(asdict(_explained(job.operand, merged, kept)))
            bar()
    return rows


def _kept(operand: Operand, how: Elect, settings: Any) -> tuple[float, ...]:
    """From the chances where entries are drawn, else from the counts of the bounds."""
    ops = operations()
    trim = find_trim(operand, how.keep, settings, ops)
    if how.keep in ("random", "ranked"):
        return tuple(float(odds) for odds in trim.odds)
    density = settings.options["density"]
    return tuple(min(1.0, max(1, int(d * operand.size)) / max(1, operand.size)) for d in density)


def _explained(
    operand: Operand, merged: np.ndarray, kept: tuple[float, ...] | None
) -> TensorExplained:
    models = len(operand.models)
    gram, products = np.zeros(models), np.zeros(models)
    square = base_square = 0.0
    both = clash = 0
    won = np.zeros(models)
    for piece in operand:
        deltas = piece.deltas
        base = decode(piece.base, piece.base_kind)
        delta = merged[piece.start : piece.start + piece.n] - base
        square += float(np.dot(delta.astype(np.float64), delta))
        base_square += float(np.dot(base.astype(np.float64), base))
        gram += (deltas.astype(np.float64) ** 2).sum(1)
        products += deltas.astype(np.float64) @ delta
        signs = np.sign(deltas)
        several = (signs != 0).sum(0) > 1
        differ = several & (signs.max(0) > 0) & (signs.min(0) < 0)
        both += int(several.sum())
        clash += int(differ.sum())
        won += ((signs == np.sign(delta)) & differ).sum(1)
    lengths = np.sqrt(gram * square)
    return TensorExplained(
        name=operand.name,
        norm=square**0.5,
        relative=(square / base_square) ** 0.5 if base_square else None,
        kept=kept,
        conflicts=clash / both if both else 0.0,
        won=tuple(float(w) / clash if clash else 0.0 for w in won),
        cosine=tuple(
            float(p / length) if length else 0.0
            for p, length in zip(products, lengths, strict=True)
        ),
    )
