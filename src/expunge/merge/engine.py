"""Stream a merge to disk: one tensor, or one slice of it, in memory at a time.

Dimensions: M models, n numbers of a slice.
"""

import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

import expunge
from expunge.errors import MergeError
from expunge.memory import imports_set_aside, keep_freed_memory
from expunge.merge.bounds import find_bounds
from expunge.merge.families import Elect, Method
from expunge.merge.fused import Rounding, Tally
from expunge.merge.operands import KINDS, Operand, blame
from expunge.merge.shards import SHARD_BYTES, Planned, ShardWriter, grouped, model_folder
from expunge.merge.survival import Survival
from expunge.merge.tensor import Statistics, merge_operand, operations
from expunge.merge.trim import Settings, counts_of
from expunge.progress import progress

Bounds = dict[str, np.ndarray]
"""For trims over the model as a whole: the bounds of each tensor by name."""


@dataclass(frozen=True)
class Job:
    """One tensor of the output: merged from an operand, or carried over as it is."""

    name: str
    dtype: str
    """As safetensors writes it."""

    shape: tuple[int, ...]
    operand: Operand | None = None
    method: Method | None = None
    settings: Settings | None = None
    statistics: Statistics = None
    carried: np.ndarray | None = None
    """The bytes, where nothing is merged."""

    @property
    def planned(self) -> Planned:
        """What the writer needs to know."""
        return Planned(self.name, self.dtype, self.shape)

    def map_in(self) -> None:
        """Have what is read at hand: done while the tensor before is merged."""
        if self.operand is not None:
            self.operand.map_in()


@dataclass
class Report:
    """What a merge did."""

    tensors: int = 0
    merged: int = 0
    parameters: int = 0
    resumed: int = 0
    """Tensors that a killed merge had already written."""

    seconds: float = 0.0
    bytes_written: int = 0
    peak_rss_bytes: int = 0
    storage_survival: float | None = None
    """Share of the weights with a delta whose stored value differs from the base's."""

    survival_int8: float | None = None
    survival_int4: float | None = None


def merge_to_folder(
    jobs: Sequence[Job],
    out: Path,
    companions: Callable[[Path], None],
    *,
    description: str = "",
    shard_bytes: int = SHARD_BYTES,
    stochastic: bool = False,
    ops: ModuleType | None = None,
    elsewhere: Callable[[Path, Bounds], None] | None = None,
) -> Report:
    """Write the model folder `out`: the tensors of `jobs`, and what `companions` puts beside them.

    `description` stands for all that decides the bytes: a killed merge of the same description is
    gone on with. Overflow and NaN are a `MergeError` that names the tensor. `elsewhere` has other
    processes write shards of the folder by `write_shard` first; what they leave is done here.
    """
    begin = time.monotonic()
    keep_freed_memory()
    ops = ops or operations()
    plan = [asdict(job.planned) for job in jobs]
    text = json.dumps([expunge.__version__, description, plan, shard_bytes, stochastic])
    identity = hashlib.sha256(text.encode()).hexdigest()
    report, survival = Report(), Survival()
    with imports_set_aside(), model_folder(out, identity) as folder:
        writer = ShardWriter(folder, [job.planned for job in jobs], shard_bytes)
        try:
            bounds = model_bounds(jobs, ops)
            report.resumed = len(writer.done)
            if elsewhere is not None:
                elsewhere(folder, bounds)
                writer.read_journals()
            for job, note in _written(jobs, writer, bounds, stochastic, ops):
                survival.take(note)
                report.bytes_written += job.planned.nbytes
                report.tensors += 1
                report.merged += job.operand is not None
                report.parameters += int(np.prod(job.shape, dtype=np.int64))
        finally:
            writer.close()
        companions(folder)
    report.storage_survival, report.survival_int8, report.survival_int4 = survival.shares()
    report.seconds = round(time.monotonic() - begin, 2)
    report.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report


def write_shard(
    jobs: Sequence[Job],
    folder: Path,
    number: int,
    *,
    shard_bytes: int,
    stochastic: bool,
    bounds: Bounds,
) -> None:
    """Write one shard of a folder that `merge_to_folder` has begun, which seals it in the end."""
    keep_freed_memory()
    planned = [job.planned for job in jobs]
    names = {tensor.name for tensor in grouped(planned, shard_bytes)[number]}
    writer = ShardWriter(folder, planned, shard_bytes, only=number)
    try:
        own = [job for job in jobs if job.name in names]
        for _ in _written(own, writer, bounds, stochastic, operations()):
            pass
    finally:
        writer.close()


def _written(
    jobs: Sequence[Job], writer: ShardWriter, bounds: Bounds, stochastic: bool, ops: ModuleType
) -> Iterator[tuple[Job, list[int]]]:
    """Each job once its tensor is written, with what survived of its edit."""
    total = sum(job.planned.nbytes for job in jobs) // 10**6
    with ThreadPoolExecutor(1) as ahead, progress("merge", total, "MB") as bar:
        for number, job in enumerate(jobs):
            for near in jobs[number + (number > 0) : number + 2]:
                ahead.submit(near.map_in)
            note = writer.done.get(job.name)
            if note is None:
                note = _merge_job(job, writer, stochastic, ops, bounds.get(job.name))
            yield job, note
            bar(job.planned.nbytes / 1e6)


def model_bounds(jobs: Sequence[Job], ops: ModuleType) -> Bounds:
    """For trims over the model as a whole: the bounds of each tensor by name."""
    whole = [job for job in jobs if job.settings and job.settings.options.get("trim") == "model"]
    if not whole:
        return {}
    first = whole[0]
    assert first.method is not None and first.settings is not None
    how, options = first.method.how, first.settings.options
    assert isinstance(how, Elect)
    for job in whole:
        if job.settings and job.settings.options["density"] != options["density"]:
            raise MergeError("trim: model needs one density for all tensors of a model")
    operands = [job.operand for job in whole if job.operand is not None]
    size = sum(operand.size for operand in operands)
    gammas = options.get("gamma", (0.0,) * len(options["density"]))
    counts = [
        counts_of(how.keep, density, size, gamma)
        for density, gamma in zip(options["density"], gammas, strict=True)
    ]
    found = find_bounds(operands, counts, ops)
    return {job.name: bounds for job, bounds in zip(whole, found, strict=True)}


def _merge_job(
    job: Job,
    writer: ShardWriter,
    stochastic: bool,
    ops: ModuleType,
    bounds: np.ndarray | None,
) -> list[int]:
    """Write one tensor; what survived of its edit, for the journal."""
    if job.operand is None or job.method is None or job.settings is None:
        assert job.carried is not None
        writer.write(job.name, 0, job.carried)
        writer.finished(job.name, [])
        return []
    rounding = Rounding(KINDS[job.dtype], stochastic, job.settings.key("rounding"))
    tally, survival = Tally(), Survival()
    merged = merge_operand(
        job.operand,
        job.method,
        job.settings,
        rounding,
        tally,
        ops=ops,
        bounds=bounds,
        statistics=job.statistics,
    )
    for start, raw in merged:
        if tally.bad:
            raise MergeError(f"{blame(job.operand)} (stored as {job.dtype})")
        survival.sample(job.operand, start, raw, rounding.kind)
        writer.write(job.name, start * rounding.itemsize, raw)
    survival.moved, survival.changed = tally.moved, tally.changed
    note = survival.note()
    writer.finished(job.name, note)
    return note
