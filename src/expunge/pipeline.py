"""The stages of a recipe in order, each a folder: data, target, branches, merges, edits, scores.

original ─tune─▶ target ─train─▶ branches ─merge─▶ merged ─edit─▶ edited ─evaluate─▶ report
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from expunge import models, parallel, provenance, runs
from expunge.companions.alternates import read_alternates, write_alternates
from expunge.config import Section, parse_section
from expunge.edit.run import EDIT, do_edit
from expunge.edit.task import Weights
from expunge.evaluate.numbers import flat_numbers
from expunge.evaluate.reader import open_reader, reader_of
from expunge.evaluate.suite import evaluate
from expunge.guard.helpers import first_blocks
from expunge.guarding import Guards
from expunge.memory import release_freed_memory
from expunge.merge.adapters import merge_adapters
from expunge.quantized import check_possible
from expunge.recipe import Recipe, load_recipe
from expunge.registry import lookup
from expunge.report.page import write_report
from expunge.report.results import Results
from expunge.unlearn.branch import train_branch
from expunge.unlearn.checkpoints import SHORTENED
from expunge.unlearn.halves import Halves
from expunge.unlearn.section import Branch
from expunge.unlearn.tune import tune

RecipeLike = Recipe | Path | str | dict[str, Any]


class Pipeline(Guards):
    """The stages of one recipe in one folder. Each is computed once, with what it needs."""

    def __init__(
        self,
        recipe: RecipeLike,
        out: Path | str,
        folder: runs.Run | None = None,
        *,
        store: Path | None = None,
        wait: bool = False,
        original_hash: str | None = None,
    ) -> None:
        """Work in `out`; `store` and `wait` as in `runs.Run`, the hash where it is known."""
        self.recipe = load_recipe(recipe)
        self.folder = folder or runs.Run(out, owner=self.recipe.name, store=store, wait=wait)
        if original_hash is not None:
            self.original_hash = original_hash

    # --- models -----------------------------------------------------------------------------

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
        how = config.companions.alternate

        def build(work: Path) -> None:
            model, tokenizer = self._load(self.target)
            seed, rows = config.companions.seed, self.recipe.evaluate.max_batch
            write_alternates(model, tokenizer, self.sets, how, work, seed=seed, max_batch=rows)

        inputs = {"target": self._target_key, "seed": str(config.companions.seed)}
        same_text = how.model_copy(update={"each": 1})
        return self.folder.stage("alternates", same_text, inputs, build)

    def branch(self, name: str, seed: int) -> Weights:
        """One unlearned branch of the target."""
        config, quantize = self.recipe.branches[name], self.recipe.model.quantize
        alternates = self.alternates(config) if config.reads_alternates else None

        def build(work: Path) -> None:
            full = config.training == "full"
            model, tokenizer = self._load(self.target, full=full, quantize=quantize)
            if config.blocks is not None:
                model = first_blocks(model, config.blocks)
                models.save_model(model, tokenizer, work / "base")
            forget = self._encode(self.sets.forget, tokenizer)
            answers = None if alternates is None else read_alternates(alternates)
            halves = Halves(
                forget=forget,
                retain=self._encode(self.sets.retain, tokenizer),
                companions=self.companions(config, forget, tokenizer, answers),
                cache=self.folder.store / "cache",
                cache_key=f"{self._target_key}-{'float32' if full else self.recipe.model.dtype}"
                + (f"-{config.blocks}" if config.blocks else "")
                + (f"-{quantize}" if quantize else ""),
            )

            def measure(now: PreTrainedModel) -> dict[str, float]:
                reader = reader_of(now, tokenizer, max_batch=self.recipe.evaluate.max_batch)
                settings = self.recipe.evaluate
                return flat_numbers(evaluate(reader, self._evaluated, settings, **self._reading)[0])

            train_branch(
                model,
                tokenizer,
                halves,
                config,
                seed=seed,
                folder=work,
                base=str(self.target.base if config.blocks is None else work / "base"),
                label=f"{name} (seed {seed})",
                measure=measure,
                deadline=self.folder.deadline(name, seed),
            )

        inputs = {"target": self._target_key, "seed": str(seed), **self.companion_inputs(config)}
        inputs |= {} if alternates is None else {"alternates": alternates.name}
        inputs |= {"quantize": quantize} if quantize else {}
        if config.watch is not None and config.watch.read == "evaluation":
            inputs |= {"evaluate": self.recipe.evaluate.model_dump_json(), **self._data_hashes}
        done = self.folder.stage(name, config, inputs, build, together=True)
        if config.training == "full":
            return Weights(done / "model")
        base = self.target.base if config.blocks is None else done / "base"
        return Weights(base, done / "adapter")

    def merge(self, name: str, seed: int) -> Weights:
        """One merge of branches."""
        config = self.recipe.merges[name]
        branches = [self.branch(branch, seed) for branch in self.recipe.merged_branches(name)]
        adapters = [branch.adapter for branch in branches if branch.adapter is not None]

        def build(work: Path) -> None:
            made = merge_adapters(adapters, config, work / config.output, base=self.target.base)
            runs.write_json(work / "merge.json", made)

        inputs = {str(number): adapter.parent.name for number, adapter in enumerate(adapters)}
        done = self.folder.stage(name, config, inputs, build)
        if config.output == "model":
            return Weights(done / "model")
        return Weights(self.target.base, done / "adapter")

    def edit(self, name: str, seed: int) -> Weights:
        """One edit of a model."""
        config, kind = self.recipe.edits[name], "adapter" if self.recipe.adapters[name] else "model"
        given = [self.weights(model, seed) for model in self.recipe.made_from(name)]

        def build(work: Path) -> None:
            halves = {half: getattr(self.sets, half) for half in config.row.sets}
            told = {"base": self.target.base, "sets": halves, "encode": self._encode}
            do_edit(config, given, work / kind, **told, note=work / EDIT)

        inputs = {str(n): self._weights_key(one.folder) for n, one in enumerate(given)}
        inputs["target"] = self._target_key
        done = self.folder.stage(name, config, inputs, build)
        return Weights(self.target.base, done / kind) if kind == "adapter" else Weights(done / kind)

    def branches(self, only: str | None = None) -> dict[str, Weights]:
        """Every branch of the first seed, or only one."""
        if only is not None:
            lookup(self.recipe.branches, only, "branch of this recipe")
        names = [only] if only else list(self.recipe.branches)
        return {name: self.branch(name, self.recipe.seeds[0]) for name in names}

    def merges(self) -> dict[str, Weights]:
        """Every merge of the first seed."""
        return {name: self.merge(name, self.recipe.seeds[0]) for name in self.recipe.merges}

    def weights(self, name: str, seed: int) -> Weights:
        """A model of the results by its name."""
        if name == "original":
            return self.original
        if name == "target":
            return self.target
        if name in self.recipe.edits:
            return self.edit(name, seed)
        if name in self.recipe.guards:
            return self.guard(name, seed)
        make = self.branch if name in self.recipe.branches else self.merge
        return make(name, seed)

    def models(self, seed: int) -> Iterator[tuple[str, Weights]]:
        """Every model of the results, in the order they are made."""
        for name in self.recipe.models:
            yield name, self.weights(name, seed)

    # --- results ----------------------------------------------------------------------------

    def evaluate(self, name: str, weights: Weights) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The scores of one model, and a row for each item."""
        config = self.recipe.evaluate

        def build(work: Path) -> None:
            how = self.recipe.model
            release_freed_memory()
            reader = open_reader(
                weights.base,
                weights.adapter,
                dtype=how.dtype,
                folder=self.folder.store / "cache" / "tables",
                max_batch=config.max_batch,
                guard=weights.guard,
            )
            entry, items = evaluate(reader, self._evaluated, config, **self._reading)
            runs.write_json(work / "scores.json", entry)
            lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            runs.write_text(work / "items.jsonl", "".join(lines))

        inputs = {
            **self._weights_keys(weights),
            "model": self.recipe.model.told(),
            **self._data_hashes,
        }
        done = self.folder.stage(f"evaluate-{name}", config, inputs, build, together=True)
        lines = (done / "items.jsonl").read_text(encoding="utf-8").splitlines()
        return runs.read_json(done / "scores.json"), [json.loads(line) for line in lines]

    def report(self, seed: int) -> Path:
        """Evaluate every model of one seed and write results.json, report.md and report.html."""
        entries, items = {}, {}
        for name, weights in self.models(seed):
            entries[name] = {}
            if name not in self.recipe.unscored:
                entries[name], items[name] = self.evaluate(name, weights)
        root = self.folder.root
        folder = root if len(self.recipe.seeds) == 1 else root / f"seed-{seed}"
        results = parse_section(
            {
                "recipe": self.recipe.name,
                "seed": seed,
                "commit": provenance.git_commit(),
                "created": provenance.now(),
                "models": entries,
                "stages": self.folder.provenance(),
            },
            Results,
            origin="results",
        )
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        write_report(results, items, folder, recipe_text=text)
        parallel.barrier()
        return folder

    # --- helpers ----------------------------------------------------------------------------

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
