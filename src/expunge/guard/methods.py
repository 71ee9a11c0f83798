"""The table of guards: what each does at inference time, weights untouched."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from expunge.guard import make
from expunge.guard.contrast import contrast, offset, uld, whp
from expunge.guard.corrupt import eco
from expunge.guard.filters import input_filter, output_filter
from expunge.guard.prompting import icul, prefix
from expunge.needs import Needs


@dataclass(frozen=True)
class GuardMethod:
    """One row."""

    fn: Callable[..., Any]
    """What it does, as mathematics."""
    make: Callable[..., Any]
    """(section, what it is made of, folder) → guard.json."""
    needs: Needs
    cost: str
    test: str
    fidelity: str = "adapted"
    check: Callable[..., None] = lambda section, making: None
    """(section, what it is made of) → refused where texts or the tokenizer do not do for it."""


_CONTRAST = "tests/guard/test_contrast.py"
_PROMPTS = "tests/guard/test_prompting.py"
_FILTERS = "tests/guard/test_filters.py"
_SCOPED = Needs(("forget",), besides=("retain for the classifier",))

GUARDS: dict[str, GuardMethod] = {
    "prefix": GuardMethod(
        prefix,
        make.make_prefix,
        Needs(access="text"),
        "tokens of the instruction",
        f"{_PROMPTS}::test_a_prefix_stands_before_the_prompt_and_the_same_tokens_are_scored",
        check=make.check_before,
    ),
    "input_filter": GuardMethod(
        input_filter,
        make.make_input_filter,
        replace(_SCOPED, access="text"),
        "0",
        f"{_FILTERS}::test_a_forget_prompt_is_refused_while_a_control_passes",
        check=make.check_scope,
    ),
    "output_filter": GuardMethod(
        output_filter,
        make.make_output_filter,
        Needs(("forget",), access="text"),
        "0; answers cannot be streamed",
        f"{_FILTERS}::test_an_answer_that_copies_is_replaced_and_another_is_not",
        check=make.check_scope,
    ),
    "icul": GuardMethod(
        icul,
        make.make_icul,
        Needs(("forget", "retain"), access="text"),
        "tokens of the examples",
        f"{_PROMPTS}::test_the_layout_of_in_context_unlearning_is_exact",
        check=make.check_before,
    ),
    "uld": GuardMethod(
        uld,
        make.make_contrast,
        Needs(("forget", "retain"), ("an assistant that learnt forget alone",), access="logits"),
        "inference x 1 + blocks/layers (1.25 for a quarter)",
        f"{_CONTRAST}::test_uld_by_hand",
        "exact",
    ),
    "offset": GuardMethod(
        offset,
        make.make_contrast,
        Needs(models=("two helpers of one vocabulary",), access="logits"),
        "inference + that of both helpers",
        f"{_CONTRAST}::test_offset_and_whp_by_hand",
        "exact",
    ),
    "whp": GuardMethod(
        whp,
        make.make_contrast,
        Needs(models=("a reinforced helper",), access="logits"),
        "inference x 2",
        f"{_CONTRAST}::test_offset_and_whp_by_hand",
    ),
    "contrast": GuardMethod(
        contrast,
        make.make_contrast,
        Needs(models=("helpers of one vocabulary",), access="logits"),
        "inference + that of the helpers",
        f"{_CONTRAST}::test_contrast_is_the_weighted_sum",
        "exact",
    ),
    "eco": GuardMethod(
        eco,
        make.make_eco,
        replace(_SCOPED, access="embeddings"),
        "0; the search: forward passes of some forget items",
        "tests/guard/test_eco.py::test_noise_is_that_of_the_formula_and_the_same_for_the_same_prompt",
        check=make.check_eco,
    ),
}
