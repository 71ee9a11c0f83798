"""Merge models as a merge file says: what `expunge merge CONFIG OUT` does."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from expunge import parallel, provenance, runs
from expunge.cells import Cell, Workers
from expunge.errors import MergeError
from expunge.merge.as_adapter import merge_to_adapter
from expunge.merge.card import merge_card
from expunge.merge.companions import copy_companions, take_ids
from expunge.merge.compat import MergeFile, read_merge_file
from expunge.merge.engine import Bounds, merge_to_folder, write_shard
from expunge.merge.plan import Plan
from expunge.merge.shards import SHARD_BYTES, grouped
from expunge.merge.vocabulary import chat_template, vocabulary, write_tokenizer
from expunge.models import load_tokenizer
from expunge.on_ray import do_on_ray


def merge_models(
    config: MergeFile | Path | str,
    out: Path | str,
    *,
    shard_bytes: int = SHARD_BYTES,
    stochastic: bool = False,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Write the merge that `config` describes to the folder `out`; report on it.

    The report is that of merge.engine.Report, or of merge.adapters.merge_adapters where the output
    is an adapter; it is also written to `out/merge.json`, and the file itself to `out/merge.yaml`.
    `stochastic` rounds at random, in proportion, instead of to the nearest even. With `workers`,
    each shard of the output is written by one of them.
    """
    parallel.refuse_several("the merge of a file")
    file = config if isinstance(config, MergeFile) else read_merge_file(Path(config))
    out = Path(out)
    plan = Plan(file)
    if file.output == "adapter":
        if workers is not None:
            raise MergeError("an adapter is merged by one process: leave --ray out")
        made = merge_to_adapter(plan, out)
        _leave_trace(out, file, made)
        return made
    words = vocabulary(plan)
    changes = plan.config_changes()
    if words is not None:
        changes["vocab_size"] = words.rows
    template = chat_template(file, plan.sources)

    def companions(folder: Path) -> None:
        donor = plan.donor.checkpoint.folder
        copy_companions(donor, folder, changes, tokenizer=words is None)
        if words is not None:
            take_ids(folder, words.source.checkpoint.folder)
            write_tokenizer(words.tokenizer, template)(folder)
        elif template is not None:
            write_tokenizer(load_tokenizer(donor), template)(folder)

    jobs = plan.jobs(words)

    def elsewhere(folder: Path, bounds: Bounds) -> None:
        assert workers is not None
        shards = grouped([job.planned for job in jobs], shard_bytes)
        cells = []
        for number, shard in enumerate(shards):
            own = {tensor.name: bounds[tensor.name] for tensor in shard if tensor.name in bounds}
            work = Shard(file, folder.absolute(), number, shard_bytes, stochastic, own)
            cells.append(Cell(f"shard-{number + 1}-of-{len(shards)}", (), work))
        do_on_ray(cells, do_shard, workers)

    report = merge_to_folder(
        jobs,
        out,
        companions,
        description=plan.description(),
        shard_bytes=shard_bytes,
        stochastic=stochastic,
        elsewhere=elsewhere if workers else None,
    )
    made = asdict(report)
    _leave_trace(out, file, made)
    return made


@dataclass(frozen=True)
class Shard:
    """A shard of a merge, as another machine can take it up."""

    file: MergeFile
    folder: Path
    """Where the merge is built."""

    number: int
    shard_bytes: int
    stochastic: bool
    bounds: Bounds


def do_shard(shard: Shard) -> None:
    """Write a shard in a worker, which finds the folder where the driver began it."""
    if not shard.folder.is_dir():
        raise MergeError(
            f"a worker cannot see {shard.folder}; it must lie on a file system that every node "
            "shares"
        )
    plan = Plan(shard.file)
    write_shard(
        plan.jobs(vocabulary(plan)),
        shard.folder,
        shard.number,
        shard_bytes=shard.shard_bytes,
        stochastic=shard.stochastic,
        bounds=shard.bounds,
    )


def plan_of(path: Path) -> Plan:
    """What the merge file at `path` means, its models opened and checked."""
    return Plan(read_merge_file(path))


def _leave_trace(out: Path, file: MergeFile, report: dict[str, Any]) -> None:
    fields = file.model_dump(mode="json", exclude_defaults=True)
    runs.write_json(out / "merge.json", {**report, "provenance": provenance.provenance()})
    runs.write_text(out / "merge.yaml", yaml.safe_dump(fields, sort_keys=False))
    runs.write_text(out / runs.CARD, merge_card(file, out.resolve().name))
