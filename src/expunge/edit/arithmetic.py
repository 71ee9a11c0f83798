"""Arithmetic of updates: what each model's update is multiplied by, then one sum.

    θ' = θ + Σ_i c_i τ_i,   τ_i = θ_i - θ

Dimensions: M models, r rank, (out, in) the shape of a linear layer. ΔW = scale · B A, A (r, in),
B (out, r).
"""

from collections.abc import Sequence

from torch import Tensor

from expunge.errors import EditError

Pair = tuple[Tensor, Tensor]
"""A and B of one layer."""


def negate(models: int, *, scale: float) -> tuple[float, ...]:
    """Take what a model has learnt off again: the task vector, negated.

        θ' = θ - α (θ_ft - θ),    of a LoRA: A' = -α A and B' = B

    For a branch trained to learn the forget set (a term `nll` on the half `forget`). A large α
    breaks the model: choose it by what is measured of the retain set. At α = 1 it is its own
    inverse.

    Source: Ilharco et al. 2023, arXiv:2212.04089; of adapters Zhang et al. 2023, arXiv:2306.14870.
    """
    return (-scale,)


def add(models: int, *, weights: Sequence[float] | None) -> tuple[float, ...]:
    """Add the updates of several models.

        θ' = θ + Σ_i w_i τ_i

    Of LoRAs the factors are laid side by side, so the sum is exact and its rank the sum of ranks.

    Source: Zhang et al. 2023, arXiv:2306.14870.
    Differs: the released code averages A's and B's apart; that is `pem_add`.
    """
    if weights is None:
        return (1.0,) * models
    if len(weights) != models:
        raise EditError(f"{len(weights)} weights were given for {models} models; give one each")
    return tuple(weights)


def analogy(models: int, *, scale: float) -> tuple[float, ...]:
    """C is to what is wanted as A is to B: add what B has beyond A to C.

        θ' = θ + τ_C + λ (τ_B - τ_A)

    `of` is C, `others` are B and A in this order.

    Source: Zhang et al. 2023, arXiv:2306.14870.
    """
    return (1.0, scale, -scale)


def pem_add(pairs: Sequence[Pair], *, weights: Sequence[float] | None) -> Pair:
    """Average the A's and the B's of several LoRAs apart, as PEM's released code does.

        A = Σ w_i A_i / Σ w,   B = Σ w_i B_i / Σ w

    B A then holds cross-terms B_i A_j, and less of each update than a mean would.

    Source: hkust-nlp/PEM_composition (arXiv:2306.14870).
    Differs: factors are averaged, as released; the paper adds updates.
    """
    coefficients = add(len(pairs), weights=weights)
    total = sum(coefficients)
    if not total:
        raise EditError("the weights sum to 0, so no mean can be taken")
    a = sum((c / total) * a for c, (a, _) in zip(coefficients, pairs, strict=True))
    b = sum((c / total) * b for c, (_, b) in zip(coefficients, pairs, strict=True))
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return a, b


def scaled(pair: Pair, coefficient: float) -> Pair:
    """The factors of c · B A: A alone is multiplied, for -A and -B would be B A again."""
    a, b = pair
    return coefficient * a, b


def ia3_negate(vector: Tensor, *, scale: float) -> Tensor:
    """Mirror what an (IA)³ adapter multiplies activations by at 1, where it changes nothing.

        l' = 1 - λ (l - 1) = (1 + λ) - λ l

    Source: Zhang et al. 2023, arXiv:2306.14870.
    """
    return (1 + scale) - scale * vector
