"""What a model says of given texts, with nothing generated: losses, first choices, membership, KL.

Dimensions: N scored tokens, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge import parallel
from expunge.affine_heads import output_head
from expunge.data.batches import TokenSequence, encode, encode_document, pack, packs_by_length
from expunge.data.examples import Example
from expunge.evaluate.balance import shape
from expunge.evaluate.membership import mia
from expunge.evaluate.memorisation import exact_memorisation
from expunge.evaluate.reader import PACK_TOKENS, Reader
from expunge.evaluate.semeval import mean, term_of, terms_of
from expunge.evaluate.suite import Evaluate, EvaluationData
from expunge.evaluate.tables import TokenScores
from expunge.heads import Anchor, token_kl
from expunge.packs import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def likelihoods(
    reader: Reader, data: EvaluationData, config: Evaluate, reading: Mapping[str, Any]
) -> dict[str, Any]:
    """Losses of each set, how much of each term's answers are first choices, and membership.

    The texts are those that `evaluate` scores, in the same cut, so what it has read is not read
    again. `reading` holds max_length, prompt_tail and separator.
    """
    reading = {**reading, "max_length": min(reading["max_length"], reader.context)}
    losses: dict[str, float | None] = {}
    terms: dict[str, dict[str, float]] = {}
    for half, examples in (("forget", data.forget), ("retain", data.retain)):
        sequences = [encode(example, reader.tokenizer, **reading) for example in examples]
        found = reader.scores(sequences, label="score answers")
        losses[half] = mean([one.nll for one in found])
        terms |= term_likelihoods(half, examples, found)
    length, documents = min(config.document_tokens, reader.context), {}
    for name in ("members", "nonmembers", "neutral"):
        texts = [
            encode_document(document, reader.tokenizer, max_length=length)
            for document in getattr(data, name)
        ]
        documents[name] = [one.nll for one in reader.scores(texts, label="score documents")]
        losses[name] = mean(documents[name])
    membership = None
    if documents["members"] and documents["nonmembers"]:
        given = documents["members"], documents["nonmembers"]
        draws = config.resamples
        membership = mia(*given, seed=config.seed, resamples=draws) | shape(*given, resamples=draws)
    return {"nll": losses, "terms": terms, "mia": membership}


def term_likelihoods(
    half: str, examples: Sequence[Example], found: Sequence[TokenScores]
) -> dict[str, dict[str, float]]:
    """By HALF/TASK/KIND, over the answers of that term, each token given the truth before it:

    nll    mean of -(1/L) Σ_t log p(y_t)
    hits   mean of (1/L) Σ_t [y_t is the first choice]
    exact  share of answers all of whose tokens are
    """
    sets = {"forget": (), "retain": (), half: examples}
    terms: dict[str, list[TokenScores]] = {name: [] for name in terms_of(**sets)}
    for example, scores in zip(examples, found, strict=True):
        terms[term_of(half, example)].append(scores)
    return {
        name: {
            "nll": fmean(one.nll for one in scores),
            "hits": fmean(exact_memorisation(one.hit.tolist()) or 0.0 for one in scores),
            "exact": fmean(bool(one.hit.all()) for one in scores),
            "n": len(scores),
        }
        for name, scores in terms.items()
        if scores
    }


@torch.no_grad()
def kl_to_target(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], states: Sequence[Tensor]
) -> float | None:
    """KL(target ‖ model) over the whole vocabulary, a token of the answers; None of nothing.

        mean over answers of (1/L) Σ_t Σ_v q_tv (log q_tv - log p_tv),   q the target's

    `states` are the target's final hidden states at the scored tokens of each sequence (N, d), and
    the model shares its output head. Logits are float32: in bfloat16 their rounding alone would
    come to more than what a mild branch moves.
    """
    if not sequences:
        return None
    device, total = next(model.parameters()).device, 0.0
    head = output_head(model).float()
    place = {sequence.id: number for number, sequence in enumerate(sequences)}
    sizes = [len(sequence.tokens) for sequence in sequences]
    mine = parallel.deal(sizes, parallel.world())[parallel.rank()]
    for group in packs_by_length([sequences[i] for i in mine], max_tokens=PACK_TOKENS):
        batch = pack(group, "answer", device)
        before = torch.cat([states[place[sequence.id]] for sequence in group]).to(device).float()
        anchor = Anchor(before, head=head)
        kl = token_kl(hidden_states(model, batch).float(), head, anchor)  # (N,)
        for number in range(len(group)):
            total += float(kl[batch.sequence == number].mean())
    return parallel.total({"kl": total})["kl"] / len(sequences)
