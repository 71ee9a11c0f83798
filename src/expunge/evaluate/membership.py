"""Membership: can the losses of whole documents tell what the model was trained on?

Dimensions: M members, N non-members, R resamples.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from expunge.data.batches import TokenSequence, encode_document, pack, packs_by_length
from expunge.data.examples import Document
from expunge.errors import EvaluationError
from expunge.progress import progress
from expunge.scores import score

PACK_TOKENS = 4096
"""Tokens scored in one forward pass."""


def auc(member_scores: Sequence[float], nonmember_scores: Sequence[float]) -> float:
    """The chance that a member outscores a non-member, ties counting half.

        AUC = P(m > n) + P(m = n) / 2  =  U / (M N)

    Exact, by ranks; source: Mann and Whitney 1947.
    """
    members, others = np.asarray(member_scores, float), np.asarray(nonmember_scores, float)
    for name, values in (("member", members), ("non-member", others)):
        if not len(values):
            raise EvaluationError(f"the membership test has no {name} documents; it needs both")
        if np.isnan(values).any():
            count, place = int(np.isnan(values).sum()), int(np.isnan(values).argmax())
            raise EvaluationError(
                f"{count} of {len(values)} {name} scores are NaN (first: number {place}); "
                "the model is broken"
            )
    others = np.sort(others)
    below = np.searchsorted(others, members, side="left")  # (M,)
    up_to = np.searchsorted(others, members, side="right")  # (M,)
    return float((below + up_to).mean() / (2 * len(others)))


def mia(
    member_nll: Sequence[float],
    nonmember_nll: Sequence[float],
    *,
    seed: int,
    resamples: int = 2000,
) -> dict[str, float | int]:
    """The AUC of -NLL, with its 95 % bootstrap interval, and the score 1 - 2 |AUC - 1/2|.

    AUC near 1: the members are still known; near 0: so far unlearned that it gives them away.
    Both sides are resampled.
    """
    members, others = -np.asarray(member_nll, float), -np.asarray(nonmember_nll, float)
    value = auc(members.tolist(), others.tolist())
    rng = np.random.default_rng(seed)
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)  # (M, N)
    m, n = wins.shape
    draws = np.empty(resamples)
    for i in range(resamples):
        # How often each document is drawn, so that a draw is two small products: u·W·v / (M N)
        u = np.bincount(rng.integers(m, size=m), minlength=m)
        v = np.bincount(rng.integers(n, size=n), minlength=n)
        draws[i] = u @ wins @ v / (m * n)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "auc": value,
        "score": 1 - 2 * abs(value - 0.5),
        "low": float(low),
        "high": float(high),
        "n": m + n,
    }


def document_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    max_length: int,
) -> list[float]:
    """Mean negative log-likelihood a token of each whole document, up to `max_length` tokens."""
    sequences = [encode_document(d, tokenizer, max_length=max_length) for d in documents]
    return sequence_nll(model, sequences, label="score documents")


@torch.inference_mode()
def sequence_nll(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], *, label: str
) -> list[float]:
    """Mean negative log-likelihood a scored token of each sequence, in the order given."""
    device = next(model.parameters()).device
    numbered = [
        TokenSequence(str(i), s.tokens, s.answer_start, s.cut) for i, s in enumerate(sequences)
    ]
    found = [0.0] * len(sequences)
    with progress(label, len(sequences), "texts") as bar:
        for group in packs_by_length(numbered, max_tokens=PACK_TOKENS):
            values = score(model, pack(group, "answer", device)).nll.tolist()
            for sequence, value in zip(group, values, strict=True):
                if not np.isfinite(value):
                    name = sequences[int(sequence.id)].id
                    raise EvaluationError(f"the loss of {name!r} is {value}; the model is broken")
                found[int(sequence.id)] = value
            bar(len(group))
    return found
