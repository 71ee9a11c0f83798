"""Merge one tensor: a method and what it is told, applied slice by slice.

Dimensions: M models, n numbers of a slice.
"""

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

from expunge.errors import MergeError
from expunge.merge import codec, fused, plain, spectral
from expunge.merge.families import Elect, Matrix, Method, Piece, Span
from expunge.merge.fused import Election, Rounding, Tally, Trim
from expunge.merge.operands import Operand, Slice, Update, blame, constant, summed
from expunge.merge.pieces import tensors
from expunge.merge.trim import Settings, find_trim

DIVIDE = {"none": 0, "count": 1, "weights": 2}
Statistics = list[torch.Tensor] | None


def operations() -> ModuleType:
    """Kernels on the CPU; torch where there is a GPU."""
    if torch.cuda.is_available():
        return plain
    fused.use_threads(torch.get_num_threads())
    return fused


def merge_operand(
    operand: Operand,
    method: Method,
    settings: Settings,
    rounding: Rounding,
    tally: Tally,
    *,
    ops: ModuleType | None = None,
    bounds: np.ndarray | None = None,
    statistics: Statistics = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (place of its first number, stored bytes) for each slice of the merged tensor.

    `bounds` are those of a trim over the whole model; `statistics` the matrices that the method
    needs from each model. Nothing is yielded before what needs the whole tensor is known.
    """
    ops = ops or operations()
    operand, how = operand.held(), method.how
    if isinstance(how, Elect):
        trim = find_trim(operand, how.keep, settings, ops, bounds=bounds)
        election = _election(operand, how, settings, trim, ops)
        for piece in operand:
            yield piece.start, ops.elect(piece, trim, election, rounding, tally)
    elif isinstance(how, Span):
        yield from _span(operand, how, settings, rounding, tally, ops)
    elif isinstance(how, Piece):
        prepared = how.prepare(operand, settings)
        for piece in operand:
            base, deltas = tensors(piece)
            merged = how.fn(base, deltas, settings, prepared, operand.columns)
            yield piece.start, _store(piece, (merged - base).cpu().numpy(), rounding, tally, ops)
    else:
        yield from _matrix(operand, how, settings, rounding, tally, ops, statistics)


def merged_float32(operand: Operand, method: Method, settings: Settings, **how: Any) -> np.ndarray:
    """The whole merged tensor in float32, in its shape."""
    out = np.empty(operand.size, np.float32)
    rounding = Rounding(codec.FLOAT32)
    for start, raw in merge_operand(operand, method, settings, rounding, Tally(), **how):
        out[start : start + len(raw) // 4] = raw.view(np.float32)
    return out.reshape(operand.shape)


def keep_all(models: int) -> Trim:
    """A trim that lets every entry stay."""
    bounds = np.empty((models, 2, 2), np.int64)
    bounds[:, 0], bounds[:, 1] = fused.NEVER, fused.ALWAYS
    ones = np.ones(models, np.float32)
    return Trim(bounds, np.zeros(models, np.uint64), ones, ones)


def _election(
    operand: Operand, how: Elect, settings: Settings, trim: Trim, ops: ModuleType
) -> Election:
    options: Mapping[str, Any] = settings.options
    weights = np.array(settings.weights, np.float32)
    if how.by_energy:
        measured = summed(ops.energies(piece, trim) for piece in operand)
        energy = measured / max(1, operand.size)
        total = float(np.sum(energy))
        share = energy / total if total >= 1e-6 else np.full(len(weights), 1 / len(weights))
        return Election(np.asarray(share, np.float32), how.elect, False, 2, options["lambda"])
    return Election(
        weights,
        how.elect,
        options["vote"] == "weighted",
        DIVIDE[options["divide"]],
        options["lambda"],
    )


def _span(
    operand: Operand,
    how: Span,
    settings: Settings,
    rounding: Rounding,
    tally: Tally,
    ops: ModuleType,
) -> Iterator[tuple[int, np.ndarray]]:
    on_deltas = how.of == "deltas" or (how.of == "either" and operand.base is not None)
    if not on_deltas:
        operand = operand.without_base()
    group = _group(settings.options)
    if group and len(operand.shape) > 1:
        yield from _grouped(operand, how, settings, rounding, tally, ops, columns=group == "column")
        return
    models = len(operand.models)
    gram = np.eye(models)
    if how.measures:
        gram = summed(ops.products(piece) for piece in operand) + np.zeros((models, models))
        if not np.isfinite(gram).all():
            raise MergeError(blame(operand))
    weights = how.fn(gram, settings).astype(np.float32)
    election = Election(weights)
    for piece in operand:
        if on_deltas:
            yield piece.start, ops.elect(piece, keep_all(models), election, rounding, tally)
        else:
            yield piece.start, ops.combine(piece, weights, rounding, tally)


def _group(options: Mapping[str, Any]) -> str:
    """Of what each has its own coefficients: row, column, or '' for the tensor as a whole."""
    if options.get("filter_wise") or not options.get("nuslerp_flatten", True):
        return "column" if options.get("nuslerp_row_wise") else "row"
    return ""


def _grouped(
    operand: Operand,
    how: Span,
    settings: Settings,
    rounding: Rounding,
    tally: Tally,
    ops: ModuleType,
    *,
    columns: bool,
) -> Iterator[tuple[int, np.ndarray]]:
    """Coefficients for each row, or for each column."""

    def rows_of(piece: Slice) -> np.ndarray:
        return piece.deltas.reshape(len(operand.models), -1, operand.columns).astype(np.float64)

    coefficients = np.empty(0)
    if columns:
        gram = summed(np.einsum("irc,krc->cik", rows_of(p), rows_of(p)) for p in operand)
        coefficients = how.fn(gram, settings)  # (columns, M)
    for piece in operand:
        rows = rows_of(piece)
        if columns:
            merged = np.einsum("cm,mrc->rc", coefficients, rows)
        else:
            each = how.fn(np.einsum("irc,krc->rik", rows, rows), settings)  # (rows, M)
            merged = np.einsum("rm,mrc->rc", each, rows)
        yield piece.start, _store(piece, merged.ravel(), rounding, tally, ops)


def _matrix(
    operand: Operand,
    how: Matrix,
    settings: Settings,
    rounding: Rounding,
    tally: Tally,
    ops: ModuleType,
    statistics: Statistics,
) -> Iterator[tuple[int, np.ndarray]]:
    deltas = torch.from_numpy(np.concatenate([piece.deltas for piece in operand], 1))
    deltas = deltas.view(len(operand.models), *operand.shape)
    if not torch.isfinite(deltas).all():
        raise MergeError(blame(operand))
    if how.statistics and statistics:
        merged = how.fn(deltas, settings, statistics)
    elif how.statistics or deltas.dim() != 3:
        merged = spectral.mean(deltas, settings)
    else:
        merged = how.fn(deltas, settings, _factors(operand))
    flat = merged.reshape(-1).numpy()
    for piece in operand:
        delta = flat[piece.start : piece.start + piece.n]
        yield piece.start, _store(piece, delta, rounding, tally, ops)


def _factors(operand: Operand) -> spectral.Factors:
    """The factors of every model, where all of them are low-rank updates."""
    found = [part.factors if isinstance(part, Update) else None for part in operand.models]
    pairs = [factors() for factors in found if factors is not None]
    if len(pairs) < len(found):
        return None
    return [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs]


def _store(
    piece: Slice, delta: np.ndarray, rounding: Rounding, tally: Tally, ops: ModuleType
) -> np.ndarray:
    """base + delta, stored: through the same last step as every other method."""
    raw, kind = constant(np.asarray(delta, np.float32)).read(0, piece.n, piece.n)
    one = Slice(piece.start, piece.n, piece.base, piece.base_kind, (raw,), np.array([kind]))
    election = Election(np.ones(1, np.float32))
    return ops.elect(one, keep_all(1), election, rounding, tally)
