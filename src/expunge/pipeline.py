"""The stages of a recipe in order, each a folder: data, target, branches, merges, edits, scores.

original ─tune─▶ target ─train─▶ branches ─merge─▶ merged ─edit─▶ edited ─evaluate─▶ report
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expunge import parallel, provenance, runs
from expunge.calibrating import Calibrating
from expunge.cards import card_of, facts_of, has_card, write_card
from expunge.config import parse_section
from expunge.edit.run import EDIT, do_edit
from expunge.edit.task import Weights
from expunge.errors import DivergedError, RunError, UnfinishedError
from expunge.evaluate.numbers import flat_numbers
from expunge.evaluate.reader import Reader, open_reader
from expunge.evaluate.robustness_suite import relearned
from expunge.evaluate.suite import BESIDE, beside_items, evaluate
from expunge.finished import Finished
from expunge.merge.adapters import merge_adapters
from expunge.recipe import Recipe, keep_recipe, kept_recipe, load_recipe, recipe_text
from expunge.registry import lookup
from expunge.report.card import Facts
from expunge.report.page import write_report
from expunge.report.results import Results
from expunge.tracking import tell

RecipeLike = Recipe | Path | str | dict[str, Any]


class Pipeline(Calibrating):
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
        if folder is None:
            keep_recipe(self.recipe, self.folder.root)

    @classmethod
    def of_run(cls, folder: Path | str, *, wait: bool = False, build: bool = True) -> "Pipeline":
        """The stages of a run folder, by the recipe that it holds; without `build` one that is not
        finished is an `UnfinishedError`."""
        recipe = kept_recipe(Path(folder))
        if not build:
            return cls(recipe, folder, Finished(Path(folder)))
        return cls(recipe, folder, store=runs.store_of(Path(folder)), wait=wait)

    def seed(self, asked: int | None) -> int:
        """The seed that is meant: the one asked for, or the first."""
        known = self.recipe.seeds
        if asked is not None and asked not in known:
            listed = ", ".join(map(str, known))
            raise RunError(f"{self.folder.root} has no seed {asked}. Its seeds: {listed}")
        return known[0] if asked is None else asked

    # --- models -----------------------------------------------------------------------------

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
        if name in self.recipe.calibrate:
            return self.calibrated(name, seed)
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
            reader = self._reader(weights)
            entry, items = evaluate(reader, self._evaluated, config, **self._reading)
            if self.splits:
                entry["folds"] = self.fold_scores(reader, items)
            runs.write_json(work / "scores.json", entry)
            told = beside_items(reader, self._evaluated, config)
            for file, rows in (("items.jsonl", items), (BESIDE, told)):
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                runs.write_text(work / file, "".join(lines))

        inputs = self._read_from(weights)
        if self.splits:
            inputs |= self.fold_inputs
        done = self.folder.stage(f"evaluate-{name}", config, inputs, build, together=True)
        try:
            attacked = self.relearned(name, weights)
        except UnfinishedError:  # of a run that is only looked at
            attacked = None
        entry = runs.read_json(done / "scores.json") | {"relearn": attacked}
        return entry, runs.read_json_lines(done / "items.jsonl")

    def relearned(self, name: str, weights: Weights) -> dict[str, Any] | None:
        """What comes back of one model's forgotten documents after it is trained on some of them;
        None where the recipe does not ask, and of a guard, which is no part of the weights."""
        how = self.recipe.relearn
        if how is None or weights.guard is not None:
            return None

        def build(work: Path) -> None:
            sets, longest = self.sets, self.recipe.evaluate.document_tokens
            told = {"document_tokens": longest, "label": work.name.removesuffix(".partial")}
            try:
                reader = self._reader(weights)
                found = relearned(reader, sets.members, sets.nonmembers, how, **told)
            except DivergedError as error:
                found = {"failed": str(error)}
            runs.write_json(work / "relearn.json", found)

        inputs = self._read_from(weights)
        inputs["document_tokens"] = str(self.recipe.evaluate.document_tokens)
        done = self.folder.stage(f"relearn-{name}", how, inputs, build)
        return runs.read_json(done / "relearn.json")

    def _reader(self, weights: Weights) -> Reader:
        return open_reader(
            weights.base,
            weights.adapter,
            dtype=self.recipe.model.dtype,
            folder=self.folder.store / "cache" / "tables",
            max_batch=self.recipe.evaluate.max_batch,
            guard=weights.guard,
        )

    def _read_from(self, weights: Weights) -> dict[str, str]:
        """What stands for a model and for what it is asked, among the inputs of a stage."""
        told = {"model": self.recipe.model.told(), **self._data_hashes}
        return {**self._weights_keys(weights), **told}

    def report(self, seed: int) -> Path:
        """Evaluate every model of one seed and write results.json and the report's pages."""
        entries, items, made = {}, {}, {}
        for name, weights in self.models(seed):
            entries[name], made[name] = {}, weights
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
        write_report(results, items, folder, run=root, recipe_text=recipe_text(self.recipe))
        tell(f"scores of seed {seed}", 0, flat_numbers(entries))
        for name, weights in made.items():
            if has_card(self.recipe, name):
                facts = self.facts(name, weights, seed)
                write_card(facts, weights, entries[name], entries["target"])
        parallel.barrier()
        return folder

    def card(self, name: str, seed: int) -> str:
        """The card of one model, with its scores where it has any; see `cards.Finished`."""
        weights = self.weights(name, seed)
        now, before = (self.scored(model, seed) for model in (name, "target"))
        return card_of(self.facts(name, weights, seed), now, before)

    def scored(self, name: str, seed: int) -> dict[str, Any]:
        """The scores of a model; empty where none were made, or none are to be."""
        if name in self.recipe.unscored:
            return {}
        try:
            return self.evaluate(name, self.weights(name, seed))[0]
        except UnfinishedError:
            return {}

    def facts(self, name: str, weights: Weights, seed: int) -> Facts:
        """What a card says of a model before its scores."""
        return facts_of(self.recipe, name, weights, self.sets, self._data_hashes, seed)
