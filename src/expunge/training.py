"""What a recipe trains, as stages: the target, other answers, levels, branches.

original ─tune─▶ target ─train─▶ branches
"""

from __future__ import annotations

from abc import ABC
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from expunge import models, runs
from expunge.companions.alternates import read_alternates, write_alternates
from expunge.companions.levels import read_levels, write_levels
from expunge.config import Section
from expunge.edit.task import Weights
from expunge.evaluate.numbers import flat_numbers
from expunge.evaluate.reader import reader_of
from expunge.evaluate.suite import evaluate
from expunge.guard.helpers import first_blocks
from expunge.guarding import Guards
from expunge.lora import load_adapter
from expunge.quantized import check_possible
from expunge.unlearn.branch import train_branch
from expunge.unlearn.checkpoints import SHORTENED
from expunge.unlearn.halves import Halves
from expunge.unlearn.section import Branch
from expunge.unlearn.tune import tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Training(Guards, ABC):
    """The part of a pipeline that trains."""

    @cached_property
    def original(self) -> Weights:
        """The model that the recipe starts from."""
        base = models.resolve(self.recipe.model.path, self.recipe.model.revision)
        return Weights(self.checked(base))

    @cached_property
    def original_hash(self) -> str:
        """Stands for the content of the original's folder."""
        return runs.hash_folder(self.original.base)

    @cached_property
    def target(self) -> Weights:
        """The model that knows both halves: tuned, or the original itself."""
        config = self.recipe.tune
        if config is None:
            return self.original

        def build(work: Path) -> None:
            if self.recipe.model.quantize:
                check_possible()  # now, and not when the branches begin
            model, tokenizer = self._load(self.original, full=True)
            sets = self.sets
            items = self._encode([*sets.forget, *sets.retain], tokenizer)
            neutral = self._encode(sets.neutral, tokenizer)
            ends = self.folder.deadline("target")
            tune(model, tokenizer, items, neutral, config, folder=work, deadline=ends)

        done = self.folder.stage("target", config, self._training_inputs, build, together=True)
        return Weights(done / "model")

    def alternates(self, config: Branch) -> Path:
        """Other answers to the forget prompts, written once by the target."""
        how, chat = config.companions.alternate, self.recipe.model.chat

        def build(work: Path) -> None:
            model, tokenizer = self._load(self.target)
            told = {"seed": config.companions.seed, "max_batch": self.recipe.evaluate.max_batch}
            write_alternates(model, tokenizer, self.sets, how, work, chat=chat, **told)

        inputs = {"target": self._target_key, "seed": str(config.companions.seed)}
        same_text = how.model_copy(update={"each": 1})
        return self.folder.stage("alternates", same_text, inputs, build)

    def levels(self, branch: Branch, begun: Weights | None = None) -> Path:
        """A level for each token of a branch's forget items, found once, before the target is
        loaded; of unseen texts as the adapter has them that the branch has `begun` with."""
        config = branch.levels
        assert config is not None
        after: dict[str, str] = {}
        if config.of == "original":
            weights, key = self.original, self.original_hash
        elif config.other is None:
            weights, key = begun or self.target, self._target_key
            after = {} if begun is None else {"after": begun.folder.parent.name}
        else:
            folder, key = self._level_models[config.other]
            weights = Weights(folder)

        def build(work: Path) -> None:
            model, _ = self._load(weights)
            if weights.adapter is not None:
                load_adapter(model, weights.adapter)
            tokenizer = models.load_tokenizer(self.original.base, model)
            forget = self._encode(self.sets.forget, tokenizer, branch)
            if config.of_tokens:
                write_levels(model, forget, work)
            else:
                self.unseen_levels(branch, forget, tokenizer).write(model, work)

        inputs = {**self._training_inputs, "dtype": self.recipe.model.dtype, "levels": key, **after}
        inputs |= {} if branch.max_length is None else {"max_length": str(branch.max_length)}
        once = config.model_copy(update={"every": 0})
        return self.folder.stage("levels", once, inputs, build, together=True)

    def branch(self, name: str, seed: int) -> Weights:
        """One unlearned branch of the target."""
        config, quantize = self.recipe.branches[name], self.recipe.model.quantize
        alternates = self.alternates(config) if config.reads_alternates else None
        begun = None if config.after is None else self.branch(config.after, seed)
        levels = self.levels(config, begun) if config.levels is not None else None

        def build(work: Path) -> None:
            full = config.training == "full"
            model, tokenizer = self._load(self.target, full=full, quantize=quantize)
            if config.blocks is not None:
                model = first_blocks(model, config.blocks)
                models.save_model(model, tokenizer, work / "base")
            forget = self._encode(self.sets.forget, tokenizer, config)
            answers = None if alternates is None else read_alternates(alternates)
            moves = config.levels is not None and config.levels.every > 0
            halves = Halves(
                forget=forget,
                retain=self._encode(self.sets.retain, tokenizer, config),
                companions=self.companions(config, forget, tokenizer, answers),
                cache=self.folder.store / "cache",
                cache_key=f"{self._target_key}-{'float32' if full else self.recipe.model.dtype}"
                + (f"-{config.blocks}" if config.blocks else "")
                + (f"-{quantize}" if quantize else "")
                + (f"-read-{config.max_length}" if config.max_length else ""),
                levels=None if levels is None else read_levels(levels),
                relevel=self.unseen_levels(config, forget, tokenizer).now if moves else None,
            )

            def measure(now: PreTrainedModel) -> dict[str, float]:
                reader = reader_of(now, tokenizer, max_batch=self.recipe.evaluate.max_batch)
                partial = {"partial": True} if self.splits else {}
                settings = self.recipe.evaluate.model_copy(update=partial)
                return flat_numbers(evaluate(reader, self._watched, settings, **self._reading)[0])

            train_branch(
                model,
                tokenizer,
                halves,
                config,
                seed=seed,
                folder=work,
                base=str(self.target.base if config.blocks is None else work / "base"),
                label=f"{name} (seed {seed})",
                begun=begun and begun.adapter,
                measure=measure,
                deadline=self.folder.deadline(name, seed),
            )

        inputs = {"target": self._target_key, "seed": str(seed), **self.companion_inputs(config)}
        inputs |= {} if alternates is None else {"alternates": alternates.name}
        inputs |= {} if levels is None else {"levels": levels.name}
        inputs |= {} if begun is None else {"after": begun.folder.parent.name}
        inputs |= {"quantize": quantize} if quantize else {}
        inputs |= self.watch_inputs(config)
        done = self.folder.stage(name, config, inputs, build, together=True)
        if config.training == "full":
            return Weights(done / "model")
        base = self.target.base if config.blocks is None else done / "base"
        return Weights(base, done / "adapter")

    def watch_inputs(self, config: Branch) -> dict[str, str]:
        """What stands for the texts that a branch is evaluated on while it is trained, if it is."""
        if config.watch is None or config.watch.read != "evaluation":
            return {}
        split = self.fold_inputs if self.splits else {}
        return {"evaluate": self.recipe.evaluate.model_dump_json(), **self._data_hashes, **split}

    @property
    def _training_inputs(self) -> dict[str, str]:
        how = self.recipe.model.told("dtype")
        return {"model": self.original_hash, "encoding": how, **self._data_hashes}

    @cached_property
    def _target_key(self) -> str:
        """Stands for the target's weights, the data and how they are read."""
        section = self.recipe.tune or Section()
        inputs = {**self._training_inputs, "dtype": self.recipe.model.dtype}
        made = self.target.base.parent
        if self.recipe.tune and (made / SHORTENED).exists():
            inputs["shortened"] = made.name
        return runs.stage_key("target", section, inputs)

    def _weights_key(self, folder: Path) -> str:
        """A stage's own name where the folder is a stage's, else the hash of its content."""
        if folder == self.original.base:
            return self.original_hash
        inside = folder.parent.parent == self.folder.store / "stages"
        return folder.parent.name if inside else runs.hash_folder(folder)
