"""Angles, norms and places of what models add to the target, all from inner products.

Dimensions: M models, S snapshots of one branch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expunge.adapter_files import block_of
from expunge.analyse.deltas import module_of

Row = dict[str, Any]
Grams = Mapping[str, np.ndarray]
"""The (M, M) inner products of each layer."""


def places(grams: Grams) -> list[tuple[str, str, np.ndarray]]:
    """(scope, place, inner products): of all, by block, by module kind, and by layer.

    Inner products of parts add up to those of the whole, so nothing is computed twice.
    """
    if not grams:
        return []
    blocks: dict[str, np.ndarray] = {}
    modules: dict[str, np.ndarray] = {}
    for layer, products in grams.items():
        block = block_of(layer)
        where = "outside" if block is None else str(block)
        for sums, name in ((blocks, where), (modules, module_of(layer))):
            sums[name] = sums.get(name, 0.0) + products
    whole = [("all", "", np.sum(list(grams.values()), 0))]
    return whole + [
        (scope, name, products)
        for scope, parts in (("block", blocks), ("module", modules), ("layer", grams))
        for name, products in parts.items()
    ]


def norms(grams: Grams, names: Sequence[str]) -> list[Row]:
    """Frobenius norms, and which share of a model's squared norm lies where.

    share = ‖Δ_place‖² / ‖Δ‖²
    """
    found = places(grams)
    whole = np.diag(found[0][2]) if found else ()
    return [
        {
            "model": name,
            "scope": scope,
            "place": place,
            "norm": _root(products[i, i]),
            "share": float(products[i, i] / whole[i]) if whole[i] > 0 else None,
        }
        for scope, place, products in found
        for i, name in enumerate(names)
    ]


def angles(grams: Grams, names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[Row]:
    """The angle between the deltas of two models: cos = ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖)."""
    number = {name: i for i, name in enumerate(names)}
    return [
        {"one": one, "two": two, "scope": scope, "place": place}
        | _angle(products, number[one], number[two])
        for scope, place, products in places(grams)
        for one, two in pairs
    ]


def phases(grams: Grams, steps: Sequence[int]) -> tuple[list[Row], list[Row]]:
    """Norms of what each phase of training added, and angles between any two phases.

        phase k:  P_k = S_{k+1} - S_k,   S_0 = 0 the target
        ⟨P_i, P_k⟩ = (D G Dᵀ)_ik,   G the inner products of the snapshots, D_ii = 1, D_i,i-1 = -1

    `steps` are those of the snapshots, in order, as the rows of each matrix.

    Source: the angles between phases of training are those of arXiv:2503.21088.
    """
    count = len(steps)
    differences = np.eye(count) - np.eye(count, k=-1)
    between = {layer: differences @ g @ differences.T for layer, g in grams.items()}
    bounds = list(zip((0, *steps), steps, strict=False))
    labels = [{"from": first, "to": last} for first, last in bounds]
    sizes, turns = [], []
    for scope, place, products in places(between):
        where = {"scope": scope, "place": place}
        sizes += [{**labels[i], **where, "norm": _root(products[i, i])} for i in range(count)]
        turns += [
            {
                **labels[i],
                "other_from": bounds[j][0],
                "other_to": bounds[j][1],
                **where,
                **_angle(products, i, j),
            }
            for i in range(count)
            for j in range(i + 1, count)
        ]
    return sizes, turns


def _angle(products: np.ndarray, i: int, j: int) -> dict[str, float | None]:
    """Cosine and degrees; None where one of the two is 0."""
    lengths = _root(products[i, i]) * _root(products[j, j])
    if not lengths:
        return {"cosine": None, "degrees": None}
    cosine = float(np.clip(products[i, j] / lengths, -1, 1))
    return {"cosine": cosine, "degrees": math.degrees(math.acos(cosine))}


def _root(square: float) -> float:
    """A norm; differences of equal snapshots may come out a hair below 0."""
    return math.sqrt(max(float(square), 0.0))
