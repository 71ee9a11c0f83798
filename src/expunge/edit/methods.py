"""Edits: a table with one row for each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from expunge.config import Section
from expunge.edit import arithmetic, columns, pruning, ranks, repair, units, updates, vocabulary
from expunge.edit.options import (
    Needle,
    NoOptions,
    Prune,
    Ranks,
    Repair,
    Scale,
    Search,
    Weighted,
)
from expunge.edit.task import Task
from expunge.needs import Needs


@dataclass(frozen=True)
class Method:
    """One row: the mathematics, how it is done on folders, and what it takes."""

    fn: Callable[..., Any]
    run: Callable[[Task], dict[str, Any]]
    cost: str
    test: str
    options: type[Section] = NoOptions
    takes: Literal["model", "update", "adapter", "ia3", "edited"] = "model"
    """`update`: what a model has beyond its base; `adapter`: a LoRA alone; `edited`: a model that
    keeps what undoes its edit."""

    others: tuple[int, int] = (0, 0)
    """How few and how many models it takes beside the first."""

    sets: tuple[str, ...] = ()
    """What it reads of `forget` and `retain`."""

    optional: tuple[str, ...] = ()
    """Which of these it does without."""

    besides: tuple[str, ...] = ()
    """What else there is to know of its needs."""

    undo: bool = False
    """Keeps what undoes it."""

    check: Callable[[Any, Any], None] = lambda outline, options: None
    """(a model without weights, the options) refuses what the model lacks."""

    summary: str = ""
    source: str = ""
    fidelity: str = "exact"
    differs: str = ""

    @property
    def keeps_adapters(self) -> bool:
        """What it makes of adapters is an adapter."""
        return self.takes in ("update", "adapter", "ia3")

    @property
    def needs(self) -> Needs:
        """The sets, and the models beside one that is edited as it is."""
        takes = {
            "model": "",
            "update": "an update: a branch, a merge, or a model and its base",
            "adapter": "LoRA adapters" if self.others[1] else "a LoRA adapter",
            "ia3": "an (IA)³ adapter of peft",
            "edited": "a model edited by needle, ablate or revs",
        }
        more = f"{self.others[0]} more models or as many as given" if self.others[1] > 2 else ""
        more = more or (f"{self.others[0]} more models" if self.others[1] else "")
        data = tuple(name for name in self.sets if name not in self.optional)
        spare = tuple(f"{name} where it is given" for name in self.optional)
        models = tuple(part for part in (takes[self.takes], more) if part)
        return Needs(data, models, besides=(*self.besides, *spare))


def _summed(coefficients: Callable[..., tuple[float, ...]]) -> Callable[[Task], dict[str, Any]]:
    """The run of a method that says what each update is multiplied by."""
    return lambda task: updates.sum_updates(task, coefficients(len(task.models), **task.told))


_HERE = "tests/edit/test_arithmetic.py::"
_ONE_PASS = "one pass over the weights, or over the adapter alone"
_OR_A_PLACE = ("or a place in place of forget: layer and column",)
_ANY = (1, 1 << 30)

EDITS: Mapping[str, Method] = {
    "negate": Method(
        arithmetic.negate,
        _summed(arithmetic.negate),
        options=Scale,
        takes="update",
        cost=_ONE_PASS,
        test=f"{_HERE}test_negating_what_was_learnt_forgets_it_and_keeps_a_control",
    ),
    "sku": Method(
        arithmetic.negate,
        _summed(arithmetic.negate),
        options=Scale,
        takes="adapter",
        cost="O(rank)",
        test=f"{_HERE}test_aliases_are_negation",
        summary="Second stage of SKU: `negate` with λ = 1 of the adapter that learnt the harm.",
        source="Liu et al. 2024, arXiv:2402.10058",
        fidelity="adapted",
        differs="the first stage is a branch of its own; this takes its adapter",
    ),
    "bias": Method(
        arithmetic.negate,
        _summed(arithmetic.negate),
        options=Scale,
        takes="adapter",
        cost="O(rank)",
        test=f"{_HERE}test_aliases_are_negation",
        summary="Less social bias: `negate` of an adapter trained on stereotyped sentences.",
        source="Dige et al. 2024; VectorInstitute/bias-mitigation-unlearning",
        fidelity="adapted",
        differs="the adapter is trained as a branch whose forget set holds the stereotypes",
    ),
    "add": Method(
        arithmetic.add,
        _summed(arithmetic.add),
        options=Weighted,
        takes="update",
        others=_ANY,
        cost=_ONE_PASS,
        test=f"{_HERE}test_a_sum_is_exact_for_adapters_and_for_models",
        fidelity="adapted",
    ),
    "pem_add": Method(
        arithmetic.pem_add,
        updates.average_factors,
        options=Weighted,
        takes="adapter",
        others=_ANY,
        cost="O(rank)",
        test=f"{_HERE}test_averaging_factors_apart_leaves_cross_terms",
        fidelity="as-released quirk",
    ),
    "analogy": Method(
        arithmetic.analogy,
        _summed(arithmetic.analogy),
        options=Scale,
        takes="update",
        others=(2, 2),
        cost=_ONE_PASS,
        test=f"{_HERE}test_an_analogy_of_equal_terms_is_the_first_model",
    ),
    "ia3_negate": Method(
        arithmetic.ia3_negate,
        updates.mirror_ia3,
        options=Scale,
        takes="ia3",
        cost="O(width)",
        test=f"{_HERE}test_ia3_negation_as_peft_reads_it",
    ),
    "sage": Method(
        repair.sage,
        updates.repair,
        options=Repair,
        takes="update",
        sets=("retain",),
        cost="C/3 for each of a few retain items, and one pass over the update",
        test="tests/edit/test_repair.py::test_it_is_the_numerical_minimiser",
        fidelity="inspired",
    ),
    "prune": Method(
        pruning.prune,
        units.prune_units,
        options=Prune,
        sets=("forget", "retain"),
        check=units.check_units,
        cost="C/3 for each item of both sets, each step",
        test="tests/edit/test_units.py::test_a_unit_that_fires_only_for_forget_goes_first",
        fidelity="adapted",
        differs="all units of a kind are ranked together over the layers; weights into a unit are "
        "zeroed where its layer is known; a value row that several query heads share goes when all "
        "of them have lost it",
    ),
    "revs": Method(
        ranks.revs,
        vocabulary.edit_ranks,
        options=Ranks,
        sets=("forget",),
        undo=True,
        check=vocabulary.check_norms,
        cost="up to L forward passes (C/3) for each target token",
        test="tests/edit/test_ranks.py::test_the_shift_moves_the_logit_by_what_is_wanted",
        fidelity="adapted",
    ),
    "needle": Method(
        columns.needle,
        units.edit_vectors,
        options=Needle,
        sets=("forget", "retain"),
        optional=("retain",),
        besides=_OR_A_PLACE,
        undo=True,
        check=units.check_place,
        cost="one projection of all value vectors on the vocabulary, or nothing",
        test="tests/edit/test_units.py::test_a_planted_concept_is_found_and_blurred",
        fidelity="adapted",
    ),
    "ablate": Method(
        columns.ablate,
        units.edit_vectors,
        options=Search,
        sets=("forget", "retain"),
        optional=("retain",),
        besides=_OR_A_PLACE,
        undo=True,
        check=units.check_place,
        cost="as needle",
        test="tests/edit/test_units.py::test_a_planted_concept_is_found_and_blurred",
        fidelity="inspired",
    ),
    "revert": Method(
        units.restored,
        units.revert,
        takes="edited",
        cost="one pass over the weights",
        test="tests/edit/test_units.py::test_reverting_gives_the_weights_back_bit_for_bit",
        fidelity="own",
    ),
}
