"""Forget losses: pure functions from scores to losses whose mean over a micro-batch is taken.

Shapes: B sequences, N scored tokens. A loss sees no model, device or recipe.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.scores import Scores
from expunge.unlearn.hidden import FORGET_BY_STATES
from expunge.unlearn.levels import FORGET_BY_LEVEL
from expunge.unlearn.logits import FORGET_BY_LOGITS
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
    Differs: r is a mean over the micro-batch, as released; NPO's is a sum over one answer.
    """
    assert reference is not None
    return _npo(current.mean(current.token_logps - reference.token_logps)[None], beta)  # (1,)


def npo_token(current: Scores, reference: Scores | None, *, beta: float = 0.1) -> Tensor:
    """NPO token by token, averaged over each answer: a token that is forgotten stops alone.

        L = (1/T) Σ_t -(2/β) log σ(-β r_t),    r_t = log π(y_t) - log π_ref(y_t)

    ∂L/∂log π(y_t) = w_t/T with w_t = 2 π^β/(π^β + π_ref^β): at β = 4 it is the TNPO of G-effect,
    which writes the same slope as a loss w_t log π(y_t) whose w_t is held fixed.

    Source: TNPO of Wang et al. 2025 (G-effect), arXiv:2502.19301; SemEval team Atyaephyra.
    Differs: a mean over sequences of token means; theirs means over all tokens.
    """
    assert reference is not None
    losses = _npo(current.token_logps - reference.token_logps, beta)  # (N,)
    return current.mean_by_sequence(losses)  # (B,)


def simnpo(
    current: Scores, reference: Scores | None, *, beta: float = 2.5, gamma: float = 0.0
) -> Tensor:
    """NPO on the mean NLL, with a margin in the place of the reference.

        L = -(2/β) log σ(β (NLL - γ)),    NLL = -(1/T) Σ_t log π(y_t)

    An answer stops being pushed once its NLL is well above γ nats a token, however long it is. The
    released settings weigh it by about 0.13 beside a retain NLL of weight 1.

    Source: Fan et al. 2024, arXiv:2410.07163; γ is the paper's margin divided by β.
    """
    return _npo(gamma - current.nll, beta)  # (B,)


def wga(current: Scores, reference: Scores | None, *, beta: float = 1.0) -> Tensor:
    """Weighted gradient ascent: a token that is already unlikely is pushed less.

        L = (1/N) Σ_n w_n log π(y_n),    w = π(y_n)^β, held fixed

    Source: Wang et al. 2025 (G-effect), arXiv:2502.19301.
    """
    return _ascent(current, (beta * current.token_logps.detach()).exp())  # (1,)


def wtnpo(
    current: Scores, reference: Scores | None, *, beta: float = 4.0, alpha: float = 1.5
) -> Tensor:
    """TNPO weighted once more by the token's own probability.

        L = (1/N) Σ_n w_n log π(y_n),    w = 2 π^(β+α)/(π^β + π_ref^β), held fixed

    Source: Wang et al. 2025 (G-effect), arXiv:2502.19301.
    """
    assert reference is not None
    logps = current.token_logps.detach()
    fading = torch.sigmoid(beta * (logps - reference.token_logps))
    return _ascent(current, 2 * (alpha * logps).exp() * fading)  # (1,)


def satimp(
    current: Scores, reference: Scores | None, *, beta1: float = 5.0, beta2: float = 1.0
) -> Tensor:
    """Saturation and importance: push tokens that are neither forgotten nor taken for granted.

        L = (1/N) Σ_n w_n log π(y_n),    w = π(y_n)^β1 (1 - π(y_n))^β2, held fixed

    A token of probability near 1 is mostly grammar, one near 0 is forgotten: both weigh little.

    Source: Yang et al. 2025, arXiv:2505.11953.
    """
    logps = current.token_logps.detach()
    others = -torch.expm1(logps)  # 1 - π
    return _ascent(current, (beta1 * logps).exp() * others.clamp(0, 1).pow(beta2))  # (1,)


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
    return current.mean_by_sequence(losses)  # (B,)


def _npo(log_ratio: Tensor, beta: float) -> Tensor:
    return -(2 / beta) * F.logsigmoid(-beta * log_ratio)


def _ascent(current: Scores, push: Tensor) -> Tensor:
    """Gradient ascent on all tokens of the micro-batch, each as hard as `push` (N,) says: (1,)."""
    return current.mean(push * current.token_logps)[None]


_TEST = "tests/unlearn/test_losses.py::test_values_worked_by_hand"

FORGET_LOSSES = {
    "gradient_ascent": Loss(gradient_ascent, bounded=False, fidelity="adapted", test=_TEST),
    "npo": Loss(npo, needs_reference=True, positive=("beta",), test=_TEST),
    "npo_batch": Loss(
        npo_batch,
        needs_reference=True,
        mean_over="micro-batch",
        positive=("beta",),
        fidelity="as-released quirk",
        test=_TEST,
    ),
    "npo_token": Loss(
        npo_token, needs_reference=True, positive=("beta",), fidelity="adapted", test=_TEST
    ),
    "simnpo": Loss(simnpo, positive=("beta",), test=_TEST),
    "wga": Loss(wga, mean_over="tokens", positive=("beta",), test=_TEST),
    "wtnpo": Loss(
        wtnpo,
        needs_reference=True,
        mean_over="tokens",
        positive=("beta",),
        nonnegative=("alpha",),
        test=_TEST,
    ),
    "satimp": Loss(
        satimp, mean_over="tokens", positive=("beta1",), nonnegative=("beta2",), test=_TEST
    ),
    "hinge": Loss(hinge, positive=("target",), fidelity="own", test=_TEST),
    "hinge_token": Loss(hinge_token, positive=("target",), fidelity="own", test=_TEST),
    **FORGET_BY_LEVEL,
    **FORGET_BY_LOGITS,
    **FORGET_BY_STATES,
}
