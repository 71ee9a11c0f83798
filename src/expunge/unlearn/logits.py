"""Losses on the whole next-token distribution: pure functions from logits to a loss a token.

Dimensions: N scored tokens, V vocabulary. The logits at a token are those that predict it, so
nothing is off by one, and tokens that are not scored never come here. They may be a block of a
micro-batch: the loss of a token reads its own row alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.unlearn.losses import Loss


def undial(
    logits: Tensor, targets: Tensor, reference: Tensor | None, *, beta: float = 10.0
) -> Tensor:
    """Self-distillation from a reference whose logit of the true token is lowered by β.

        L = -Σ_v q_v log p_v,    q = softmax(z_ref - β 1_y),    p = softmax(z)

    ∂L/∂z = p - q, whose entries add up to at most 2 however long training goes on. It goes to a
    distribution that the reference itself gives, so forgetting has an end.

    Source: Dong et al. 2024, arXiv:2402.10052.
    Differs: the released code averages over prompt and padding too.
    """
    assert reference is not None
    lowered = reference.scatter_add(
        1, targets[:, None], reference.new_full((len(targets), 1), -beta)
    )
    return _cross_entropy(lowered.softmax(-1), logits)  # (N,)


def ce_u(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """Cross-entropy to the model's own distribution without the true token.

        L = -Σ_v≠y q_v log p_v,    q_v = p_v / (1 - p_y), held fixed

    ∂L/∂z_y = p_y and ∂L/∂z_v = -p_y q_v: it fades as the token is forgotten. As released it leaves
    out the first token of each answer (`skip_first` of the term).

    Source: Yang 2025 (CE-U), arXiv:2503.01224.
    """
    without = logits.detach().scatter(1, targets[:, None], -math.inf)
    return _cross_entropy(without.softmax(-1), logits)  # (N,)


def flatten(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """The squared distance from the largest logit to the mean logit.

        L = (max_v z_v - (1/V) Σ_v z_v)²

    0 where all logits are equal. The forget term of primal-dual unlearning.

    Source: Entesari et al. 2025 (PDU), arXiv:2506.05314.
    Differs: reads the logits that predict the answer; the released code is off by one token.
    """
    return (logits.amax(-1) - logits.mean(-1)).square()  # (N,)


def jensen_shannon(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """Jensen-Shannon divergence from the uniform distribution, between 0 and log 2.

        L = ½ KL(p ‖ m) + ½ KL(u ‖ m),    u_v = 1/V,    m = ½ (p + u)

    Source: Singh et al. 2025 (JensUn), arXiv:2509.02820, the divergence alone.
    Differs: to the uniform distribution in place of a refusal's.
    """
    log_p = logits.log_softmax(-1)
    log_u = -math.log(logits.shape[-1])
    log_m = torch.logaddexp(log_p, torch.full_like(log_p, log_u)) - math.log(2)
    kl_p = (log_p.exp() * (log_p - log_m)).sum(-1)
    return 0.5 * kl_p + 0.5 * (log_u - log_m.mean(-1))  # (N,)


def uniform_kl(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """KL from the uniform distribution: the model is to say nothing in particular.

        L = KL(u ‖ p) = -log V - (1/V) Σ_v log p_v

    What an assistant that knows the forget half alone is trained to on all else.

    Source: ULD, Ji et al. 2024, arXiv:2406.08607.
    Differs: the released code averages over prompt and padding too.
    """
    return -logits.log_softmax(-1).mean(-1) - math.log(logits.shape[-1])  # (N,)


def _cross_entropy(q: Tensor, logits: Tensor) -> Tensor:
    """-Σ_v q_v log p_v of distributions q (N, V): (N,)."""
    return F.cross_entropy(logits, q, reduction="none")


_TEST = "tests/unlearn/test_logits.py::test_values_worked_by_hand"

FORGET_BY_LOGITS = {
    "undial": Loss(
        undial,
        reads="logits",
        needs_reference_states=True,
        mean_over="tokens",
        positive=("beta",),
        fidelity="adapted",
        test=_TEST,
    ),
    "ce_u": Loss(ce_u, reads="logits", mean_over="tokens", skip_first=1, test=_TEST),
    "flatten": Loss(flatten, reads="logits", mean_over="tokens", fidelity="adapted", test=_TEST),
    "jensen_shannon": Loss(
        jensen_shannon, reads="logits", mean_over="tokens", fidelity="inspired", test=_TEST
    ),
}

RETAIN_BY_LOGITS = {
    "uniform_kl": Loss(
        uniform_kl,
        half="retain",
        reads="logits",
        mean_over="tokens",
        fidelity="adapted",
        test=_TEST,
    ),
}
