"""The branch section of a recipe: how one unlearned version of the target is trained."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from expunge.config import Section
from expunge.errors import RecipeError
from expunge.lora import Lora
from expunge.model_section import Model
from expunge.unlearn.companions import Companions
from expunge.unlearn.levels import Levels
from expunge.unlearn.masks import MASKS, Mask
from expunge.unlearn.named import filled_in
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.schedule import Pairing, Schedule, check_schedule, mean_over, row_of
from expunge.unlearn.sets import SETS
from expunge.unlearn.snapshots import Keep
from expunge.unlearn.steps import STEP_RULES, JointStep, Step, StepRule
from expunge.unlearn.trainer import Optimizer
from expunge.unlearn.tune import Tune
from expunge.unlearn.watch import Watch


class _OrChanges:
    """Lets the schema of terms be a list, or changes to the terms of an objective by name."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        several = handler(core)
        fields = handler.resolve_ref_schema(several["items"])["properties"]
        change = {
            "type": "object",
            "properties": {n: f for n, f in fields.items() if n not in ("half", "loss")},
            "additionalProperties": False,
        }
        return {"anyOf": [several, {"type": "object", "additionalProperties": change}]}


class Branch(Section):
    """How one branch is trained."""

    objective: str | None = None
    """A name in OBJECTIVES in place of a list of `terms`: its terms, and its step rule, companions
    and the like under what is given here, field by field."""

    terms: Annotated[tuple[Term, ...], _OrChanges()] = ()
    """The objective: a weighted sum of losses. Beside `objective`, what is changed of its terms, by
    set, loss or both: {npo: {options: {beta: 0.2}}, retain: {weight: 2}}."""

    training: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter; `full` trains every weight."""

    after: str | None = Field(default=None, exclude_if=lambda after: after is None)
    """A branch above this one whose adapter it goes on from, with an adapter of the same shape;
    null: from the target."""

    blocks: int | None = Field(default=None, ge=1)
    """Train on the target's first blocks with its norm and head, as a guard's assistant; null: on
    all of it."""

    max_length: int | None = Field(default=None, ge=8, exclude_if=lambda length: length is None)
    """Longest sequence that this branch reads, in tokens, prompts whole; null: as the model section
    cuts them. Attackers read a document from its first word, and what is cut is not unlearnt."""

    lora: Lora = Field(default_factory=Lora)
    """The adapter, where training is `lora`."""

    companions: Companions = Field(default_factory=Companions)
    """How the sets that terms read beside forget and retain are made."""

    levels: Levels | None = Field(default=None, exclude_if=lambda levels: levels is None)
    """Where the levels come from that hinge_level, match_level, match_profile,
    match_standardized, hinge_level_token and the weighting memorisation_gap read."""

    schedule: Schedule = Field(default_factory=Pairing)
    """Which items each step sees; a name in SCHEDULES as `kind`, pairing where none is given."""

    mask: Mask | None = None
    """Which weights may move, where training is `full`; null means all."""

    step: Step = Field(default_factory=JointStep)
    """How a step's gradient is made."""

    optimizer: Optimizer = Field(default_factory=Optimizer)
    """Learning rate and the like."""

    watch: Watch | None = None
    """Evaluation during training; null evaluates when it has ended."""

    keep: Keep | None = None
    """Adapters kept on the way, where training is `lora`; null keeps the one at the end alone."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, fields: Any) -> Any:
        try:
            return filled_in(fields)
        except RecipeError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _possible(self) -> "Branch":
        sides = {SETS[term.half].side for term in self.terms}
        if not self.terms:
            raise ValueError("give an objective by name, or terms")
        if "forget" not in sides:
            known = ", ".join(half for half, row in SETS.items() if row.side == "forget")
            raise ValueError(f"terms must hold at least one half: forget (or one of {known})")
        needs_both = self.step.rule if self.step.needs_both else None
        check_schedule(self.schedule, retains="retain" in sides, needs_both=needs_both)
        whole = [term.loss for term in self.terms if term.row.mean_over == "micro-batch"]
        if whole and mean_over(self.schedule) == "step":
            raise ValueError(
                f"{whole[0]} reads a micro-batch as one, so schedule.mean_over: step cannot part "
                "it; leave mean_over out, and read a step's items as one by accumulation: 1"
            )
        if self.mask is not None and self.training == "lora":
            raise ValueError(
                "a mask needs training: full; an adapter is confined by lora.layers and "
                "lora.targets"
            )
        if self.keep is not None and self.training == "full":
            raise ValueError(
                "keep needs training: lora; with full, each snapshot would be a whole model"
            )
        if self.after is not None and (self.training == "full" or self.blocks is not None):
            raise ValueError("after needs training: lora, on the whole target")
        if "retain" in self.rule.needs.data and "retain" not in sides:
            raise ValueError(f"the step rule {self.step.rule} needs a term with half: retain")
        rank = self.lora.rank if self.training == "lora" else None
        self.step.check(self.terms, self.optimizer, rank)
        deepest, layers = Objective(self.terms).deepest, self.lora.layers
        if self.training == "lora" and deepest is not None and layers and min(layers) > deepest:
            raise ValueError(
                f"the terms read no block behind {deepest}, and lora.layers begins at {min(layers)}"
            )
        return self

    @model_validator(mode="after")
    def _has_the_levels_it_reads(self) -> "Branch":
        readers = [term for term in self.terms if term.needs_level]
        if self.levels is None:
            if readers:
                first = readers[0]
                name = first.loss if first.row.needs_level else f"weighting {_kind(first)}"
                raise ValueError(
                    f"{name} reads a level for each item; give levels.of: original, "
                    "unseen, or a model that has not seen the items"
                )
            return self
        if not readers:
            raise ValueError("levels are given, and no term reads them")
        for term in readers if not self.levels.of_tokens else ():
            if term.weighs_by_level:
                raise ValueError(
                    f"weighting {_kind(term)} reads a level for each token, and levels.of: unseen "
                    "gives one for each item; use levels of: original or a model"
                )
            if term.row.needs_level == "token":
                raise ValueError(
                    f"{term.loss} reads a level for each token, and levels.of: unseen gives one "
                    "for each item; use hinge_level, or levels of: original or a model"
                )
            if term.scope == "answer":
                raise ValueError(
                    f"{term.loss} has scope: answer, and unseen texts have no answers; levels.of: "
                    "unseen needs scope: document"
                )
        return self

    @property
    def reads_alternates(self) -> bool:
        """Whether a term needs what only the target can write."""
        return any(term.half in ("alternate", "alternate_pair") for term in self.terms)

    @property
    def retain_readers(self) -> tuple[str, ...]:
        """What of it reads retain items, as a recipe names it."""
        read = [
            f".terms[{number}] ({term.loss} on retain)"
            for number, term in enumerate(self.terms)
            if term.half == "retain"
        ]
        mismatched = any(term.half == "mismatch" for term in self.terms)
        if mismatched and self.companions.mismatch.of == "retain":
            read.append(".companions.mismatch.of (retain)")
        if self.mask is not None and "retain" in MASKS[self.mask.kind].passes:
            read.append(f".mask ({self.mask.kind})")
        turns = row_of(self.schedule)
        if turns.apart or turns.keeps:
            read.append(f".schedule ({self.schedule.kind})")
        watched = () if self.watch is None else self.watch.retain_readers
        return (*read, *(f".watch{what}" for what in watched))

    def reading(self, model: Model) -> dict[str, Any]:
        """How its items are cut and joined, given the model section."""
        if self.max_length is None:
            return model.reading
        return model.reading | {"max_length": self.max_length, "prompt_tail": None}

    @property
    def rule(self) -> StepRule:
        """The row of the step rule."""
        return STEP_RULES[self.step.rule]

    @property
    def unguarded(self) -> bool:
        """Whether a forget loss falls without end and nothing stops it."""
        changing = [term for term in self.terms if SETS[term.half].side == "forget"]
        endless = any(not term.row.bounded for term in changing)
        return endless and (self.watch is None or self.watch.until is None)


def _kind(term: Term) -> str:
    """The name of a term's weighting."""
    return term.weighting.kind if term.weighting is not None else ""


