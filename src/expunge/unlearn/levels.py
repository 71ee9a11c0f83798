"""Forget losses that end where unseen text lies: each item, or token, has a level of its own.

Dimensions: B sequences, N scored tokens, T tokens of one item, F forget items, U unseen texts. A
level is kept as log-probs of the item's tokens, log p_t below; their mean over what a term reads is
-level. Beside them lie the same standardised.
"""

import zlib
from collections.abc import Sequence
from operator import not_

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from expunge.config import Section
from expunge.scores import Scores
from expunge.unlearn.losses import Loss

LEVELS = "levels"
"""The name in `Scores.more` of the level log-probs, and of these standardised: (N, 2)."""

STANDARDIZED = "standardized"
"""The name in `Scores.more` of the standardised log-probs of what is trained: (N,)."""


class Levels(Section):
    """How far each forget item is pushed: to the NLL that it would have, had it not been learnt."""

    of: str = Field(min_length=1)
    """Where levels come from. `original`: what the model from before `tune` says of each item,
    token by token. `unseen`: what the target says of the text of data.neutral that compresses as
    well as the item. Else a model that has not seen the items and has the same vocabulary: an id,
    a folder, a GGUF file."""

    every: int = Field(default=0, ge=0, exclude_if=not_)
    """Steps after which levels of unseen text are read anew, in the model as it is then; 0: once,
    before training. Training moves text that it does not read: so the items follow."""

    apart: int = Field(default=0, ge=0, exclude_if=not_)
    """How many of the texts of data.neutral, evenly spaced, are for levels of unseen text alone, so
    that no term trains on them; 0: levels and terms have all of them in common."""

    @model_validator(mode="after")
    def _of_unseen_text(self) -> "Levels":
        if self.of_tokens and (self.every or self.apart):
            raise ValueError(
                "every and apart are about unseen text, which training moves; levels.of: "
                f"{self.of} stays as it is. Use of: unseen, or leave them out"
            )
        return self

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
    losses = F.relu(current.token_logps - current.more[LEVELS][:, 0] + margin).square()  # (N,)
    return current.mean_by_sequence(losses)  # (B,)


def match_profile(current: Scores, reference: Scores | None, *, margin: float = 0.0) -> Tensor:
    """Squared distance of each item's sorted token NLLs to those of its level, from either side.

        L_i = (1/T) Σ_k (q_(k) + margin - n_(k))²,    n_(k), q_(k) the k-th greatest NLLs of both

    It is the squared Wasserstein distance of two sets of T numbers. An item on its mean level can
    still hold a few tokens that no unseen text would have, and min-k reads just those.

    Source: this project; one-dimensional transport after Rabin et al. 2012 (sliced Wasserstein).
    """
    return _transport(current, current.token_logps + margin, current.more[LEVELS][:, 0])  # (B,)


def match_standardized(current: Scores, reference: Scores | None, *, margin: float = 0.0) -> Tensor:
    """The same for standardised log-probs: whether the model is as sure of what it says instead.

        L_i = (1/T) Σ_k (s_(k) + margin - q_(k))²,    s = asinh z, z the log-probs as min-k++ reads
        them

    A token that was pushed down where the model is certain of another one lies hundreds of spreads
    below what is usual, however usual its NLL is. Training moves unseen text up: `levels.every`
    reads the levels anew, and a margin below 0 lets the items follow a move that is foreseen.

    Source: this project; z of Zhang et al. 2025 (min-k++), arXiv:2404.02936.
    """
    found = current.more[STANDARDIZED] + margin
    return _transport(current, found, current.more[LEVELS][:, 1])  # (B,)


def counterparts(
    rates: Sequence[float], unseen: Sequence[float], groups: Sequence[str] | None = None
) -> list[int]:
    """For each of F texts the place of the unseen one that compresses as well among the U.

        u_i = the unseen text of rank ⌊(r_i + ½) U / F⌋,    r_i = rank of rate i, from 0

    With `groups` (F,), a text's rank goes by its place within its group, (rank in it + ½) / size,
    and by its rate among equals: each group's texts lie over all of the unseen ones, and not where
    texts of other kinds leave them room. Rates are those of `compression`. Nothing is drawn; equals
    keep their order.

    Source: this project.
    """
    names = groups or [""] * len(rates)
    within = [0.0] * len(rates)
    for name in set(names):
        own = sorted((i for i, other in enumerate(names) if other == name), key=rates.__getitem__)
        for rank, text in enumerate(own):
            within[text] = (2 * rank + 1) / len(own)
    order = sorted(range(len(rates)), key=lambda text: (within[text], rates[text]))
    others = sorted(range(len(unseen)), key=unseen.__getitem__)
    found = {
        text: others[(2 * rank + 1) * len(others) // (2 * len(rates))]
        for rank, text in enumerate(order)
    }
    return [found[text] for text in range(len(rates))]


def set_apart(texts: int, count: int) -> list[int]:
    """The places of `count` of the texts, evenly spaced: all of them where it is 0.

    Source: this project.
    """
    return [place * texts // count for place in range(count)] if count else list(range(texts))


def compression(text: str, tokens: int) -> float:
    """Bytes of zlib.compress(text in UTF-8), level 6, for each token.

    What compresses well is easy to foretell, token by token, and attacks divide the NLL of all
    tokens by the bytes: so both go together as they do in unseen text.

    Source: this project.
    """
    return len(zlib.compress(text.encode())) / max(1, tokens)


def profile(logps: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The log-probs of one text, as those of a text of `count` tokens: sorted, (count,).

        Q((k + ½)/T), Q the quantiles of the text's own, moved so that the mean stays

    Source: this project; quantiles after Hazen.
    """
    found = np.quantile(logps, (np.arange(count) + 0.5) / count, method="hazen")
    return found + (logps.mean() - found.mean())


def _transport(current: Scores, values: Tensor, levels: Tensor) -> Tensor:
    """Mean squared distance of the sorted values of each sequence to its sorted levels: (B,)."""
    order = _within_sequences(values.detach(), current.sequence)
    short = values[order] - levels[_within_sequences(levels, current.sequence)]
    return current.mean_by_sequence(short.square()[order.argsort()])


def _within_sequences(values: Tensor, sequence: Tensor) -> Tensor:
    """The order that sorts values (N,) within each sequence: (N,)."""
    order = values.argsort(stable=True)
    return order[sequence[order].argsort(stable=True)]


def _short(current: Scores, margin: float) -> Tensor:
    """By how much each sequence's NLL is below its level and the margin: (B,)."""
    return margin - current.mean_by_sequence(current.more[LEVELS][:, 0]) - current.nll


_TEST = "tests/unlearn/test_levels.py::test_values_worked_by_hand"
_COST = "1 C; and its half forwarded by the level model, once"

FORGET_BY_LEVEL = {
    "hinge_level": Loss(hinge_level, needs_level="item", fidelity="own", cost=_COST, test=_TEST),
    "match_level": Loss(match_level, needs_level="item", fidelity="own", cost=_COST, test=_TEST),
    "match_profile": Loss(
        match_profile, needs_level="item", fidelity="own", cost=_COST, test=_TEST
    ),
    "match_standardized": Loss(
        match_standardized,
        needs_level="item",
        needs_standardized=True,
        fidelity="own",
        cost=_COST,
        test=_TEST,
    ),
    "hinge_level_token": Loss(
        hinge_level_token, needs_level="token", fidelity="own", cost=_COST, test=_TEST
    ),
}
