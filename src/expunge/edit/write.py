"""Write what an edit has made: a model folder, tensors streamed, and what undoes it."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from expunge.disk import safetensors_errors
from expunge.errors import EditError, ModelError
from expunge.merge.checkpoint import FLOATS, Stored, map_file, read_header
from expunge.merge.companions import copy_companions
from expunge.merge.engine import Job, merge_to_folder
from expunge.merge.methods import METHODS
from expunge.merge.operands import KINDS, Operand, Part, Whole, decode
from expunge.merge.options import resolved
from expunge.merge.sources import Source
from expunge.merge.trim import Settings
from expunge.models import DTYPES

UNDO = Path("undo") / "edit.safetensors"
"""Within a model folder: columns that were changed and what they held. (Beside the weights, some
readers would take it for more of them.)"""

_ROW = METHODS["task_arithmetic"]


def summed_job(name: str, stored: Stored, base: Whole, update: Part) -> Job:
    """A tensor of base + update, streamed."""
    operand = Operand(name, stored.shape, base, [update])
    options = resolved("task_arithmetic", _ROW, {}, 1, where=name)
    settings = Settings(name, (1.0,), options, 0)
    return Job(name, stored.dtype, stored.shape, operand, _ROW, settings)


def plain_job(source: Source, name: str) -> Job:
    """A tensor of a model as it is: carried over, or with its adapter's update."""
    stored, part = source.checkpoint[name], source.part(name, source)
    whole = Whole(source.checkpoint.raw(name), stored.dtype, str(stored.file))
    if isinstance(part, Whole):
        return Job(name, stored.dtype, stored.shape, carried=whole.raw)
    return summed_job(name, stored, whole, part)


def write_edited(
    source: Source,
    changed: Mapping[str, Tensor],
    out: Path,
    undo: Mapping[str, list[int]] | None = None,
) -> dict[str, Any]:
    """Write a model with some tensors replaced (float32, whole); `undo` names changed columns.

    Returns how many tensors and numbers were changed, by how much (Frobenius), and which share of
    the changed numbers differs once stored.
    """
    jobs, digest = [], hashlib.sha256()
    kept: dict[str, Tensor] = {}
    moved = survived = 0
    square = 0.0
    missing = sorted(changed.keys() - source.checkpoint.keys())
    if missing:
        raise EditError(f"{source.name} stores no {missing[0]}, which the loaded model has")
    for name in source.checkpoint:
        stored = source.checkpoint[name]
        if name not in changed:
            jobs.append(plain_job(source, name))
            continue
        before = tensor_of(source, name)
        after = changed[name].float().cpu()
        if not torch.isfinite(after).all():
            raise EditError(f"the edit makes {name} infinite or NaN; choose milder options")
        old, new = (t.to(DTYPES[FLOATS[stored.dtype]]) for t in (before, after))  # pyright: ignore
        moved += int((before != after).sum())
        survived += int(((before != after) & (old != new)).sum())
        square += float((after - before).double().square().sum())
        raw = new.contiguous().view(torch.uint8).reshape(-1).numpy()
        digest.update(raw.data)
        jobs.append(Job(name, stored.dtype, stored.shape, carried=raw))
        for column in (undo or {}).get(name, ()):
            kept[f"{name}:{column}"] = old[:, column].clone()

    def companions(folder: Path) -> None:
        copy_companions(source.checkpoint.folder, folder)
        if undo is not None:
            (folder / UNDO).parent.mkdir(exist_ok=True)
            with safetensors_errors():
                save_file(kept, folder / UNDO)

    description = f"edit {source.fingerprint()}{digest.hexdigest()}"
    merge_to_folder(jobs, out, companions, description=description)
    return {
        "tensors": sorted(changed),
        "changed": moved,
        "norm": square**0.5,
        "storage_survival": survived / moved if moved else None,
    }


def write_jobs(
    source: Source, out: Path, job: Callable[[str], Job | None], description: str
) -> dict[str, Any]:
    """Write a model whose tensors are `job`'s, or as they are where it gives none."""
    jobs, changed = [], []
    for name in source.checkpoint:
        made = job(name)
        changed += [name] if made is not None else []
        jobs.append(made or plain_job(source, name))
    report = merge_to_folder(
        jobs,
        out,
        lambda folder: copy_companions(source.checkpoint.folder, folder),
        description=f"{description}{source.fingerprint()}",
    )
    return {"tensors": changed, "storage_survival": report.storage_survival}


def tensor_of(source: Source, name: str) -> Tensor:
    """A tensor of a model, its adapter's update added, in float32."""
    stored = source.checkpoint[name]
    if stored.dtype not in KINDS:
        raise EditError(f"{source.name}: {name} is {stored.dtype}, not a plain float")
    raw, kind = source.part(name, None).read(0, stored.size, stored.shape[-1])
    return torch.from_numpy(decode(raw, kind).reshape(stored.shape).copy())


def delta_rows(one: Part, base: Whole, columns: int) -> Callable[[int, int], Tensor]:
    """(first row, last row) → what `one` has beyond the base: (rows, columns) float32."""

    def rows(first: int, last: int) -> Tensor:
        low, high = first * columns, last * columns
        raw, kind = one.read(low, high, columns)
        found = decode(raw, kind)
        if isinstance(one, Whole) or one.whole:
            raw, kind = base.read(low, high, columns)
            found = found - decode(raw, kind)
        return torch.from_numpy(found.copy()).view(-1, columns)

    return rows


def read_undo(folder: Path) -> dict[str, dict[int, Tensor]]:
    """By tensor, what each changed column held before the edit, as it was stored."""
    path = folder / UNDO
    if not path.is_file():
        raise EditError(f"{folder} holds no {UNDO}: only edits of columns can be taken back")
    raw, found = map_file(path), {}
    for key, stored in read_header(path).items():
        name, _, column = key.rpartition(":")
        if stored.dtype not in FLOATS or len(stored.shape) != 1 or not column.isdecimal():
            raise ModelError(f"{path}: {key} is not a column of floats")
        held = decode(raw[stored.offset : stored.offset + stored.nbytes], KINDS[stored.dtype])
        found.setdefault(name, {})[int(column)] = torch.from_numpy(held.copy())
    return found
