"""The data of a recipe as its stages take them: sets, questions, token sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge import models, runs
from expunge.calibrate.section import Calibrate
from expunge.companions.levels import UnseenLevels, check_vocabulary
from expunge.companions.making import Making, companion_sets
from expunge.data.batches import TokenSequence, encode_all
from expunge.data.companions import Answers
from expunge.data.examples import Example
from expunge.data.folds import Folds, given_ids, part, test_documents
from expunge.data.sets import Data, Sets, read_sets, written_sets
from expunge.data.sources import locate
from expunge.data.synthetic import synthesize
from expunge.edit.task import Weights
from expunge.errors import DataError, ExpungeError, RecipeError
from expunge.evaluate.mmlu import HUB, Question, read_mmlu
from expunge.evaluate.suite import EvaluationData
from expunge.finished import Finished
from expunge.guard.helpers import first_blocks
from expunge.lora import target_names
from expunge.quantized import Quantize
from expunge.recipe import Recipe
from expunge.unlearn.branch import Branch
from expunge.unlearn.companions import CompanionSet
from expunge.unlearn.levels import set_apart
from expunge.unlearn.objective import Objective
from expunge.unlearn.preparing import check_adapter, check_fit
from expunge.unlearn.schedule import phases, row_of
from expunge.unlearn.sets import Half
from expunge.unlearn.weighting import check_weighting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Inputs:
    """What the stages of a recipe read, each read once."""

    recipe: Recipe
    folder: runs.Run

    @property
    def builds(self) -> bool:
        """Whether stages that are not there are made; else nothing is refused for its data."""
        return not isinstance(self.folder, Finished)

    def checked(self, base: Path) -> Path:
        """The model's folder; before anything is computed, what a branch or an edit asks for is
        refused where the model lacks it, or where the data do."""
        check_parts(self.recipe, base)
        asked = self.recipe.evaluate.mmlu
        if self.builds and asked is not None and asked.path != HUB:
            _ = self._mmlu
        for of, (folder, _) in self._level_models.items():
            check_vocabulary(base, folder, f"levels.of: {of}")
        for name, branch in self.recipe.branches.items() if self.builds else ():
            sets = self.sets
            with said_of(f"branch '{name}'"):
                self._check_terms(branch, base)
                ids, kept = [one.id for one in sets.forget], len(sets.retain)
                made = phases(branch.schedule, ids, kept, seed=self.recipe.seeds[0])
            for asked in (branch.watch, branch.keep):
                if asked is not None:
                    asked.check(sum(len(one.steps) for one in made), f"branch '{name}'")
        return base

    def _check_terms(self, branch: Branch, base: Path) -> None:
        """Refuse a term whose items none of the given ones is, and a weighting by what texts say
        that none of them says."""
        sets, objective = self.sets, Objective(branch.terms)
        beside = sets.forget if row_of(branch.schedule).keeps else []
        texts = {
            "forget": sets.forget,
            "retain": [*sets.retain, *beside],
            "neutral": sets.neutral,
        }
        for term in branch.terms:
            how, given = term.weighting, texts.get(term.half)
            if given and term.items != "all":
                wanted = term.items == "questions"
                if not any((one.kind == "qa") is wanted for one in given):
                    raise DataError(
                        f"{term.loss} reads {term.items} of {term.half} alone, and none of its "
                        f"{len(given)} items is one; leave out the term"
                    )
            if how is not None and how.row.reads == "text" and given is not None:
                tokenizer = models.load_tokenizer(base)
                read = self._encode(given, tokenizer, branch)
                check_weighting(how, read, objective.scope(term.half), tokenizer)

    @cached_property
    def _level_models(self) -> dict[str, tuple[Path, str]]:
        """Folder and hash of each model that branches take levels from, by the name given."""
        levels = [branch.levels for branch in self.recipe.branches.values()]
        names = dict.fromkeys(one.other for one in levels if one is not None)
        found = {name: models.resolve(name) for name in names if name is not None}
        return {name: (folder, runs.hash_folder(folder)) for name, folder in found.items()}

    @cached_property
    def sets(self) -> Sets:
        """The examples and documents, read and checked."""
        sets = read_sets(self._data, strays=False)
        if self.recipe.relearn is not None:
            self.recipe.relearn.trained_on(len(sets.members))
        for name, branch in self.recipe.branches.items():
            apart = branch.levels.apart if branch.levels is not None else 0
            if apart and apart >= len(sets.neutral):
                raise RecipeError(
                    f"branch '{name}': levels.apart is {apart}, and data has {len(sets.neutral)} "
                    "neutral texts; some must be left for terms"
                )
        return sets

    @cached_property
    def _data(self) -> Data:
        """The data section, with synthetic sets written and named as sources."""
        config = self.recipe.data.synthetic
        if config is None:
            return self.recipe.data
        folder = self.folder.stage("data", config, {}, lambda work: synthesize(config, work))
        return written_sets(folder)

    @cached_property
    def _data_hashes(self) -> dict[str, str]:
        return self._data.hashes()

    @cached_property
    def _evaluated(self) -> EvaluationData:
        sets = self.sets
        return EvaluationData(
            sets.forget, sets.retain, sets.members, sets.nonmembers, mmlu=self._mmlu
        )

    @property
    def splits(self) -> bool:
        """Whether models are scored on each side of the documents, too."""
        return self.recipe.folds is not None or bool(self.recipe.calibrate)

    @cached_property
    def folds(self) -> Folds:
        """How documents are split."""
        return self.recipe.folds or Folds()

    @property
    def fold_inputs(self) -> dict[str, str]:
        """What stands for the folds among the inputs of a stage: how they are drawn, or the ids."""
        given = given_ids(self.folds)
        ids = {} if given is None else {"test_ids": runs.hash_file(given)}
        return {"folds": self.folds.model_dump_json(), **ids}

    @cached_property
    def judged_by(self) -> frozenset[str]:
        """The documents that no calibration looks at until it has chosen."""
        return test_documents(self.sets, self.folds)

    @cached_property
    def _watched(self) -> EvaluationData:
        """What a branch is evaluated on while it is trained: not the documents that only judge."""
        if not self.splits:
            return self._evaluated
        side = part(self.sets, self.judged_by, inside=False)
        return EvaluationData(
            side.forget, side.retain, side.members, side.nonmembers, mmlu=self._mmlu
        )

    @cached_property
    def _mmlu(self) -> list[Question]:
        config = self.recipe.evaluate.mmlu
        if config is None:
            return []
        return read_mmlu(config.path if config.path == HUB else locate(config.path))

    def companions(
        self,
        branch: Branch,
        forget: Sequence[TokenSequence],
        tokenizer: PreTrainedTokenizerBase,
        alternates: Answers | None,
    ) -> dict[Half, CompanionSet]:
        """The sets beside forget and retain that a branch reads; `alternates` for those of them."""

        def encode(examples: list[Example]) -> list[TokenSequence]:
            return self._encode(examples, tokenizer, branch)

        sets, config = self.sets, branch.companions
        if branch.levels is not None and branch.levels.apart:
            apart = {*set_apart(len(sets.neutral), branch.levels.apart)}
            read = [text for place, text in enumerate(sets.neutral) if place not in apart]
            sets = replace(sets, neutral=read)
        making = Making(sets, forget, config, encode, tokenizer, alternates)
        return companion_sets(Objective(branch.terms).halves, making)

    def unseen_levels(
        self,
        branch: Branch,
        forget: Sequence[TokenSequence],
        tokenizer: PreTrainedTokenizerBase,
    ) -> UnseenLevels:
        """What gives the forget items of a branch the levels of unseen texts."""
        assert branch.levels is not None
        apart = set_apart(len(self.sets.neutral), branch.levels.apart)
        texts = [self.sets.neutral[place] for place in apart]
        unseen = self._encode(texts, tokenizer, branch)
        return UnseenLevels.of(unseen, forget, texts, self.sets.forget)

    @staticmethod
    def companion_inputs(branch: Branch) -> dict[str, str]:
        """Hashes of the files that a branch's sets are made of, beside those of the data."""
        file, halves = branch.companions.refusal.file, Objective(branch.terms).halves
        if file is None or not {"refusal", "refusal_pair"} & {*halves}:
            return {}
        return {"refusals": runs.hash_file(locate(file))}

    @property
    def _reading(self) -> dict[str, Any]:
        """How items are cut and joined."""
        return self.recipe.model.reading

    def _encode(
        self,
        examples: list[Example],
        tokenizer: PreTrainedTokenizerBase,
        branch: Branch | None = None,
    ) -> list[TokenSequence]:
        reading = self._reading if branch is None else branch.reading(self.recipe.model)
        return encode_all(examples, tokenizer, **reading)

    def _load(
        self, weights: Weights, *, full: bool = False, quantize: Quantize | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        dtype = "float32" if full else self.recipe.model.dtype
        model = models.load_model(weights.base, dtype=dtype, shard=True, quantize=quantize)
        return model, models.load_tokenizer(weights.base, model)


def check_parts(recipe: Recipe, base: Path) -> None:
    """Refuse branches and edits that ask for what the model in `base` lacks; its weights are not
    read."""
    if not (recipe.branches or recipe.edits or recipe.relearn):
        return
    outline = models.outline(base)
    if recipe.relearn is not None:
        with said_of("relearn"):
            check_adapter(outline, recipe.relearn.adapter)
    for name, config in recipe.calibrate.items():
        check_groups(recipe, name, config, outline)
    for name, branch in recipe.branches.items():
        with said_of(f"branch '{name}'"):
            cut = branch.blocks is not None
            check_fit(branch, first_blocks(outline, branch.blocks) if cut else outline)
    for name, edit in recipe.edits.items():
        with said_of(f"edit '{name}'"):
            edit.row.check(outline, edit.settings)


def check_groups(recipe: Recipe, name: str, config: Calibrate, outline: PreTrainedModel) -> None:
    """Refuse a calibration with more groups than blocks that its branches adapt."""
    first = recipe.branches[recipe.calibrated_branches(config)[0]]
    config.check_blocks(f"calibrate '{name}'", target_names(outline, first.lora))


@contextmanager
def said_of(who: str) -> Iterator[None]:
    """Within the block an error says whom it is about."""
    try:
        yield
    except ExpungeError as error:
        raise type(error)(f"{who}: {error}") from None
