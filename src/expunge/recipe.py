"""The whole recipe: each stage's Section, defined beside its code, composed here."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from expunge import runs
from expunge.calibrate.section import Calibrate
from expunge.config import Section, SeedNumber, parse_section, read_yaml
from expunge.data.folds import Folds
from expunge.data.sets import Data
from expunge.edit.section import Edit, check_edits
from expunge.errors import RunError
from expunge.evaluate.revival import Relearn
from expunge.evaluate.suite import Evaluate
from expunge.guard.section import GuardSection
from expunge.merge.section import Merge
from expunge.model_section import Model
from expunge.registry import lookup
from expunge.unlearn.section import Branch, check_levels, check_starts
from expunge.unlearn.tune import Tune

KEPT = "recipe.yaml"
"""A run folder's recipe, as it was given."""


STAGES = ("data", "alternates", "levels")
"""Stages that make no model."""


class Recipe(Section):
    """All stages of a run: data, tune, branches, merges, edits, evaluation."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """What the run folder and the results are labelled with."""

    model: Model = Field(default_factory=Model)
    """Where it starts."""

    data: Data
    """The sets."""

    tune: Tune | None = None
    """How the target is made; null where the model already knows both sets."""

    branches: dict[str, Branch] = Field(default_factory=dict)
    """The unlearned versions to train, by name."""

    merges: dict[str, Merge] = Field(default_factory=dict)
    """How branches become one model, by name; each takes `of`, or every branch in order."""

    calibrate: dict[str, Calibrate] = Field(default_factory=dict)
    """Merges that are chosen, by name: for what is forgotten to look like text never seen."""

    folds: Folds | None = None
    """Which documents only judge; given, or with calibrate, every model is scored on them too."""

    edits: dict[str, Edit] = Field(default_factory=dict)
    """Models made from others without training, by name; each may name those above it."""

    guards: dict[str, GuardSection] = Field(default_factory=dict)
    """What stands before a model at inference time, weights untouched, by name."""

    evaluate: Evaluate = Field(default_factory=lambda: Evaluate())
    """What is measured."""

    relearn: Relearn | None = Field(default=None, exclude_if=lambda how: how is None)
    """Trains a copy of each scored model on some of data.members and says what of the others comes
    back: what is hidden does, what is gone does not. Null does not."""

    unscored: tuple[str, ...] = ()
    """Models that are not scored, to save time; all that is said of them is null."""

    seeds: tuple[SeedNumber, ...] = Field(default=(42,), min_length=1)
    """Each seed trains, merges and evaluates anew from the same target."""

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "Recipe":
        made = (*self.branches, *self.merges, *self.calibrate, *self.edits, *self.guards)
        names = ["original", "target", *made]
        for name in made:
            runs.check_name(name)
            if name in STAGES or name.startswith(("evaluate-", "relearn-")):
                raise ValueError(f"'{name}' is what a stage is called; give the model another name")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"'{twice[0]}' names two models of the results")
        for name in self.unscored:
            if name not in names:
                raise ValueError(f"unscored names no model '{name}'. Known: {', '.join(names)}")
        for name, guard in self.guards.items():
            for other in (guard.of, *guard.helpers.values()):
                self._check_weights(f"guard '{name}'", other)
        check_starts(self.branches)
        for name, merge in self.merges.items():
            for branch in merge.of or ():
                if branch in self.guards:
                    self._check_weights(f"merge '{name}'", branch)
                if branch not in self.branches:
                    known = ", ".join(self.branches)
                    raise ValueError(f"merge '{name}' names the branch '{branch}'. Known: {known}")
            if any(b.training == "full" for b in self.merged_branches(name).values()):
                raise ValueError(f"merge '{name}' takes LoRA branches, and one is training: full")
            if any(b.blocks is not None for b in self.merged_branches(name).values()):
                raise ValueError(f"merge '{name}' takes branches of the whole target, not blocks")
            adapters = {branch: b.lora for branch, b in self.merged_branches(name).items()}
            merge.check(f"merge '{name}'", adapters)
        for name, calibration in self.calibrate.items():
            self.check_calibration(f"calibrate '{name}'", calibration)
        for name, edit in self.edits.items():
            for other in (edit.of, *edit.others):
                if other in self.guards:
                    self._check_weights(f"edit '{name}'", other)
                if other in self.branches and self.branches[other].blocks is not None:
                    raise ValueError(f"edit '{name}' takes whole models, and '{other}' is blocks")
        adapters = self.adapters
        cut = [name for name, branch in self.branches.items() if branch.blocks is not None]
        for name, guard in self.guards.items():
            guard.check(f"guard '{name}'", adapters, cut)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds holds a number twice")
        return self

    def check_calibration(self, who: str, calibration: Calibrate) -> None:
        """Refuse one without branches to choose among, or without documents to balance."""
        if not any(self.calibrated_branches(calibration)):
            raise ValueError(f"{who} needs LoRA branches of the whole target; the recipe has none")
        if len(self.calibrated_branches(calibration)) < len(calibration.of or ()):
            raise ValueError(f"{who} takes LoRA branches of the whole target, and names another")
        self.data.check_retain([f"{who} (floors.retain)"])
        if not self.data.holds("members"):
            raise ValueError(
                f"{who} needs data.members and data.nonmembers: documents of the forget set, and "
                "others of their kind that no model has seen"
            )
        if calibration.floors.mmlu is not None and self.evaluate.mmlu is None:
            raise ValueError(f"{who}: floors.mmlu needs evaluate.mmlu, which measures it")
        adapters = {
            name: self.branches[name].lora for name in self.calibrated_branches(calibration)
        }
        calibration.check(who, adapters)

    def calibrated_branches(self, calibration: Calibrate) -> list[str]:
        """The branches that a calibration chooses among."""
        names = calibration.of or tuple(self.branches)
        read = [(name, lookup(self.branches, name, "branch of this recipe")) for name in names]
        return [name for name, b in read if b.training == "lora" and b.blocks is None]

    def _check_weights(self, who: str, model: str) -> None:
        """Refuse a model that is none, and one that has no weights of its own."""
        if model in self.guards:
            raise ValueError(f"{who} names '{model}', and a guard changes no weights")
        if model not in self.models:
            known = ", ".join(name for name in self.models if name not in self.guards)
            raise ValueError(f"{who} names no model '{model}'. Known: {known}")

    @model_validator(mode="after")
    def _quantizes_adapters_alone(self) -> "Recipe":
        for name, branch in self.branches.items() if self.model.quantize else ():
            if branch.training == "full":
                raise ValueError(
                    f"branch '{name}' trains every weight (training: full), and model.quantize "
                    "holds them in 4 bits; use training: lora, or leave model.quantize out"
                )
            if branch.blocks is not None:
                raise ValueError(
                    f"branch '{name}' writes the target's first blocks, which model.quantize holds "
                    "in 4 bits; leave one of blocks and model.quantize out"
                )
        return self

    @model_validator(mode="after")
    def _every_set_has_its_data(self) -> "Recipe":
        readers = [
            f"{kind}.{name}{what}"
            for kind in ("branches", "edits", "guards")
            for name, section in getattr(self, kind).items()
            for what in section.retain_readers
        ]
        self.data.check_retain(readers)
        for name, branch in self.branches.items():
            reads_neutral = any(term.half == "neutral" for term in branch.terms)
            if reads_neutral and not self.data.holds("neutral"):
                raise ValueError(
                    f"branch '{name}' reads neutral texts, and data names none; give data.neutral "
                    "a file with rows of id and text that neither forget nor retain holds"
                )
        check_levels(self.branches, self.tune, unseen=self.data.holds("neutral"))
        if self.relearn is not None and not self.data.holds("members"):
            raise ValueError(
                "relearn needs data.members and data.nonmembers: some forgotten documents are "
                "trained on, and the others are compared with documents that no model has seen"
            )
        return self

    @property
    def models(self) -> list[str]:
        """The models of the results, in the order they are made."""
        first = ["target"] if self.tune is None else ["original", "target"]
        chosen = (*self.merges, *self.calibrate)
        return [*first, *self.branches, *chosen, *self.edits, *self.guards]

    def made_from(self, model: str) -> tuple[str, ...]:
        """The models that a model is made from, in the order it takes them."""
        if model in self.branches:
            return (self.branches[model].after or "target",)
        if model in self.merges:
            return tuple(self.merged_branches(model))
        if model in self.calibrate:
            return tuple(self.calibrated_branches(self.calibrate[model]))
        if model in self.edits:
            return (self.edits[model].of, *self.edits[model].others)
        if model in self.guards:
            guard = self.guards[model]
            return tuple(dict.fromkeys((guard.of, *guard.helpers.values())))
        return ("original",) if model == "target" and self.tune is not None else ()

    def maker(self, model: str) -> Section | None:
        """The section that says how a model is made; none where it is given."""
        if model == "target":
            return self.tune
        made = (self.branches, self.merges, self.calibrate, self.edits, self.guards)
        return next((sections[model] for sections in made if model in sections), None)

    @property
    def adapters(self) -> dict[str, bool]:
        """Whether each model that is made from the target is an adapter on it."""
        loras = {n: branch.lora for n, branch in self.branches.items() if branch.training == "lora"}
        branches = {name: name in loras for name in self.branches}
        merges = {name: merge.output == "adapter" for name, merge in self.merges.items()}
        chosen = dict.fromkeys(self.calibrate, True)
        return check_edits(self.edits, {"target": False, **branches, **merges, **chosen}, loras)

    @property
    def papers_pair(self) -> list[str]:
        """The two LoRA branches of the first merge by TIES of two, which is the paper's system."""
        pairs = ([*self.merged_branches(n)] for n, m in self.merges.items() if m.method == "ties")
        return next((pair for pair in pairs if len(pair) == 2), [])

    def merged_branches(self, merge: str) -> dict[str, Branch]:
        """The branches that a merge takes, in its order."""
        return {name: self.branches[name] for name in self.merges[merge].of or self.branches}


