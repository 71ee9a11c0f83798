"""Calibrations as stages: which documents choose and which judge, and the merge that is chosen."""

from __future__ import annotations

import tempfile
from abc import ABC
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge import models, runs
from expunge.calibrate.candidate import Candidate, End
from expunge.calibrate.landscape import Landscape
from expunge.calibrate.outcome import CALIBRATION
from expunge.calibrate.reading import Material, documents_of, material
from expunge.calibrate.resident import Resident
from expunge.calibrate.run import ADAPTER, Ends, Given, calibrate, ends_of
from expunge.calibrate.section import Calibrate
from expunge.data.batches import encode_all
from expunge.data.examples import Document
from expunge.data.folds import dealt, part
from expunge.data.sets import Sets
from expunge.data.standins import original_id, stand_ins
from expunge.edit.task import Weights
from expunge.errors import CalibrationError, UnfinishedError
from expunge.evaluate.balance import balance
from expunge.evaluate.reader import Reader
from expunge.evaluate.suite import EvaluationData, evaluate
from expunge.finished import Finished
from expunge.merge.adapters import merge_adapters
from expunge.merge.section import Merge
from expunge.training import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATED = "calibrated"
"""The calibration that is meant where none is named."""

REPAIRED = 32
"""Retain items whose inputs a repair looks at, at most."""


