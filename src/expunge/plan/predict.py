"""A plan: the seconds and the memory of each stage of a recipe on this machine, foretold."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge import models, parallel, runs
from expunge.edit.section import Edit
from expunge.evaluate.reader import PACK_TOKENS
from expunge.evaluate.revival import relearn_demand
from expunge.heads import BLOCK
from expunge.merge.section import Merge
from expunge.pipeline import Pipeline
from expunge.plan.calibrations import calibrating
from expunge.plan.folder import Seen, mark_of
from expunge.plan.pace import Pace
from expunge.plan.rates import Rates, measure
from expunge.plan.relearning import relearning
from expunge.plan.settings import Settings, machine, settings_of
from expunge.plan.work import (
    Encoded,
    Reading,
    Training,
    levelling,
    reading,
    relevelling,
    survey,
    tuning,
    unlearning,
    watching,
    writing,
)
from expunge.recipe import Recipe
from expunge.unlearn.footprint import BYTES, PROCESS, Demand, Shape, memory_of
from expunge.unlearn.preparing import branch_demand
from expunge.unlearn.section import Branch
from expunge.unlearn.trainer import RELEASE_EVERY
from expunge.unlearn.tune import tune_demand

FILE = "plan.json"

OVERHEAD = 0.7
"""Seconds of a stage that nothing below accounts for: provenance, bootstrap draws, the report."""


@dataclass(frozen=True)
class Prediction:
    """One stage. `seconds` is training and all that is not training, `fixed`."""

    stage: str
    seed: int | None
    key: str
    seconds: float
    fixed: float
    """Loading, reference scores, writing: what no budget can shorten."""
    steps: int
    memory_bytes: int
    how: str

    @property
    def label(self) -> tuple[str, int | None]:
        """What names it among the stages."""
        return self.stage, self.seed

    @property
    def training(self) -> float:
        """Seconds in the loop."""
        return self.seconds - self.fixed

    @property
    def least(self) -> float:
        """Seconds with one step of training."""
        return self.fixed + (self.training / self.steps if self.steps else 0.0)


@dataclass(frozen=True)
class Plan:
    """All stages in the order of a run, what the machine has, and the settings that fit."""

    recipe: str
    machine: dict[str, Any]
    stages: list[Prediction]
    settings: list[Settings]
    budget: float | None = None

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def least(self) -> float:
        """Of all stages, with one step of training each."""
        return sum(stage.least for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        totals = {"total_seconds": self.seconds, "least_seconds": self.least}
        return {**asdict(self), **totals}


def plan(recipe: Recipe, out: Path | None = None, *, budget: float | None = None) -> Plan:
    """Foretell a run of `recipe` into `out`, where what is finished counts nothing.

    The run folder is only read. With a `budget` (in seconds) the stages that it shortened before
    are finished too.
    """
    parallel.refuse_several("a plan")
    with tempfile.TemporaryDirectory(prefix=".expunge-plan-") as scratch:
        found = survey(recipe, out, Path(scratch) / "survey", mark_of(budget))
        pipeline = Pipeline(recipe, Path(scratch) / "survey", found)
        wanted = [stage.name for stage in found.seen if not stage.finished]
        where = next((p for p in (out, *(out.parents if out else ())) if p and p.is_dir()), None)
        rates, data = measure(pipeline, wanted, where or Path(scratch))
        tokenizer = models.load_tokenizer(pipeline.original.base)
        demands = demands_of(recipe, data)
        foretell = _Foreteller(pipeline, rates, data, demands)
        stages = [foretell.stage(seen, tokenizer) for seen in found.seen]
    settings = settings_of(demands, rates)
    return Plan(recipe.name, machine(), stages, settings, budget)


def demands_of(recipe: Recipe, data: Encoded) -> dict[str, Demand]:
    """What each training stage asks of memory; a branch as for the first seed."""
    found = {}
    if recipe.tune is not None:
        items = [*data.forget, *data.retain]
        found["target"] = tune_demand(recipe.tune, items, data.neutral)
    held = {"weights": recipe.model.dtype, "quantized": recipe.model.quantize is not None}
    for name, branch in recipe.branches.items():
        halves = data.halves(name, Path())
        found[name] = branch_demand(branch, halves, seed=recipe.seeds[0], **held)
    return found


class _Foreteller:
    """Predictions of stages, one after another: what is cached by one is free for the next."""

    def __init__(
        self, pipeline: Pipeline, rates: Rates, data: Encoded, demands: dict[str, Demand]
    ) -> None:
        self.pipeline, self.recipe = pipeline, pipeline.recipe
        self.rates, self.data, self.demands = rates, data, demands
        self.referenced: set[int] = set()

    def stage(self, seen: Seen, tokenizer: Any) -> Prediction:
        """What one stage will take."""
        key = seen.folder.name.rpartition("-")[2]
        if seen.finished:
            return Prediction(seen.name, seen.seed, key, 0.0, 0.0, 0, 0, "finished")
        recipe, name = self.recipe, seen.name
        if name in recipe.guards:
            how = "files; a search of eco's strength is not foretold"
            return Prediction(name, seen.seed, key, OVERHEAD, OVERHEAD, 0, PROCESS, how)
        if name in recipe.merges:
            fixed, memory, how = self._merge(recipe.merges[name], name)
            return Prediction(name, seen.seed, key, fixed, fixed, 0, memory, how)
        if name in recipe.edits:
            fixed, memory, how = self._edit(recipe.edits[name], recipe.adapters[name])
            return Prediction(name, seen.seed, key, fixed, fixed, 0, memory, how)
        if name in recipe.calibrate:
            work = calibrating(recipe.calibrate[name], self.pipeline, self.data, tokenizer)
            fixed, memory, how = self._evaluate(work, adapted=True)
            return Prediction(name, seen.seed, key, fixed, fixed, 0, memory, how)
        if name.startswith("evaluate-"):
            model = name.removeprefix("evaluate-")
            work = reading(model, self.pipeline, self.data, tokenizer)
            adapted = self.recipe.adapters.get(model, False)
            fixed, memory, how = self._evaluate(work, adapted=adapted)
            return Prediction(name, seen.seed, key, fixed, fixed, 0, memory, how)
        if name.startswith("relearn-"):
            fixed, memory, how = self._relearn()
            return Prediction(name, seen.seed, key, fixed, fixed, 0, memory, how)
        if name == "alternates" and name not in recipe.branches:
            works = [writing(b, self.data) for b in recipe.branches.values() if b.reads_alternates]
            work = max(works, key=lambda one: sum(one.written))
            fixed, memory, how = self._evaluate(work)
            return Prediction(name, seen.seed, key, fixed, fixed, 0, memory, how)
        if name == "levels" and name not in recipe.branches:
            work = Reading(levelling(recipe, self.data), (0,), 0)
            fixed, memory, how = self._evaluate(work)
            return Prediction(name, seen.seed, key, fixed, fixed, 0, memory, how)
        ends = between = 0.0
        if name == "target":
            assert recipe.tune is not None
            work, full, again = tuning(recipe.tune, self.data), True, 0
        else:
            branch = recipe.branches[name]
            work = unlearning(branch, self.data.halves(name, Path()), seen.seed or 0)
            full = branch.training == "full"
            again = relevelling(branch, self.data.by(name), work.steps)
            ends, between = self._watching(name, branch, work.steps, tokenizer)
        fixed = self._fixed(name, work, full) + ends
        training = between + self.rates.token[name] * work.tokens + self.rates.adapted.read * again
        training += self.rates.release * (work.steps // RELEASE_EVERY)
        memory = memory_of(self.rates.shape, self.demands[name], scale=self.rates.scale[name])
        speed = 1 / self.rates.token[name]
        how = f"{work.steps} steps, {work.tokens} tokens, {speed:.0f} a second"
        if name == "target" and recipe.tune and recipe.tune.stop_nll:
            how += ", at most"
        seconds = fixed + training
        return Prediction(name, seen.seed, key, seconds, fixed, work.steps, memory, how)

    def _fixed(self, name: str, work: Training, full: bool) -> float:
        """Loading, the reference pass where no stage before has done it, writing the weights."""
        rates, demand = self.rates, self.demands[name]
        trained = rates.shape.parameters if full else rates.shape.adapter(demand.rank or 1)
        once = hash((full, demand.kl, work.reference_tokens))
        reference = 0.0 if once in self.referenced else work.reference_tokens * rates.plain.read
        self.referenced.add(once)
        how = self.recipe.model
        load = rates.load["float32" if full else how.quantize or how.dtype]
        return OVERHEAD + load + reference + 4 * trained * rates.written

    def _watching(
        self, name: str, branch: Branch, steps: int, tokenizer: Any
    ) -> tuple[float, float]:
        """Seconds of the evaluations while a branch trains, if nothing ends it before: of those at
        its ends, which no budget leaves out, and of those between."""
        watch, rates = branch.watch, self.rates
        if watch is None:
            return 0.0, 0.0
        each = watching(watch, self.data.by(name)) * rates.plain.read
        if watch.read == "evaluation":
            work = reading(name, self.pipeline, self.data, tokenizer)
            each += self._seconds(work, rates.adapted if branch.training == "lora" else rates.plain)
        looks = watch.looks(steps)
        ends = (0,) if watch.until is None else (0, steps)
        outer = sum(step in ends for step in looks)
        return outer * each, (len(looks) - outer) * each

    def _seconds(self, work: Reading, pace: Pace) -> float:
        """What is read and written, without loading the model that does it."""
        rows = self.recipe.evaluate.max_batch
        steps = max([*work.written[:1], sum(work.written) // rows])
        return work.read * pace.read + pace.step * steps + pace.row * sum(work.written)

    def _relearn(self) -> tuple[float, int, str]:
        recipe, rates, sets = self.recipe, self.rates, self.pipeline.sets
        assert recipe.relearn is not None
        lengths = [len(document.tokens) for document in self.data.documents]
        count = len(sets.members)
        work = relearning(recipe.relearn, lengths[:count], lengths[count:][: len(sets.nonmembers)])
        demand = relearn_demand(recipe.relearn, lengths[:count], recipe.model.dtype)
        seconds = OVERHEAD + rates.load[recipe.model.dtype] + work.forwards * rates.plain.read
        how = f"{work.steps} steps, {work.trained} tokens, backward at twice the time of reading"
        return seconds, memory_of(rates.shape, demand), how

    def _merge(self, config: Merge, name: str) -> tuple[float, int, str]:
        rates, shape = self.rates, self.rates.shape
        size = shape.parameters * 4 if config.output == "model" else 0
        seconds = OVERHEAD + rates.merge[name] + size * rates.written
        how = f"{shape.layers} blocks, {size / 1e9:.1f} GB written"
        return seconds, PROCESS + 2 * size, how

    def _edit(self, config: Edit, adapter: bool) -> tuple[float, int, str]:
        """At most: each item read as often as the method may, and what it writes."""
        rates, shape, data = self.rates, self.rates.shape, self.data
        texts = {"forget": data.forget, "retain": data.retain}
        read = sum(len(text.tokens) for half in config.row.sets for text in texts[half])
        told = dict(config.settings)
        passes = told["targets"] * shape.layers if "targets" in told else told.get("steps", 1)
        size = 0 if adapter else shape.parameters * 4
        load = rates.load[self.recipe.model.dtype] if read else 0.0
        seconds = OVERHEAD + load + passes * read * rates.plain.read + size * rates.written
        held = 2 * shape.parameters * 4 if read else 0
        return seconds, PROCESS + held + size, f"{passes * read} tokens read, at most"

    def _evaluate(self, work: Reading, *, adapted: bool = False) -> tuple[float, int, str]:
        recipe, rates = self.recipe, self.rates
        rows = recipe.evaluate.max_batch
        # A model of the run is hashed once for its tables, and loaded.
        size = rates.shape.parameters * 4
        fixed = OVERHEAD + rates.load[recipe.model.dtype] + size * rates.hashed
        seconds = fixed + self._seconds(work, rates.adapted if adapted else rates.plain)
        how = f"{work.read} tokens read, {sum(work.written)} written, at most"
        longest = work.longest + max(recipe.evaluate.max_new_tokens, *work.written[:1])
        memory = _reading_memory(rates.shape, BYTES[recipe.model.dtype], rows, longest, work.read)
        return seconds, memory, how


def _reading_memory(shape: Shape, width: int, rows: int, longest: int, read: int) -> int:
    """Bytes at the peak of an evaluation: weights, the cache of live rows, a pack, its logits."""
    pack = min(PACK_TOKENS, read)
    cache = (rows * longest + pack) * shape.layers * 2 * shape.keys * width
    passing = pack * (3 * shape.between * width + 4 * shape.width * 4)
    logits = max(rows, min(BLOCK, pack)) * shape.vocabulary * (width + 12)
    return PROCESS + shape.parameters * (width + 4) + cache + passing + logits


def write_plan(made: Plan, out: Path) -> None:
    """Write plan.json into a run folder, which is created for the recipe."""
    runs.Run(out, owner=made.recipe)
    runs.write_json(out / FILE, made.as_json())
