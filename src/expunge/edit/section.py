"""The edit section of a recipe: how a model is edited into another."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from expunge.config import Section, parse_section
from expunge.edit.methods import EDITS, Method
from expunge.lora import Lora
from expunge.merge.section import check_places, check_ranks
from expunge.registry import did_you_mean, lookup


class Edit(Section):
    """How one model is made from another without training."""

    of: str = "target"
    """The model that is edited: `target`, a branch, a merge, or an edit above this one."""

    others: tuple[str, ...] = ()
    """Further models that the method takes, in its order."""

    method: str
    """A name in edit.methods.EDITS."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method; docs/editing.md lists them."""

    seed: int = Field(default=42, ge=0)
    """Seeds what a method draws at random."""

    @model_validator(mode="after")
    def _consistent(self) -> "Edit":
        row = lookup(EDITS, self.method, "edit")
        parse_section(self.options, row.options, origin=f"{self.method}: options")
        fewest, most = row.others
        if not fewest <= len(self.others) <= most:
            asked = f"{fewest} models" if fewest == most else f"at least {fewest}"
            raise ValueError(f"{self.method} takes {asked} in others; {len(self.others)} are given")
        weights = self.options.get("weights")
        if weights is not None and len(weights) != 1 + len(self.others):
            raise ValueError(f"weights holds {len(weights)}; give one for each of the models")
        return self

    @property
    def row(self) -> Method:
        """The method's row."""
        return EDITS[self.method]

    @property
    def retain_readers(self) -> tuple[str, ...]:
        """What of it reads retain items, as a recipe names it."""
        return (f" ({self.method})",) if "retain" in self.row.sets else ()

    @property
    def settings(self) -> Section:
        """The options, each given or default."""
        return parse_section(self.options, self.row.options, origin=self.method)


def check_edits(
    edits: Mapping[str, Edit], made: Mapping[str, bool], loras: Mapping[str, Lora]
) -> dict[str, bool]:
    """Whether each model is an adapter, edits included; an impossible edit is a `ValueError`.

    `made` says it of the models before the edits, `loras` has the adapters of branches.
    """
    adapters, undoable = dict(made), set[str]()
    for name, edit in edits.items():
        row, given = edit.row, (edit.of, *edit.others)
        for other in given:
            if other not in adapters:
                near, known = did_you_mean(other, adapters), ", ".join(adapters)
                raise ValueError(f"edit '{name}' names the model '{other}'.{near} Known: {known}")
        if row.takes in ("update", "adapter") and "target" in given:
            raise ValueError(
                f"edit '{name}': {edit.method} takes an update of the target; name a branch, a "
                "merge or an edit"
            )
        whole = [other for other in given if not adapters[other]]
        if row.takes == "adapter" and whole:
            raise ValueError(f"edit '{name}': {edit.method} takes adapters; {whole[0]} is a model")
        if not whole:
            places = {other: loras[other] for other in given if other in loras}
            check_places(f"edit '{name}'", places)
            if row.takes == "adapter":
                check_ranks(f"edit '{name}'", places, "add takes several ranks")
        if row.takes == "ia3":
            raise ValueError(
                f"edit '{name}': no branch is (IA)³; expunge edit {edit.method} reads one"
            )
        if row.takes == "edited" and edit.of not in undoable:
            raise ValueError(f"edit '{name}': {edit.of} keeps nothing that would undo it")
        adapters[name] = row.keeps_adapters and not whole
        undoable |= {name} if row.undo else set()
    return adapters
