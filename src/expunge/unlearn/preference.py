"""Preference losses: of two answers to one prompt, the model is to prefer the first.

Shapes: P pairs; 2P sequences, of which 0, 2, 4, … are wanted (win) and 1, 3, 5, … are not (lose).
"""

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


PREFERENCE_LOSSES = {
    "dpo": Loss(
        dpo,
        needs_reference=True,
        cost="2 C",
        test="tests/unlearn/test_preference.py::test_dpo_by_hand",
    )
}
