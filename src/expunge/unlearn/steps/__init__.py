"""Step rules: how one optimiser step's gradient is made from the two halves' losses.

A rule leaves the gradient in `.grad` and returns what to log. `Now.backward` adds what this rank's
share of the items gives; a rule sums over ranks before it measures a gradient and before it ends.
"""

from typing import Annotated

from pydantic import Field

from expunge.needs import BOTH
from expunge.unlearn.steps.latent import LatentStep, latent_adversarial
from expunge.unlearn.steps.ngdiff import NgdiffStep, ngdiff
from expunge.unlearn.steps.perturbed import IluStep, SamStep, SmoothStep, ilu, sam, smooth
from expunge.unlearn.steps.plain import DualStep, JointStep, NormalizedStep, dual, joint, normalized
from expunge.unlearn.steps.raised import RaisedStep, raised
from expunge.unlearn.steps.rule import Now, Record, State, StepOptions, StepRule
from expunge.unlearn.steps.selected import PcguStep, RepselectStep, pcgu, repselect
from expunge.unlearn.steps.tamper import TarStep, tar

__all__ = ["STEP_RULES", "JointStep", "Now", "Record", "State", "Step", "StepOptions", "StepRule"]

Step = Annotated[
    JointStep
    | NormalizedStep
    | DualStep
    | RaisedStep
    | NgdiffStep
    | SamStep
    | SmoothStep
    | IluStep
    | LatentStep
    | PcguStep
    | RepselectStep
    | TarStep,
    Field(discriminator="rule"),
]
"""Which step rule, and its options."""

_TESTS = "tests/unlearn/test_steps"

STEP_RULES = {
    "joint": StepRule(
        joint,
        JointStep,
        f"{_TESTS}.py::test_joint_sums_the_halves",
        apart=False,
        buffers=0,
        sharded=True,
    ),
    "normalized": StepRule(
        normalized,
        NormalizedStep,
        f"{_TESTS}.py::test_the_normalized_direction_helps_both_halves_to_first_order",
        sharded=True,
        fidelity="adapted",
        needs=BOTH,
        cost="1 C a half and one gradient buffer",
    ),
    "dual": StepRule(
        dual,
        DualStep,
        f"{_TESTS}.py::test_the_multiplier_settles_where_the_constraint_is_met",
        apart=False,
        buffers=0,
        sharded=True,
        fidelity="adapted",
        needs=BOTH,
    ),
    "raised": StepRule(
        raised,
        RaisedStep,
        f"{_TESTS}.py::test_the_retain_weight_follows_what_the_retain_loss_exceeds",
        apart=False,
        buffers=0,
        sharded=True,
        fidelity="adapted",
        needs=BOTH,
    ),
    "ngdiff": StepRule(
        ngdiff,
        NgdiffStep,
        f"{_TESTS}_ngdiff.py::test_the_fitted_rate_is_the_exact_minimiser_of_a_quadratic",
        sharded=True,
        fidelity="adapted",
        needs=BOTH,
        cost="1 C a half, 5/3 C every so many steps, and one gradient buffer",
    ),
    "sam": StepRule(
        sam,
        SamStep,
        f"{_TESTS}_perturbed.py::test_sam_is_the_gradient_at_the_worst_point_of_the_ball",
        sharded=True,
        cost="2 C forget, 1 C retain and one copy of the weights",
    ),
    "smooth": StepRule(
        smooth,
        SmoothStep,
        f"{_TESTS}_perturbed.py::test_smoothing_is_the_gradient_of_the_mean_over_the_noise",
        buffers=2,
        cost="samples C forget, 1 C retain and two copies of the weights",
    ),
    "ilu": StepRule(
        ilu,
        IluStep,
        f"{_TESTS}_perturbed.py::test_the_invariance_penalty_against_its_second_derivatives",
        buffers=5,
        fidelity="inspired",
        needs=BOTH,
        cost="1 C forget, 2 C retain and five buffers",
    ),
    "latent_adversarial": StepRule(
        latent_adversarial,
        LatentStep,
        f"{_TESTS}_latent.py::test_the_attacker_recalls_and_stays_within_its_ball",
        buffers=0,
        fidelity="adapted",
        cost="(1 + inner_steps) C forget, 1 C retain and one activation",
    ),
    "pcgu": StepRule(
        pcgu,
        PcguStep,
        f"{_TESTS}_selected.py::test_only_the_vectors_that_tell_the_halves_apart_move",
        selective=True,
        fidelity="adapted",
        needs=BOTH,
        cost="1 C a half and one gradient buffer",
    ),
    "repselect": StepRule(
        repselect,
        RepselectStep,
        f"{_TESTS}_selected.py::test_what_is_left_is_orthogonal_to_the_principal_directions",
        fidelity="inspired",
        cost="1 C a half, an eigendecomposition a matrix and one gradient buffer",
    ),
    "tar": StepRule(
        tar,
        TarStep,
        f"{_TESTS}_tamper.py::test_the_gradients_along_the_attack_are_summed_into_the_start",
        buffers=4,
        fidelity="adapted",
        cost="2 attack_steps C forget, 1 C retain and four buffers; tiny models only",
    ),
}
