"""Calibrations as stages: which documents choose and which judge, and the merge that is chosen."""

from abc import ABC
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from expunge import models, runs
from expunge.calibrate.outcome import CALIBRATION, candidate_of
from expunge.calibrate.reading import Material, material
from expunge.calibrate.resident import Resident
from expunge.calibrate.run import ADAPTER, Given, calibrate, ends_of
from expunge.calibrate.section import Calibrate
from expunge.data.batches import encode_all
from expunge.data.folds import Folds, assigned, groups_of, part, test_documents
from expunge.data.sets import Sets
from expunge.edit.task import Weights
from expunge.errors import CalibrationError
from expunge.evaluate.reader import Reader
from expunge.evaluate.suite import EvaluationData, evaluate
from expunge.memory import release_freed_memory
from expunge.merge.adapters import merge_adapters
from expunge.merge.section import Merge
from expunge.training import Training

REPAIRED = 32
"""Retain items whose inputs a repair looks at, at most."""


class Calibrating(Training, ABC):
    """The part of a pipeline that chooses merges."""

    @cached_property
    def folds(self) -> Folds:
        """How documents are split."""
        return self.recipe.folds or Folds()

    @cached_property
    def judged_by(self) -> frozenset[str]:
        """The documents that no calibration looks at until it has chosen."""
        return test_documents(self.sets, self.folds)

    def calibrated(self, name: str, seed: int) -> Weights:
        """The merge that a calibration chose; none that meets the floors is a `CalibrationError`."""
        done = self.calibration(name, self.recipe.calibrate[name], seed)
        found = runs.read_json(done / CALIBRATION)
        if found["chosen"] is None:
            near = found["nearest"]
            raise CalibrationError(
                f"{name} (seed {seed}): no candidate meets the floors; the nearest is point "
                f"{near['point']} ({found['points'][near['point']]['label']}), which lacks "
                f"{near['lacks']}. Lower calibrate.floors, try more trials, or take it as it is: "
                f"expunge pick {self.folder.root} --point {near['point']}"
            )
        return Weights(self.target.base, done / ADAPTER)

    def calibration(self, name: str, config: Calibrate, seed: int) -> Path:
        """The folder of a calibration: calibration.json, and the chosen adapter if there is one."""
        branches = self._chosen_among(config, seed)

        def build(work: Path) -> None:
            release_freed_memory()
            tokenizer = models.load_tokenizer(self.target.base)
            ends, folders, hashes = ends_of(branches, config)
            resident = self._resident(tokenizer, folders, hashes)
            side = part(self.sets, self.judged_by, inside=False)
            if not side.members:
                raise CalibrationError(
                    "a calibration needs members and nonmembers in data: whole documents of the "
                    "forget set, and others of their kind that no model has seen"
                )

            def judge(reader: Reader) -> Mapping[str, Any]:
                seen = EvaluationData(
                    side.forget, side.retain, side.members, side.nonmembers, mmlu=self._mmlu
                )
                settings = self.recipe.evaluate.model_copy(update={"partial": True})
                return evaluate(reader, seen, settings, **self._reading)[0]

            given = self._given(side, config, tokenizer)
            calibrate(resident, given, config, ends, work, name=name, judge=judge)

        inputs = {"target": self._target_key, "folds": self.folds.model_dump_json()}
        inputs |= {f"branch-{branch}": folder.name for branch, folder in branches.items()}
        inputs |= {"evaluate": self.recipe.evaluate.model_dump_json(), **self._data_hashes}
        return self.folder.stage(name, config, inputs, build)

    def pick(
        self, name: str, config: Calibrate, seed: int, number: int, out: Path, *, output: str
    ) -> Path:
        """Write a point of a calibration as an adapter or a whole model into the folder `out`."""
        found = runs.read_json(self.calibration(name, config, seed) / CALIBRATION)
        candidate = candidate_of(found, number)
        if not candidate.parts:
            raise CalibrationError(f"point {number} is the target itself, which has no update")
        if out.exists() and any(out.iterdir()):
            raise CalibrationError(f"{out} exists and is not empty; choose another folder")
        tokenizer = models.load_tokenizer(self.target.base)
        _, folders, hashes = ends_of(self._chosen_among(config, seed), config)
        resident = self._resident(tokenizer, folders, hashes)
        adapter = out if output == "adapter" else out.with_name(f".{out.name}.adapter")
        resident.write(candidate, adapter)
        if output == "model":
            plain = Merge(method="linear", space="delta", output="model")
            merge_adapters([adapter], plain, out, base=self.target.base)
            runs.remove(adapter)
        return out

    def _chosen_among(self, config: Calibrate, seed: int) -> dict[str, Path]:
        """The stage folders of the branches that a calibration chooses among."""
        names = config.of or tuple(
            n for n, b in self.recipe.branches.items() if b.training == "lora" and b.blocks is None
        )
        made = {name: self.branch(name, seed).adapter for name in names}
        return {name: adapter.parent for name, adapter in made.items() if adapter is not None}

    def _resident(
        self,
        tokenizer: PreTrainedTokenizerBase,
        folders: Mapping[str, Path],
        hashes: Mapping[str, str],
    ) -> Resident:
        side = part(self.sets, self.judged_by, inside=False)
        every = max(1, len(side.retain) // REPAIRED)
        return Resident(
            self.target.base,
            folders,
            key=self._target_key,
            hashes=hashes,
            dtype=self.recipe.model.dtype,
            folder=self.folder.store / "cache" / "tables",
            max_batch=self.recipe.evaluate.max_batch,
            kept=encode_all(side.retain[::every][:REPAIRED], tokenizer, **self._reading),
        )

    def _given(self, side: Sets, config: Calibrate, tokenizer: PreTrainedTokenizerBase) -> Given:
        """The documents of a calibration, encoded."""

        def read(sets: Sets, **limits: Any) -> Material:
            how = {"how": self._reading, "document_tokens": self.recipe.evaluate.document_tokens}
            return material(sets, tokenizer, seed=config.seed, **how, **limits)

        count = self.folds.cross
        dealt = assigned(groups_of(self.sets), [1 / count] * count, seed=self.folds.seed)
        documents = Sets([], [], self.sets.members, self.sets.nonmembers, [])
        return Given(
            read(side, per_term=config.per_term, documents=config.documents),
            read(part(self.sets, self.judged_by, inside=True)),
            read(documents),
            dealt.__getitem__,
            count,
        )
