"""Retain losses: what keeps the rest of the model where it was.

Shapes: B sequences, N scored tokens.
"""

from torch import Tensor

from expunge.scores import Scores
from expunge.unlearn.hidden import RETAIN_BY_STATES
from expunge.unlearn.logits import RETAIN_BY_LOGITS
from expunge.unlearn.losses import Loss


def nll(current: Scores, reference: Scores | None) -> Tensor:
    """Mean NLL over all tokens of the micro-batch (long answers weigh more).

        L = -(1/N) Σ_n log π(y_n)

    Source: gradient difference, Liu et al. 2022, arXiv:2203.12817.
    """
    return -current.mean(current.token_logps)[None]  # (1,)


def nll_sequence(current: Scores, reference: Scores | None) -> Tensor:
    """Mean NLL of each sequence (all sequences weigh the same).

        L = -(1/T) Σ_t log π(y_t)

    Source: gradient difference, Liu et al. 2022, arXiv:2203.12817.
    """
    return current.nll  # (B,)


def kl(current: Scores, reference: Scores | None) -> Tensor:
    """KL from the reference to the model, full vocabulary, mean over the scored tokens.

        L = (1/N) Σ_n KL(π_ref(·|y_<n) ‖ π(·|y_<n))

    Source: KL minimisation, Maini et al. 2024 (TOFU), arXiv:2401.06121.
    Differs: the common code averages over prompt and padding too; `scope` says what ours reads,
        never padding.
    """
    assert current.token_kl is not None
    return current.mean(current.token_kl)[None]  # (1,)


_TEST = "tests/unlearn/test_losses.py::test_values_worked_by_hand"

RETAIN_LOSSES = {
    "nll": Loss(nll, half="retain", mean_over="tokens", test=_TEST),
    "nll_sequence": Loss(nll_sequence, half="retain", test=_TEST),
    "kl": Loss(
        kl, half="retain", needs_kl=True, mean_over="tokens", fidelity="adapted", test=_TEST
    ),
    **RETAIN_BY_LOGITS,
    **RETAIN_BY_STATES,
}