class Calibrating(Training, ABC):
    """The part of a pipeline that chooses merges."""

    def checked(self, base: Path) -> Path:
        """The model's folder; folds that cannot be drawn, and documents that are too few for what
        is to be calibrated, are refused before anything is computed."""
        if self.splits:
            test = part(self.sets, self.judged_by, inside=True)
            for config in self.recipe.calibrate.values():
                self._with_tasks(self.chosen_by(config), config, "calibration")
                self._with_tasks(test, config, "test")
        return super().checked(base)

    def calibrated(self, name: str, seed: int) -> Weights:
        """The merge that a calibration chose; none within the floors is a `CalibrationError`."""
        done = self.calibration(name, self.recipe.calibrate[name], seed)
        if done.exists():  # a plan only names what is yet to be made
            error = self.unmet(runs.read_json(done / CALIBRATION), name, seed)
            if error is not None:
                raise error
        return Weights(self.target.base, done / ADAPTER)

    def calibration(self, name: str, config: Calibrate, seed: int) -> Path:
        """The folder of a calibration: calibration.json, and the chosen adapter if there is one."""
        branches = self._chosen_among(config, seed)
        inputs = self._calibration_inputs(branches)

        def build(work: Path) -> None:
            tokenizer = models.load_tokenizer(self.target.base)
            ends = ends_of(branches, config, self._papers_pair(seed))
            resident = self._resident(tokenizer, ends)
            side = self.chosen_by(config)

            def judge(reader: Reader) -> Mapping[str, Any]:
                seen = EvaluationData(
                    side.forget, side.retain, side.members, side.nonmembers, mmlu=self._mmlu
                )
                settings = self.recipe.evaluate.model_copy(update={"partial": True})
                return evaluate(reader, seen, settings, **self._reading)[0]

            given = self.documents(side, config, tokenizer)
            calibrate(resident, given, config, ends, work, name=name, judge=judge)

        return self.folder.stage(name, config, inputs, build)

    def calibration_stage(self, name: str, config: Calibrate, seed: int) -> str:
        """The name of the folder of a calibration, made or not."""
        inputs = self._calibration_inputs(self._chosen_among(config, seed))
        return f"{name}-{runs.stage_key(name, config, inputs)}"

    def unmet(self, found: Mapping[str, Any], name: str, seed: int) -> CalibrationError | None:
        """What to say where no candidate met the floors."""
        if found["chosen"] is not None:
            return None
        near = found["nearest"]
        which = f" --name {name}" if name != CALIBRATED else ""
        which += f" --seed {seed}" if seed != self.recipe.seeds[0] else ""
        return CalibrationError(
            f"{name} (seed {seed}): no candidate meets the floors; the nearest is point "
            f"{near['point']} ({found['points'][near['point']]['label']}), which lacks "
            f"{near['lacks']}. Lower the floors, try more trials, or take it as it is: "
            f"expunge pick {self.folder.root}{which} --point {near['point']} --out DIR"
        )

    def _calibration_inputs(self, branches: Mapping[str, Path]) -> dict[str, str]:
        inputs = {"target": self._target_key, **self.fold_inputs}
        inputs |= {f"branch-{branch}": folder.name for branch, folder in branches.items()}
        return inputs | {"evaluate": self.recipe.evaluate.model_dump_json(), **self._data_hashes}

    def write_point(
        self, config: Calibrate, seed: int, candidate: Candidate, out: Path, *, output: str
    ) -> None:
        """Write a candidate as an adapter or a whole model into the folder `out`."""
        if not candidate.parts:
            raise CalibrationError("that point is the target itself, which has no update to write")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CalibrationError(f"{out} exists and is not empty; choose another folder")
        tokenizer = models.load_tokenizer(self.target.base)
        ends = ends_of(self._chosen_among(config, seed), config, self._papers_pair(seed))
        resident = self._resident(tokenizer, ends)
        if output == "adapter":
            return resident.write(candidate, out)
        with tempfile.TemporaryDirectory() as folder:
            resident.write(candidate, Path(folder) / ADAPTER)
            plain = Merge(method="linear", space="delta", output="model")
            merge_adapters([Path(folder) / ADAPTER], plain, out, base=self.target.base)
        return None

    def between(
        self, pair: Sequence[str], seed: int, config: Landscape
    ) -> tuple[Resident, Material, tuple[End, End]]:
        """The target in memory, a sample of all documents, and two branches as ends."""
        tokenizer = models.load_tokenizer(self.target.base)
        branches = self._chosen_among(Calibrate(of=tuple(pair)), seed)
        ends = ends_of(branches, Calibrate(snapshots=0))
        limits = {"per_term": config.per_term, "documents": config.documents}
        given = self._material(self.sets, tokenizer, **limits)
        return self._resident(tokenizer, ends), given, (ends.searched[0], ends.searched[1])

    def fold_scores(self, reader: Reader, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The scores of each side's documents, of a reader that has been evaluated on both; `items`
        are the rows of that evaluation."""
        asked = {(row["half"], row["id"]) for row in items if row["score"] is not None}
        change = {"partial": True, "generate_limit": None}
        settings = self.recipe.evaluate.model_copy(update=change)
        found = {}
        for side, inside in (("calibration", False), ("test", True)):
            sets = part(self.sets, self.judged_by, inside=inside)
            halves = {
                half: [e for e in getattr(sets, half) if (half, e.id) in asked]
                for half in ("forget", "retain")
            }
            given = {"members": sets.members, "nonmembers": sets.nonmembers, "mmlu": self._mmlu}
            entry = evaluate(reader, EvaluationData(**halves, **given), settings, **self._reading)
            found[side] = {"semeval": entry[0]["semeval"], "membership": {}}
            if sets.members:
                documents = Sets([], [], sets.members, sets.nonmembers, [])
                read = self._material(documents, reader.tokenizer, seed=0)
                scores = documents_of(reader, read, Calibrate().attacks)
                found[side]["membership"] = balance(scores, resamples=settings.resamples)
        return found

    def chosen_by(self, config: Calibrate) -> Sets:
        """The documents that a calibration may look at; with stand-ins for its non-members where
        it asks for those, two for each member."""
        side = part(self.sets, self.judged_by, inside=False)
        if not side.members:
            raise CalibrationError(
                "a calibration needs members and nonmembers in data: whole documents of the "
                "forget set, and others of their kind that no model has seen"
            )
        if not config.standins:
            return side
        made = _stand_ins(side, config)
        if len(made) < self.folds.least:
            raise CalibrationError(
                f"only {len(made)} stand-ins can be made of {len(side.members)} members, and "
                f"folds.least asks for {self.folds.least}: too few facts in them to replace"
            )
        return replace(side, nonmembers=made)

    def _chosen_among(self, config: Calibrate, seed: int) -> dict[str, Path]:
        """The stage folders of the branches that a calibration chooses among."""
        names = self.recipe.calibrated_branches(config)
        made = {name: self.branch(name, seed).adapter for name in names}
        return {name: adapter.parent for name, adapter in made.items() if adapter is not None}

    def _papers_pair(self, seed: int) -> dict[str, Path] | None:
        """The stage folders of the two branches that the recipe merges as the paper does; none
        where it merges no two so, or they are not finished."""
        pair, finished = self.recipe.papers_pair, copy(self)
        finished.folder = Finished(self.folder.root)
        try:
            made = {name: finished.branch(name, seed).adapter for name in pair}
        except UnfinishedError:
            return None
        return {name: adapter.parent for name, adapter in made.items() if adapter} or None

    def check_paper(
        self, candidate: Candidate, then: Mapping[str, str], config: Calibrate, seed: int
    ) -> None:
        """Refuse the paper's merge of branches that are others than `then`, or not there; those
        that are chosen among are inputs of the calibration itself."""
        now = self._papers_pair(seed) or {}
        chosen = self.recipe.calibrated_branches(config)
        for name in (candidate.over.branch, candidate.under.branch):
            made = now[name].name if name in now else "not finished"
            if name not in chosen and made != then.get(name):
                raise CalibrationError(
                    f"that point merges the branch '{name}' as it was when it was calibrated "
                    f"({then.get(name, 'of which nothing was kept')}), and in {self.folder.root} "
                    f"it is {made}; expunge merge merges the branches of now"
                )

    @cached_property
    def _target_hash(self) -> str:
        """Stands for the content of the target's folder."""
        same = self.target.base == self.original.base
        return self.original_hash if same else runs.hash_folder(self.target.base)

    def _resident(self, tokenizer: PreTrainedTokenizerBase, ends: Ends) -> Resident:
        side = part(self.sets, self.judged_by, inside=False)
        every = max(1, len(side.retain) // REPAIRED)
        return Resident(
            self.target.base,
            ends.folders,
            key=f"{self._target_key}-{self._target_hash}",
            hashes=ends.hashes,
            dtype=self.recipe.model.dtype,
            folder=self.folder.store / "cache" / "tables",
            max_batch=self.recipe.evaluate.max_batch,
            kept=encode_all(side.retain[::every][:REPAIRED], tokenizer, **self._reading),
        )

    def documents(self, side: Sets, config: Calibrate, tokenizer: PreTrainedTokenizerBase) -> Given:
        """The documents of a calibration, encoded; `side` is what `chosen_by` gives."""

        def read(sets: Sets, **limits: Any) -> Material:
            return self._material(sets, tokenizer, seed=config.seed, **limits)

        count = self.folds.cross
        fold = dealt(self.sets, [1 / count] * count, seed=self.folds.seed)
        test = self._with_tasks(part(self.sets, self.judged_by, inside=True), config, "test")
        side = self._with_tasks(side, config, "calibration")
        unseen = self.sets.nonmembers
        if config.standins:
            unseen = [*side.nonmembers, *_stand_ins(test, config)]
            fold |= {document.id: fold[original_id(document.id)] for document in unseen}
        documents = Sets([], [], self.sets.members, unseen, [])
        shown = {"per_term": config.per_term, "by_task": config.by_task}
        return Given(
            read(side, documents=config.documents, **shown),
            read(side, **shown),
            read(test, by_task=config.by_task),
            read(documents, by_task=config.by_task),
            fold.__getitem__,
            count,
        )

    def _with_tasks(self, side: Sets, config: Calibrate, name: str) -> Sets:
        """The documents of a side, of which tasks that are balanced apart have enough."""
        counts = [Counter(document.task for document in s) for s in (side.members, side.nonmembers)]
        for task in counts[0] if config.by_task else ():
            few = min(count[task] for count in counts)
            if not task or few < self.folds.least:
                raise CalibrationError(
                    f"by_task: the {name} fold has {counts[0][task]} members and {counts[1][task]} "
                    f"nonmembers of task '{task}', and folds.least asks for {self.folds.least} of "
                    "each, all named; give more, name the task in their rows, or leave by_task out"
                )
        return side

    def _material(self, sets: Sets, tokenizer: PreTrainedTokenizerBase, **limits: Any) -> Material:
        longest = self.recipe.evaluate.document_tokens
        return material(sets, tokenizer, how=self._reading, document_tokens=longest, **limits)


def _stand_ins(side: Sets, config: Calibrate) -> list[Document]:
    """Stand-ins for non-members of a side, two for each of its members."""
    return stand_ins(side.members, count=2 * len(side.members), seed=config.seed)[0]
