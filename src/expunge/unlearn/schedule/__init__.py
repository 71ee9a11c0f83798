"""Schedules: which forget and retain items each optimiser step sees. A pure function of the step.

A run is a list of phases, a phase a list of steps, a step a list of micro-batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from expunge.needs import BOTH, FORGET, Needs
from expunge.registry import lookup
from expunge.unlearn.schedule.pairing import (
    Layered,
    Pairing,
    Sequential,
    layered,
    pairing,
    sequential,
)
from expunge.unlearn.schedule.phases import MeanOver, MicroBatch, Phase, epoch_ends
from expunge.unlearn.schedule.turns import Agad, Alternate, Sugd, agad, alternate, sugd

__all__ = [
    "SCHEDULES",
    "MeanOver",
    "MicroBatch",
    "Pairing",
    "Phase",
    "Schedule",
    "check_schedule",
    "epoch_ends",
    "mean_over",
    "phases",
    "row_of",
    "steps",
]


def _kind(given: Any) -> str | None:
    """Recipes without a kind mean pairing."""
    return given.get("kind", "pairing") if isinstance(given, dict) else getattr(given, "kind", None)


Schedule = Annotated[
    Annotated[Pairing, Tag("pairing")]
    | Annotated[Sugd, Tag("sugd")]
    | Annotated[Agad, Tag("agad")]
    | Annotated[Layered, Tag("layered")]
    | Annotated[Alternate, Tag("alternate")]
    | Annotated[Sequential, Tag("sequential")],
    Discriminator(
        _kind,
        custom_error_type="schedule_kind",
        custom_error_message="no schedule has this kind; it is one of pairing, sugd, agad, "
        "layered, alternate, sequential",
    ),
]
"""One of the sections, told apart by `kind`."""


@dataclass(frozen=True)
class ScheduleRow:
    """One row of the table."""

    fn: Callable[..., list[Phase]]
    """(section, ids of the forget items, number of retain items, seed) → phases."""
    cost: str
    test: str
    apart: bool = False
    """Some steps hold one half alone, so a rule that compares the two cannot be used."""
    keeps: bool = False
    """Some forget items are read by the retain terms."""
    fidelity: str = "exact"

    @property
    def needs(self) -> Needs:
        """Retain items where a step is theirs alone, or where they hold what is to come."""
        return BOTH if self.apart or self.keeps else FORGET


def phases(config: Schedule, forget: Sequence[str], retain: int, *, seed: int) -> list[Phase]:
    """Every phase of a run, from the forget items' ids and the number of retain items."""
    return row_of(config).fn(config, forget, retain, seed=seed)


def steps(
    config: Schedule, forget: Sequence[str], retain: int, *, seed: int
) -> list[list[MicroBatch]]:
    """Every step of a run, phase after phase."""
    return [step for phase in phases(config, forget, retain, seed=seed) for step in phase.steps]


def row_of(config: Schedule) -> ScheduleRow:
    """The row of the table."""
    return lookup(SCHEDULES, config.kind, "schedule")


def mean_over(config: Schedule) -> MeanOver:
    """Of what a step's means are taken; of micro-batches where a schedule does not say."""
    return getattr(config, "mean_over", "micro_batch")


def check_schedule(config: Schedule, *, retains: bool, needs_both: str | None) -> None:
    """Refuse a schedule that needs retain terms where there are none, or has steps of one half
    alone where a step rule, named by `needs_both`, needs both in each."""
    row = row_of(config)
    if (row.apart or row.keeps) and not retains:
        raise ValueError(f"the schedule {config.kind} needs a term with half: retain")
    if row.apart and needs_both is not None:
        raise ValueError(
            f"the schedule {config.kind} has steps of one half alone, and the step rule "
            f"{needs_both} compares both; use the rule joint"
        )


_TESTS = "tests/unlearn/test_schedule.py"

SCHEDULES = {
    "pairing": ScheduleRow(
        pairing,
        cost="epochs x (1 + retain_per_forget) C for each forget item",
        test=f"{_TESTS}::test_an_epoch_is_one_pass_over_forget_with_item_i_beside_retain_item_i_modulo",
    ),
    "sugd": ScheduleRow(
        sugd,
        apart=True,
        fidelity="adapted",
        cost="epochs x (1 + retain_per_forget) C for each forget item, one item a pass",
        test=f"{_TESTS}::test_sugd_puts_seven_retain_items_after_each_forget_item",
    ),
    "agad": ScheduleRow(
        agad,
        apart=True,
        fidelity="adapted",
        cost="epochs C for each forget item, anneal_share of an epoch of retain for each chunk, "
        "final_epochs of retain",
        test=f"{_TESTS}::test_agad_anneals_after_each_chunk_and_on_all_of_retain_at_the_end",
    ),
    "layered": ScheduleRow(
        layered,
        keeps=True,
        fidelity="inspired",
        cost="(folds + 1) / 2 times pairing with keep_per_forget more retain items",
        test=f"{_TESTS}::test_layers_unlearn_the_folds_so_far_and_keep_those_to_come",
    ),
    "alternate": ScheduleRow(
        alternate,
        apart=True,
        fidelity="adapted",
        cost="epochs x 1 C for each item of both halves",
        test=f"{_TESTS}::test_alternate_gives_whole_epochs_of_one_half_in_turns",
    ),
    "sequential": ScheduleRow(
        sequential,
        fidelity="own",
        cost="that of pairing; with again (requests + 1) / 2 times",
        test=f"{_TESTS}::test_requests_come_one_after_another",
    ),
}
