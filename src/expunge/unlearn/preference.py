"""Preference losses: of two answers to one prompt, the model is to prefer the first.

Shapes: P pairs; 2P sequences, of which 0, 2, 4, … are wanted (win) and 1, 3, 5, … are not (lose).
"""

import math

import torch.nn.functional as F
from torch import Tensor

from expunge.scores import Scores
from expunge.unlearn.losses import Loss


def dpo(
    current: Scores, reference: Scores | None, *, beta: float = 0.1, factor: float | None = None
) -> Tensor:
    """Direct preference optimization: the forget answer is the rejected half of a real pair.

        L = -factor · log σ(β (r_win - r_lose)),    r = log π(y|x) - log π_ref(y|x)

    `factor` is 2/β where not given, as unlearning code has it beside NPO; plain DPO has 1. With
    2/β the slope is that of log π(lose) - log π(win) as β goes to 0, whatever β: NPO with an answer
    to go to. Starts at factor · log 2, and fades as the preference grows.

    Source: Rafailov et al. 2023, arXiv:2305.18290; IdkDPO, Maini et al. 2024, arXiv:2401.06121;
        AltPO, Mekala et al. 2024, arXiv:2409.13474.
    """
    assert reference is not None
    log_ratio = current.logps - reference.logps  # (2P,)
    margin = log_ratio[0::2] - log_ratio[1::2]  # (P,)
    scale = 2 / beta if factor is None else factor
    return -scale * F.logsigmoid(beta * margin)  # (P,)


def kto(current: Scores, reference: Scores | None, *, beta: float = 0.1) -> Tensor:
    """Kahneman-Tversky optimization: NPO measured from how far the wanted answers have moved.

        L = -(2/β) log σ(z - β r_lose),    r = log π(y|x) - log π_ref(y|x),
        z = mean over the micro-batch of r_win, taken as given

    Nothing teaches the wanted answers; where they have not moved it is NPO. Pairs in which nothing
    weighs are in no z, and count in the mean with a loss of 0.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, as Zhang et al. 2024, arXiv:2404.05868,
        unlearn with it (its log σ form).
    Differs: their constant 1 is left out. z is neither multiplied by β nor cut at 0, as released.
    """
    assert reference is not None
    log_ratio = current.logps - reference.logps  # (2P,)
    read = (current.lengths > 0).view(-1, 2).any(-1)  # (P,)
    moved = log_ratio[0::2][read].mean().detach()
    losses = -2 / beta * F.logsigmoid(moved - beta * log_ratio[1::2])
    return losses.where(read, 0.0).mean()[None]  # (1,)


def flat_kl(current: Scores, reference: Scores | None) -> Tensor:
    """FLAT: raise an f-divergence between the wanted answer and the other; here Kullback-Leibler.

        L = -g(P_win) + f*(g(P_lose)),    P = (1/T) Σ_t π(y_t),    g(v) = v, f*(u) = exp(u - 1)

    It needs no retain set and no reference. A token's pull is its own probability, so what is
    unlikely by now is left alone; bounded, for P is within 0 and 1.

    Source: Wang et al. 2024 (FLAT), arXiv:2410.11143.
    Differs: P is a mean over an answer's own tokens, and each pair has a loss; its released code
        counts padding as tokens of probability 0 and takes the mean over pairs before g and f*.
    """
    win, lose = _likelihoods(current)
    return -win + (lose - 1).exp()  # (P,)


def flat_tv(current: Scores, reference: Scores | None) -> Tensor:
    """FLAT with total variation.

        L = -g(P_win) + f*(g(P_lose)),    g(v) = tanh(v)/2, f*(u) = u

    Source: Wang et al. 2024 (FLAT), arXiv:2410.11143.
    Differs: as `flat_kl`.
    """
    win, lose = _likelihoods(current)
    return (lose.tanh() - win.tanh()) / 2  # (P,)


def flat_js(current: Scores, reference: Scores | None) -> Tensor:
    """FLAT with the Jensen-Shannon divergence.

        L = -g(P_win) + f*(g(P_lose)),    g(v) = log 2 - log(1 + exp(-v)), f*(u) = -log(2 - exp(u))

    Source: Wang et al. 2024 (FLAT), arXiv:2410.11143.
    Differs: as `flat_kl`.
    """
    win, lose = _likelihoods(current)
    return F.softplus(-win) + F.softplus(lose) - 2 * math.log(2)  # (P,)


def flat_pearson(current: Scores, reference: Scores | None) -> Tensor:
    """FLAT with Pearson's χ².

        L = -g(P_win) + f*(g(P_lose)),    g(v) = v, f*(u) = u²/4 + u

    Source: Wang et al. 2024 (FLAT), arXiv:2410.11143.
    Differs: as `flat_kl`.
    """
    win, lose = _likelihoods(current)
    return -win + lose.square() / 4 + lose  # (P,)


def _likelihoods(current: Scores) -> tuple[Tensor, Tensor]:
    """The mean probability of a token of the wanted answers and of the others: (P,), (P,)."""
    found = current.mean_by_sequence(current.token_logps.exp())  # (2P,)
    return found[0::2], found[1::2]


_TEST = "tests/unlearn/test_preference.py"
_FLAT = f"{_TEST}::test_flat_is_the_variational_form_of_its_divergence"

PREFERENCE_LOSSES = {
    "dpo": Loss(
        dpo,
        needs_reference=True,
        cost="2 C",
        test=f"{_TEST}::test_dpo_by_hand",
        positive=("beta", "factor"),
    ),
    "kto": Loss(
        kto,
        needs_reference=True,
        cost="2 C",
        test=f"{_TEST}::test_kto_by_hand",
        mean_over="micro-batch",
        positive=("beta",),
        fidelity="as-released quirk",
    ),
    "flat_kl": Loss(flat_kl, cost="2 C", test=_FLAT, fidelity="adapted"),
    "flat_tv": Loss(flat_tv, cost="2 C", test=_FLAT, fidelity="adapted"),
    "flat_js": Loss(flat_js, cost="2 C", test=_FLAT, fidelity="adapted"),
    "flat_pearson": Loss(flat_pearson, cost="2 C", test=_FLAT, fidelity="adapted"),
}
