"""The merge of low-rank updates as one: exact for a sum, else the nearest of a rank.

Dimensions: M updates, r rank, (out, in) the shape of a linear layer, A (r, in), B (out, r).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expunge.adapter_files import PREFIX, adapter_config, write_adapter
from expunge.merge.families import Elect, Method, Span
from expunge.merge.spectral import truncated, truncated_product
from expunge.merge.trim import Settings

Pair = tuple[Tensor, Tensor]


def coefficients(method: Method, settings: Settings) -> np.ndarray | None:
    """c (M,) where the method is the plain sum Σ c_i δ_i under these settings; else None.

    c_i = λ w_i / D,   D = 1, M (count) or Σ|w| (weights), as families.Elect has them
    """
    weights, how, options = np.array(settings.weights), method.how, settings.options
    if isinstance(how, Span) and not how.measures:
        return how.fn(np.eye(len(weights)), settings)
    if how != Elect():
        return None
    divisors = {"none": 1.0, "count": len(weights), "weights": float(abs(weights).sum())}
    return options["lambda"] * weights / (divisors[options["divide"]] or 1.0)


def factored(
    pairs: Sequence[Pair], sums: Sequence[float] | None, rank: int | None, delta: Tensor | None
) -> tuple[Tensor, Tensor, bool]:
    """A and B of the merged ΔW, and whether it was cut to the rank (null: the sum of the ranks).

    `sums` are the coefficients of a plain sum of the `pairs`, whose factors are put side by side;
    of any other merge the `delta` is given (out, in).
    """
    exact = sum(len(a) for a, _ in pairs)
    rank = min(rank or exact, len(pairs[0][1]), pairs[0][0].shape[1])
    if sums is None:
        assert delta is not None
        return *truncated(delta, rank), True
    a = torch.cat([a for a, _ in pairs])  # (Σr, in)
    b = torch.cat([c * b for c, (_, b) in zip(sums, pairs, strict=True)], dim=1)
    if rank < exact:
        return *truncated_product(a, b, rank), True
    return a, b, False


def write_factors(
    factors: Iterable[tuple[str, Tensor, Tensor]], base: str, out: Path, *, transposed: bool = False
) -> None:
    """Write (layer, A, B) as a peft folder with scale 1 at every layer (α = r).

    `transposed` says that the base's weights lie as (in, out).
    """
    tensors, ranks = {}, {}
    for layer, a, b in factors:
        ranks[layer] = len(a)
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = b.contiguous()
    rank = max(ranks.values())
    fields = adapter_config(list(ranks), base, rank=rank, alpha=rank, transposed=transposed)
    fields["rank_pattern"] = {layer: r for layer, r in ranks.items() if r != rank}
    fields["alpha_pattern"] = fields["rank_pattern"]
    write_adapter(tensors, fields, out)