def load_recipe(recipe: "Recipe | Path | str | dict[str, Any]", **changes: Any) -> Recipe:
    """A recipe from a YAML file, a mapping, or itself, with whole sections replaced by `changes`.

    A file without `name` is called after the file.
    """
    if isinstance(recipe, Recipe):
        fields = recipe.model_dump(exclude_unset=True)
    elif isinstance(recipe, dict):
        fields = dict(recipe)
    else:
        fields = {"name": Path(recipe).stem.lower(), **read_yaml(recipe)}
    fields.update(changes)
    origin = "recipe" if isinstance(recipe, Recipe | dict) else str(recipe)
    return parse_section(fields, Recipe, origin=origin)


def keep_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the recipe into its run folder, so that what looks at the run later needs no other."""
    text = recipe_text(recipe, given=True)
    path = folder / KEPT
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        runs.write_text(path, text)


def kept_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder; a folder without one is a `RunError`."""
    if not (folder / KEPT).is_file():
        raise RunError(f"{folder} is no run folder: it holds no {KEPT}; expunge run writes it")
    return load_recipe(folder / KEPT)


def recipe_text(recipe: Recipe, *, given: bool = False) -> str:
    """A recipe as YAML: every field of it, or only what was `given`."""
    fields = recipe.model_dump(mode="json", exclude_unset=given)
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def with_model(recipe: Recipe, path: str) -> Recipe:
    """The same recipe, started from another model."""
    model = parse_section({**recipe.model.model_dump(), "path": path}, Model, origin="--model")
    return recipe.model_copy(update={"model": model})
