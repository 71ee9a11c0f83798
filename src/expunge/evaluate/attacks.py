"""Membership scores: pure functions of what was read of one text; higher means likelier a member.

Dimensions: L scored tokens of one text.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from expunge.evaluate.tables import TokenScores

LEAST_DEVIATION = 1e-4
"""Below this a float32 distribution cannot be told from a certainty."""


@dataclass(frozen=True, slots=True)
class Read:
    """What was read of one text; None where it was not."""

    scores: TokenScores
    text: str
    """The text of the tokens that were read: of a document that was cut, its kept part."""

    reference: TokenScores | None = None
    """The same tokens, read by a reference model."""

    conditioned: TokenScores | None = None
    """The same tokens, read after non-members."""

    gradient: float | None = None
    """The norm of the gradient of the mean NLL."""


def loss(scores: TokenScores) -> float:
    """The mean log-likelihood a token: what was trained on has a low loss.

        s = -NLL,   NLL = -(1/L) Σ_t log p_t

    Source: Yeom et al. 2018, arXiv:1709.01604.
    """
    return -scores.nll


def zlib_ratio(scores: TokenScores, text: str) -> float:
    """The mean loss a token, for how far zlib compresses the text.

        s = -NLL / Z,   Z = bytes of zlib.compress(text in UTF-8), level 6

    A text that is easy for any model compresses well too. NLL is a mean and Z is a total, so
    longer texts score higher: `zlib_total` is free of that.

    Source: Carlini et al. 2021, arXiv:2012.07805, who rank by Z / log(perplexity), which gives
    the same order.
    """
    return -scores.nll / compressed_bytes(text)


def zlib_total(scores: TokenScores, text: str) -> float:
    """The loss of the whole text, for how far zlib compresses it.

        s = -L · NLL / Z

    Nats of the model for each byte of zlib: it does not grow with the length of the text.

    Source: Carlini et al. 2021, arXiv:2012.07805.

    Differs: the loss is summed over the text, as Z is.
    """
    return -scores.nll * len(scores.logp) / compressed_bytes(text)


def reference_gap(scores: TokenScores, reference: TokenScores) -> float:
    """How much better the model knows the text than a reference model that never saw it.

        s = NLL_ref - NLL

    Source: Mireshghallah et al. 2022, arXiv:2203.03929.
    """
    return reference.nll - scores.nll


def min_k(scores: TokenScores, *, k: float = 20) -> float:
    """The mean log-likelihood of the k % least likely tokens.

        s = mean of the n lowest log p_t,   n = max(1, floor(L · k / 100))

    A text never seen has some tokens that surprise the model much. k = 100 is `loss`; a short
    text is judged by its one least likely token.

    Source: Shi et al. 2024, arXiv:2310.16789.
    """
    return _lowest(scores.logp.astype(float), k)


def min_k_plus_plus(scores: TokenScores, *, k: float = 20) -> float:
    """The mean of the k % lowest log-likelihoods, each standardised by its own distribution.

        z_t = (log p_t - μ_t) / σ_t,   μ_t = Σ_v p_v log p_v,   σ_t² = Σ_v p_v (log p_v - μ_t)²
        s = mean of the n lowest z_t,   n = max(1, floor(L · k / 100))

    Source: Zhang et al. 2025, arXiv:2404.02936.

    Differs: σ is at least 1e-4, so that a token the model is certain of is no division by zero.
    """
    deviation = np.sqrt(scores.variance.astype(float)).clip(LEAST_DEVIATION)
    return _lowest((scores.logp.astype(float) + scores.entropy) / deviation, k)


def gradient_norm(gradient: float) -> float:
    """How little the text would still move the model.

        s = -‖∂NLL/∂θ‖₂,   over all parameters θ

    What was trained on lies near a minimum. An adapter counts as merged.

    Source: Wang et al. 2024, arXiv:2402.17012.
    """
    return -gradient


def recall(scores: TokenScores, conditioned: TokenScores) -> float:
    """How much non-members before the text hurt: members lose more by them.

        s = NLL(x | P) / NLL(x),   P a few non-members, over the same tokens of x

    Source: Xie et al. 2024, arXiv:2406.15968.

    Differs: a text whose loss is 0 has the ratio 1 if the prefix leaves it 0, else infinity.
    """
    if scores.nll == 0:
        return 1.0 if conditioned.nll == 0 else float("inf")
    return conditioned.nll / scores.nll


def compressed_bytes(text: str) -> int:
    """Bytes of the text once zlib has compressed it; even of nothing they are 8."""
    return len(zlib.compress(text.encode()))


def attack_score(name: str, read: Read, *, k: float) -> float | None:
    """The score of one text under the attack `name`; None where a thing it reads was not read."""
    attack = ATTACKS[name]
    given = [getattr(read, field) for field in attack.reads]
    if any(value is None for value in given):
        return None
    return attack.fn(*given, **({"k": k} if attack.takes_k else {}))


def _lowest(values: np.ndarray, k: float) -> float:
    count = max(1, int(len(values) * k / 100))
    return float(np.sort(values)[:count].mean())


@dataclass(frozen=True)
class Attack:
    """One row: a membership score, and what it reads of a text."""

    fn: Callable[..., float]
    reads: tuple[str, ...] = ("scores",)
    takes_k: bool = False


ATTACKS: dict[str, Attack] = {
    "loss": Attack(loss),
    "zlib": Attack(zlib_ratio, ("scores", "text")),
    "zlib_total": Attack(zlib_total, ("scores", "text")),
    "min_k": Attack(min_k, takes_k=True),
    "min_k_plus_plus": Attack(min_k_plus_plus, takes_k=True),
    "reference": Attack(reference_gap, ("scores", "reference")),
    "recall": Attack(recall, ("scores", "conditioned")),
    "gradient_norm": Attack(gradient_norm, ("gradient",)),
}
