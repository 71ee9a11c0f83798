"""Concepts in the weights: which value vectors of a model write a concept's words.

The MLP of a block adds Σ_j a_j v_j to the stream of hidden states, where the a_j are activations
and the value vectors v_j are the columns of its down projection; E v_j says which tokens v_j
raises.

Dimensions: V tokens, d hidden size, K concepts, P vectors, n vectors a concept.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.evaluate.value_vectors import Place, Projections
from expunge.progress import progress

_HEAD_ROWS = 8192
"""Rows of the head that are held in double precision at once."""


@dataclass(frozen=True)
class Head:
    """The output head of a model, and how its rows are spread."""

    weight: Tensor  # (V, d) float32
    mean: Tensor  # (d,) float64
    covariance: Tensor  # (d, d) float64


def head_of(weight: Tensor) -> Head:
    """The head with the mean and covariance of its rows, in double precision."""
    weight = weight.detach().float().cpu()
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    square = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for rows in weight.split(_HEAD_ROWS):
        rows = rows.double()
        total += rows.sum(0)
        square += rows.T @ rows
    mean = total / len(weight)
    return Head(weight, mean, square / len(weight) - mean.outer(mean))


def concept_directions(head: Head, concepts: Sequence[Sequence[int]]) -> Tensor:
    """Where the tokens of each concept lie in the head, from its mean: (K, d) float64.

    Zeros of a concept without tokens.
    """
    found = torch.zeros(len(concepts), len(head.mean), dtype=torch.float64)
    for place, tokens in enumerate(concepts):
        if tokens:
            found[place] = head.weight[list(tokens)].double().mean(0) - head.mean
    return found


def concept_scores(head: Head, directions: Tensor, vectors: Tensor) -> Tensor:
    """How much more a vector raises a concept's tokens than any other's: (K, d), (P, d) to (K, P).

        z_c(v) = (mean of E_t·v over the tokens t of c - mean of E v) / standard deviation of E v
        s_c(v) = z_c(v) - max of z_c'(v) over the other concepts c'

    The mean of E v is taken off, for a vector that raises every token alike changes no probability;
    the division makes a long vector no better than a short one; and a vector that raises digits,
    names or rare tokens, which many concepts have, leads none of them by much: s is above 0 for
    one concept at most, so that those to forget and those to keep never share a vector. The
    deviation comes from the covariance C of the head's rows, √(vᵀ C v), so that no vector has to
    be projected on the whole vocabulary. Of a vector of zeros, and for a concept without tokens,
    s is 0; one concept alone has s = z.

    Source: after Hong et al. 2024, arXiv:2406.11614, who rank by the mean logit of related words.
    Differs: centred, in standard deviations, and against the other concepts.
    """
    vectors = vectors.double()
    deviation = ((vectors @ head.covariance) * vectors).sum(1).clamp_min(0).sqrt()  # (P,)
    z = torch.where(deviation > 0, directions @ vectors.T / deviation, 0.0)
    there = directions.any(1)
    if int(there.sum()) < 2:
        return z
    rivals = torch.where(there[:, None], z, -math.inf)
    best, second = rivals.topk(2, dim=0).values  # (P,) each
    return torch.where(there[:, None], torch.where(rivals == best, z - second, z - best), 0.0)


def distinctive_tokens(
    concepts: Sequence[Sequence[int]], usable: Callable[[int], bool], count: int
) -> list[list[int]]:
    """The tokens of each concept that set it apart from the others, by tf · idf, best first.

        tf ln((K + 1) / df),    df: how many of the K concepts have the token

    Tokens that more than half of the concepts have are nobody's own; nor are those that `usable`
    says no to. Equal ones come in the order of their ids.
    """
    spread = Counter(token for tokens in concepts for token in set(tokens))
    limit = max(1, len(concepts) / 2)
    found = []
    for tokens in concepts:
        weights = {
            token: times * math.log((len(concepts) + 1) / spread[token])
            for token, times in Counter(tokens).items()
            if spread[token] <= limit and usable(token)
        }
        found.append(sorted(weights, key=lambda token: (-weights[token], token))[:count])
    return found


def strongest_vectors(
    projections: Projections, head: Head, directions: Tensor, count: int
) -> tuple[list[list[Place]], Tensor]:
    """The `count` vectors of highest score for each concept, best first, and their mean scores.

    Layer by layer; only vectors whose score is above 0, so that a concept may get fewer, or none
    (its mean is then 0).
    """
    best = torch.full((len(directions), 0), -math.inf, dtype=torch.float64)
    places = torch.zeros(len(directions), 0, 2, dtype=torch.long)
    with progress("find concepts", len(projections), "layers") as bar:
        for layer, read in sorted(projections.items()):
            scores = concept_scores(head, directions, read().T)
            scores, columns = scores.sort(dim=1, descending=True, stable=True)
            columns = columns[:, :count]
            here = torch.stack([torch.full_like(columns, layer), columns], 2)
            best = torch.cat([best, scores[:, :count]], 1)
            places = torch.cat([places, here], 1)
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, order = best[:, :count], order[:, :count]
            places = places.gather(1, order[:, :, None].expand(-1, -1, 2))
            bar()
    counts = (best > 0) & directions.any(1, keepdim=True)  # (K, count)
    found = [
        [
            (int(layer), int(column))
            for (layer, column), counted in zip(row, good, strict=True)
            if counted
        ]
        for row, good in zip(places.tolist(), counts, strict=True)
    ]
    return found, torch.where(counts, best, 0).sum(1) / counts.sum(1).clamp_min(1)


def dealt(concepts: Sequence[Sequence[int]], *, seed: int) -> list[list[int]]:
    """The tokens of all concepts dealt to as many concepts of the same sizes, at random.

    What the best vectors score for these is chance: the most that a search among so many vectors
    finds for tokens that belong to nothing.
    """
    pool = [token for tokens in concepts for token in tokens]
    rng = torch.Generator().manual_seed(seed)
    cards = iter(torch.randperm(len(pool), generator=rng).tolist())
    return [[pool[next(cards)] for _ in tokens] for tokens in concepts]


def random_places(
    projections: Projections, taken: set[Place], count: int, *, seed: int
) -> list[Place]:
    """So many vectors, evenly drawn from those that are neither taken nor zero, in order."""
    rest = [
        (layer, int(column))
        for layer, read in sorted(projections.items())
        for column in read().any(0).nonzero()[:, 0]
        if (layer, int(column)) not in taken
    ]
    rng = torch.Generator().manual_seed(seed)
    return [rest[i] for i in sorted(torch.randperm(len(rest), generator=rng)[:count].tolist())]


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """The cosine of each vector before and after: (P, d) twice to (P,); 0 of a vector of zeros.

        cos = v·v' / (|v| |v'|)

    Source: Hong et al. 2024, arXiv:2406.11614.
    """
    return F.cosine_similarity(before.double(), after.double(), dim=1)


def distance(before: Tensor, after: Tensor) -> Tensor:
    """How far each vector moved, as a share of its length: (P, d) twice to (P,).

        |v' - v| / |v|

    0: untouched; 1: as far as a vector that was set to zero. v itself must not be zero.

    Source: Hong et al. 2024, arXiv:2406.11614.
    Differs: relative, so that vectors of any length can be averaged.
    """
    before, after = before.double(), after.double()
    return (after - before).norm(dim=1) / before.norm(dim=1)


def jaccard(head_before: Tensor, before: Tensor, head: Tensor, after: Tensor, *, k: int) -> Tensor:
    """The overlap of the k tokens that each vector raises most, before and after: (P,).

        |A ∩ B| / |A ∪ B|,    A = top k of E v, B = top k of E' v'

    A vector of zeros raises no token: 0.

    Source: Hong et al. 2024, arXiv:2406.11614.
    """
    top = [(E @ v.T).T.topk(k, dim=1).indices for E, v in ((head_before, before), (head, after))]
    both = torch.cat(top, 1).sort(1).values  # (P, 2 k)
    shared = (both[:, 1:] == both[:, :-1]).sum(1)
    there = before.any(1) & after.any(1)
    return torch.where(there, shared.double() / (2 * k - shared), 0.0)
