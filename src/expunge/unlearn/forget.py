"""Forget losses: pure functions from scores to losses whose mean over a micro-batch is taken.

Shapes: B sequences, N scored tokens. A loss sees no model, device or recipe.
"""

import torch.nn.functional as F
from torch import Tensor

from expunge.scores import Scores
from expunge.unlearn.losses import Loss


def gradient_ascent(current: Scores, reference: Scores | None) -> Tensor:
    """Gradient ascent: raise the mean NLL of each answer. Unbounded below.

        L = -NLL,    NLL = -(1/T) Σ_t log π(y_t)

    Source: Jang et al. 2023, arXiv:2210.01504.
    Differs: a mean over sequences of token means; the common baseline means over all tokens.
    """
    return -current.nll  # (B,)


def npo(current: Scores, reference: Scores | None, *, beta: float = 0.1) -> Tensor:
    """Negative preference optimization: the answer is the rejected half of a pair.

        L = -(2/β) log σ(-β r),    r = log π(y|x) - log π_ref(y|x)   (sums over the answer)

    Starts as gradient ascent (∂L/∂log π = 1 at r = 0) and fades as r falls, so the model stops
    moving once the answer is unlikely.

    Source: Zhang et al. 2024, arXiv:2404.05868.
    """
    assert reference is not None
    return _npo(current.logps - reference.logps, beta)  # (B,)


def npo_batch(current: Scores, reference: Scores | None, *, beta: float = 0.1) -> Tensor:
    """NPO on one number a micro-batch, the mean over all its tokens, as ZJUKLAB released it.

        L = -(2/β) log σ(-β r),    r = mean over the batch's tokens of log π - log π_ref

    One weight serves the whole micro-batch, and at the same β it fades T times later than NPO.

    Source: zjunlp/unlearn, semeval25 (arXiv:2503.21088).
    """
    assert reference is not None
    return _npo((current.token_logps - reference.token_logps).mean()[None], beta)  # (1,)


def npo_token(current: Scores, reference: Scores | None, *, beta: float = 0.1) -> Tensor:
    """NPO token by token, averaged over each answer: a token that is forgotten stops alone.

        L = (1/T) Σ_t -(2/β) log σ(-β r_t),    r_t = log π(y_t) - log π_ref(y_t)

    Source: TNPO of Wang et al. 2025 (G-effect), arXiv:2502.19301; SemEval team Atyaephyra.
    """
    assert reference is not None
    losses = _npo(current.token_logps - reference.token_logps, beta)  # (N,)
    return current.sum_by_sequence(losses) / current.lengths  # (B,)


def hinge(current: Scores, reference: Scores | None, *, target: float = 3.0) -> Tensor:
    """Squared distance to a target NLL, nothing beyond it: forget this far and stop.

        L = max(0, target - NLL)²

    `target` (nats a token) is where comparable unseen text lies, so that forgotten text ends up
    there and not below it. Zero loss and zero gradient once it is reached.

    Source: this project.
    """
    return F.relu(target - current.nll).square()  # (B,)


def hinge_token(current: Scores, reference: Scores | None, *, target: float = 3.0) -> Tensor:
    """The hinge token by token, averaged over each answer.

        L = (1/T) Σ_t max(0, target + log π(y_t))²

    Source: this project.
    """
    losses = F.relu(target + current.token_logps).square()  # (N,)
    return current.sum_by_sequence(losses) / current.lengths  # (B,)


def _npo(log_ratio: Tensor, beta: float) -> Tensor:
    return -(2 / beta) * F.logsigmoid(-beta * log_ratio)


FORGET_LOSSES = {
    "gradient_ascent": Loss(gradient_ascent, bounded=False),
    "npo": Loss(npo, needs_reference=True),
    "npo_batch": Loss(
        npo_batch, needs_reference=True, mean_over="micro-batch", fidelity="as-released quirk"
    ),
    "npo_token": Loss(npo_token, needs_reference=True, fidelity="adapted"),
    "hinge": Loss(hinge, fidelity="own"),
    "hinge_token": Loss(hinge_token, fidelity="own"),
}
