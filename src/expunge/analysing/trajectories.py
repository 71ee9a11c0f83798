"""The analysis `trajectories` of a run: what its branches were on the way."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from expunge import runs
from expunge.analyse.likelihoods import kl_to_target, likelihoods
from expunge.analyse.trajectories import Course, trajectory_tables
from expunge.analysing.kept import Analysis, Look
from expunge.analysing.looked import Looked, json_lines
from expunge.config import Section
from expunge.data.batches import encode
from expunge.edit.task import Weights
from expunge.evaluate.reader import PACK_TOKENS, Reader, open_reader
from expunge.evaluate.suite import Evaluate, evaluate
from expunge.lora import adapters_of
from expunge.packs import has_logits_of_its_own
from expunge.unlearn.reference import Asked, cached_reference
from expunge.unlearn.schedule import epoch_ends, phases
from expunge.unlearn.watch import EVALUATIONS


class Measure(Section):
    """What is measured of a snapshot."""

    evaluate: Evaluate
    """How thoroughly."""

    generations: bool = False
    """Whether it writes as well."""

    kl: bool = Field(default=True)
    """Whether its distance to the target is measured, which a whole model's is not."""


def analyse_trajectories(looked: Looked, seed: int, look: Look) -> Analysis:
    """Each branch over steps and epochs: its log, its evaluations, its snapshots."""
    done = looked.done(seed)
    if "target" not in done:
        raise looked.nothing("its target is not made")
    branches = [n for n, b in looked.recipe.branches.items() if b.blocks is None]
    begun = [name for name in branches if looked.branch_folder(name, seed) is not None]
    if not begun:
        raise looked.nothing("no branch has been trained")
    start = measured(looked, "target", looked.target, look)
    courses = [_course(looked, name, seed, look, start) for name in begun]
    about = {
        "models": begun,
        "unfinished": [name for name in branches if name not in done],
        "settings": _measure(looked, look, kl=True).model_dump(mode="json"),
    }
    return Analysis("trajectories", about, trajectory_tables(courses))


def _course(looked: Looked, name: str, seed: int, look: Look, start: Mapping[str, Any]) -> Course:
    folder, branch = looked.branch_folder(name, seed), looked.recipe.branches[name]
    assert folder is not None
    ids = [example.id for example in looked.sets.forget]
    planned = phases(branch.schedule, ids, len(looked.sets.retain), seed=seed)
    target = looked.target.base
    kept = {
        step: measured(looked, name, Weights(target, adapter), look)
        for step, adapter in looked.snapshots(name, seed).items()
    }
    log, final = looked.steps(name, seed), looked.done(seed).get(name)
    return Course(
        name,
        epoch_ends(planned),
        log,
        json_lines(folder / EVALUATIONS),
        {0: start, **kept},
        measured(looked, name, final, look) if final and len(log) not in kept else None,
    )


def measured(looked: Looked, name: str, weights: Weights, look: Look) -> dict[str, Any]:
    """What was measured of some weights, as a stage of the run: found, or measured now."""
    is_whole = weights.base != looked.target.base
    config = _measure(looked, look, kl=not is_whole)

    def build(work: Path) -> None:
        reader = open_reader(
            weights.base,
            weights.adapter,
            dtype=looked.recipe.model.dtype,
            folder=looked.folder.store / "cache" / "tables",
            max_batch=config.evaluate.max_batch,
        )
        runs.write_json(work / "measured.json", _measured(looked, reader, config))

    inputs = {**looked.keys({"model": weights}), **looked.data_keys}
    done = looked.builder.stage(f"trajectory-{name}", config, inputs, build, together=True)
    return runs.read_json(done / "measured.json")


def _measured(looked: Looked, reader: Reader, config: Measure) -> dict[str, Any]:
    told = looked.evaluated, config.evaluate
    found = likelihoods(reader, *told, looked.reading)
    if config.kl:
        found["kl"] = _kl(looked, reader)
    if config.generations:
        found = {**evaluate(reader, *told, **looked.reading)[0], **found}
    return found


def _kl(looked: Looked, reader: Reader) -> float | None:
    """KL to the target on the retain answers; the target is the same model, its adapter off."""
    model = reader.model
    if not adapters_of(model):
        return 0.0
    if has_logits_of_its_own(model) or not looked.sets.retain:
        return None
    sequences = [encode(e, reader.tokenizer, **looked.reading) for e in looked.sets.retain]
    asked = Asked(states=True)
    name = f"{looked.target_key}-{looked.recipe.model.dtype}-retain-answer{asked.label(False)}"
    file = looked.folder.store / "cache" / f"{name}.safetensors"
    reference = cached_reference(
        model, sequences, "answer", file=file, max_tokens=PACK_TOKENS, asked=asked
    )
    assert reference.states is not None
    return kl_to_target(model, sequences, reference.states)


def _measure(looked: Looked, look: Look, *, kl: bool) -> Measure:
    """MMLU is left out: it would cost more than all else."""
    given = looked.recipe.evaluate
    limit = look.generate_limit or given.generate_limit
    config = given.model_copy(update={"mmlu": None, "generate_limit": limit})
    return Measure(evaluate=config, generations=look.generations, kl=kl)
