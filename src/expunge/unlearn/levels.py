"""Forget losses that end where unseen text lies: each item, or token, has a level of its own.

Dimensions: B sequences, N scored tokens, F forget items, U unseen texts. A level is kept as
log-probs of the item's tokens, log p_t below; their mean over what a term reads is -level.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from expunge.config import Section
from expunge.scores import Scores
from expunge.unlearn.losses import Loss

LEVELS = "levels"
"""The name in `Scores.more` of the level log-probs: (N,)."""


class Levels(Section):
    """How far each forget item is pushed: to the NLL that it would have, had it not been learnt."""

    of: str = Field(min_length=1)
    """Where levels come from. `original`: what the model from before `tune` says of each item,
    token by token. `unseen`: the NLLs that the target gives to the texts of data.neutral. Else a
    model that has not seen the items and has the same vocabulary: an id, a folder, a GGUF file."""

    @property
    def of_tokens(self) -> bool:
        """Whether each token has a level, and not the item alone."""
        return self.of != "unseen"

    @property
    def other(self) -> str | None:
        """The model that is neither the original nor the target, if one gives the levels."""
        return None if self.of in ("original", "unseen") else self.of


def hinge_level(current: Scores, reference: Scores | None, *, margin: float = 0.0) -> Tensor:
    """The hinge with a target of each item's own: its level, and `margin` nats a token more.

        L_i = max(0, level_i + margin - NLL_i)²,    level_i = -(1/T) Σ_t log p_t(y_t)

    p is a model that has not learnt the item (`levels.of`). A membership attack sees how NLLs lie
    among each other, so that one target for all is itself a trace. Zero loss and zero gradient once
    the level is reached.

    Source: this project.
    """
    return F.relu(_short(current, margin)).square()  # (B,)


def match_level(current: Scores, reference: Scores | None, *, margin: float = 0.0) -> Tensor:
    """Squared distance to each item's own level, from either side.

        L_i = (level_i + margin - NLL_i)²,    level_i = -(1/T) Σ_t log p_t(y_t)

    Text that was pushed too far is as conspicuous as text that is known: it is pulled back.

    Source: this project.
    """
    return _short(current, margin).square()  # (B,)


def hinge_level_token(current: Scores, reference: Scores | None, *, margin: float = 0.0) -> Tensor:
    """The hinge token by token, each against what the level model says of it.

        L_i = (1/T) Σ_t max(0, log π(y_t) - log p_t(y_t) + margin)²

    A token that is easy for a model that has not learnt the text stays easy.

    Source: this project.
    """
    losses = F.relu(current.token_logps - current.more[LEVELS] + margin).square()  # (N,)
    return current.mean_by_sequence(losses)  # (B,)


def quantile_levels(unseen: Sequence[float], texts: Sequence[str]) -> list[float]:
    """A level for each text, so that the levels lie among each other as NLLs of unseen text do.

        level_i = Q((r_i + ½)/F),    r_i = rank of Z_i / characters of text i, from 0
        Q = quantiles of the unseen NLLs (U,), Z = bytes of zlib.compress(text in UTF-8), level 6

    What compresses well is easy to foretell, so it gets a low level; equals keep their order.
    Nothing is drawn: the same texts have the same levels. Where F = U, the levels are the NLLs.

    Source: this project.
    """
    rates = [len(zlib.compress(text.encode())) / max(1, len(text)) for text in texts]
    order = sorted(range(len(texts)), key=rates.__getitem__)
    places = (np.arange(len(texts)) + 0.5) / len(texts)
    found = np.quantile(np.asarray(unseen, dtype=np.float64), places, method="hazen")
    levels = dict(zip(order, found.tolist(), strict=True))
    return [levels[item] for item in range(len(texts))]


def _short(current: Scores, margin: float) -> Tensor:
    """By how much each sequence's NLL is below its level and the margin: (B,)."""
    return margin - current.mean_by_sequence(current.more[LEVELS]) - current.nll


_TEST = "tests/unlearn/test_levels.py::test_values_worked_by_hand"
_COST = "1 C; and its half forwarded by the level model, once"

FORGET_BY_LEVEL = {
    "hinge_level": Loss(hinge_level, needs_level=True, fidelity="own", cost=_COST, test=_TEST),
    "match_level": Loss(match_level, needs_level=True, fidelity="own", cost=_COST, test=_TEST),
    "hinge_level_token": Loss(
        hinge_level_token, needs_level=True, fidelity="own", cost=_COST, test=_TEST
    ),
}
