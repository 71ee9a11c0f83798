"""The leaderboard file: a board, and the methods that are compared on it."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, model_validator

from expunge.config import Section, parse_section, put_field, read_yaml
from expunge.errors import RecipeError
from expunge.evaluate.revival import Relearn
from expunge.recipe import Recipe

MAKERS = ("branches", "merges", "edits", "guards")
_SHARED = ("model", "data", "tune", "evaluate")


class Tuning(Section):
    """What each method may try before it is scored; the same for all."""

    trials: int = Field(default=1, ge=1)
    """Most settings that a method may try."""

    board: str | None = None
    """A recipe file beside this one, on whose target and data settings are tried; null tries them
    on the board itself."""

    generate_limit: int | None = Field(default=6, ge=1)
    """Items that are generated for each of the twelve terms while settings are compared."""

    seed: int = 42
    """The seed of the trials."""


class Entry(Section):
    """One method: the sections of a recipe that make its model."""

    model: str | None = None
    """Which of the models made here is scored; null takes the one called as the entry."""

    note: str = ""
    """What a reader should know, such as where it departs from its source."""

    branches: dict[str, JsonValue] = Field(default_factory=dict)
    """As in a recipe."""

    merges: dict[str, JsonValue] = Field(default_factory=dict)
    """As in a recipe."""

    edits: dict[str, JsonValue] = Field(default_factory=dict)
    """As in a recipe."""

    guards: dict[str, JsonValue] = Field(default_factory=dict)
    """As in a recipe."""

    settings: dict[str, tuple[JsonValue, ...]] = Field(default_factory=dict)
    """The values to try of a field, by its path (branches.npo.optimizer.lr); with several fields,
    every combination."""

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Every combination of settings; one without changes where nothing is tried."""
        values = itertools.product(*self.settings.values())
        return [dict(zip(self.settings, chosen, strict=True)) for chosen in values]


class Leaderboard(Section):
    """Methods and seeds, and the recipe whose target and data they share."""

    board: str
    """A recipe file beside this one: its model, data, tune and evaluate sections are shared."""

    seeds: tuple[int, ...] = Field(default=(42, 43, 44), min_length=1)
    """Each method is made and scored once for each."""

    tuning: Tuning = Field(default_factory=Tuning)
    """The budget of each method."""

    branch: dict[str, JsonValue] = Field(default_factory=dict)
    """What every branch takes where it does not say otherwise, such as lora, schedule, optimizer;
    a branch with `training: full` takes no lora of it."""

    relearn: Relearn | None = None
    """How what won is attacked, as in a recipe; null attacks nothing."""

    methods: dict[str, Entry] = Field(min_length=1)
    """By the name that the table gives them; `target` is scored besides."""

    @model_validator(mode="after")
    def _fair(self) -> "Leaderboard":
        for name, entry in self.methods.items():
            if len(entry.trials) > self.tuning.trials:
                raise ValueError(
                    f"{name} tries {len(entry.trials)} settings; the budget is "
                    f"tuning.trials: {self.tuning.trials}"
                )
        return self


class Board:
    """A leaderboard file, read: the recipe of each method, settings and seed."""

    def __init__(self, path: Path | str, on: Path | None = None) -> None:
        """Read the file at `path`; its methods go `on` another recipe's target and data, if one is
        given, and are tuned there."""
        path = Path(path)
        self.config = parse_section(read_yaml(path), Leaderboard, origin=str(path))
        board = on or path.parent / self.config.board
        fields = read_yaml(board)
        self.name = board.stem
        self.shared = {name: fields[name] for name in _SHARED if name in fields}
        if not self.before().data.holds("retain"):
            raise RecipeError(
                f"{board} names no retain set, and methods are compared by what they keep, too; "
                "give data.retain items to keep (expunge data synthesize DIR writes such sets)"
            )
        for name, entry in self.config.methods.items():
            for settings in entry.trials:
                self.recipe(name, settings)
        tried_on = None if on else self.config.tuning.board
        self.trying = self if tried_on is None else Board(path, path.parent / tried_on)
        """Where settings are tried."""

    def recipe(
        self,
        name: str,
        settings: dict[str, Any],
        *,
        seeds: Sequence[int] | None = None,
        label: str | None = None,
        trial: bool = False,
    ) -> Recipe:
        """The recipe of one method with some settings; a `trial` generates a sample only and
        asks no MMLU, which has no say in what wins."""
        entry = self.config.methods[name]
        made = {kind: json.loads(json.dumps(getattr(entry, kind))) for kind in MAKERS}
        for branch, said in made["branches"].items():
            common = json.loads(json.dumps(self.config.branch))
            if said.get("training") == "full":
                common.pop("lora", None)
            made["branches"][branch] = {**common, **said}
        fields = {**self.shared, **{kind: part for kind, part in made.items() if part}}
        for place, value in settings.items():
            put_field(fields, place, value, origin=f"{name}: settings")
        names = [model for part in made.values() for model in part]
        scored = entry.model or name
        if scored not in names:
            raise RecipeError(
                f"{name}: no section makes the model '{scored}'; name it in `model`. "
                f"Made: {', '.join(names) or 'none'}"
            )
        if trial:
            limit = {"generate_limit": self.config.tuning.generate_limit, "mmlu": None}
            fields["evaluate"] = {**fields.get("evaluate", {}), **limit}
        elif self.config.relearn is not None:
            fields["relearn"] = self.config.relearn.model_dump(mode="json")
        before = ["target"] if fields.get("tune") is None else ["original", "target"]
        fields["name"] = label or name
        fields["unscored"] = [model for model in [*before, *names] if model != scored]
        fields["seeds"] = list(seeds or self.config.seeds)
        return parse_section(fields, Recipe, origin=f"methods.{name}")

    def before(self) -> Recipe:
        """The recipe of the target, which every method starts from."""
        seed = self.config.tuning.seed
        tuned = self.shared.get("tune") is not None
        fields = {**self.shared, "name": "before", "seeds": [seed]}
        fields["unscored"] = ["original"] if tuned else []
        if self.config.relearn is not None:
            fields["relearn"] = self.config.relearn.model_dump(mode="json")
        return parse_section(fields, Recipe, origin=self.config.board)