def check_starts(branches: Mapping[str, Branch]) -> None:
    """Refuse a branch after one that is not above it, or whose adapter is no start for its own."""
    above: list[str] = []
    for name, branch in branches.items():
        if branch.after is not None:
            who = f"branch '{name}' comes after '{branch.after}'"
            if branch.after not in above:
                known = ", ".join(above) or "none"
                raise ValueError(f"{who}, which is no branch above it. Above it: {known}")
            before = branches[branch.after]
            if before.training == "full" or before.blocks is not None:
                raise ValueError(f"{who}, which is no adapter on the whole target")
            if before.lora.shape != branch.lora.shape:
                raise ValueError(
                    f"{who} and goes on with its adapter; give both the same lora.rank, alpha, "
                    "targets and layers"
                )
        above.append(name)


def check_levels(branches: Mapping[str, Branch], tune: Tune | None, *, unseen: bool) -> None:
    """Refuse levels that no model can say, given how the target is made and whether there are
    `unseen` texts."""
    for name, branch in branches.items():
        of = branch.levels and branch.levels.of
        if of == "original" and tune is None:
            raise ValueError(
                f"branch '{name}' takes levels of the original, and without tune that is the "
                "target itself; name a model that has not seen the text in levels.of"
            )
        if of != "unseen":
            continue
        if not unseen:
            raise ValueError(
                f"branch '{name}' takes levels of unseen texts, and data names none; give "
                "data.neutral texts that no model has been trained on"
            )
        if tune and tune.neutral_per_item > 0 and tune.neutral_loss == "nll":
            raise ValueError(
                f"branch '{name}' takes levels of unseen texts, and tune learns them; set "
                "tune.neutral_per_item: 0, or tune.neutral_loss: kl"
            )
