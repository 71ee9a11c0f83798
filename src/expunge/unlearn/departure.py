"""Departure losses: drive the model away from its reference, up to a limit.

Shapes: N scored tokens.
"""

import torch.nn.functional as F
from torch import Tensor

from expunge.scores import Scores
from expunge.unlearn.losses import Loss


def kl_away(current: Scores, reference: Scores | None, *, limit: float = 2.0) -> Tensor:
    """Raise the KL from the reference, token by token, up to `limit` nats.

        L = (1/N) Σ_n max(0, limit - KL_n),    KL_n = KL(π_ref(·|y_<n) ‖ π(·|y_<n))

    Less than -KL by a constant while every KL_n is below the limit; beyond it there is no slope.
    At the reference itself the slope is 0 too: another term has to make the first step.

    Source: stage 1 of SKU, Liu et al. 2024, arXiv:2402.10058 (on benign prompts); the forget term
        of EUL, Chen and Yang 2023, arXiv:2310.20150.
    Differs: bounded; theirs is -KL, which falls without end.
    """
    assert current.token_kl is not None
    return current.mean(F.relu(limit - current.token_kl))[None]  # (1,)


DEPARTURE_LOSSES = {
    "kl_away": Loss(
        kl_away,
        needs_kl=True,
        mean_over="tokens",
        positive=("limit",),
        fidelity="adapted",
        test="tests/unlearn/test_preference.py::test_kl_away_stops_at_its_limit",
    )
}
