"""Losses on hidden states: pure functions from the output of one block to a loss a token.

Dimensions: N scored tokens, d width. The states at a token are those of the position that predicts
it. Blocks count from 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge.packs import decoder_blocks
from expunge.unlearn.losses import Hidden, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rmu(now: Hidden, *, coefficient: float = 20.0, seed: float = 0) -> Tensor:
    """Representation misdirection: states go to one random point, whatever the token.

        L = ‖h - c u‖² / d,    c = coefficient,    u ~ uniform[0, 1)^d scaled to length 1

    `seed` draws u, the same at every step and in a run that goes on. What c does depends on how
    long the states are at that block.

    Source: Li et al. 2024 (WMDP), arXiv:2403.03218.
    Differs: the released code averages over padding too.
    """
    return _square_distance(now.states, coefficient * direction(now.states, seed))  # (N,)


def adaptive_rmu(now: Hidden, *, scale: float = 5.0, seed: float = 0) -> Tensor:
    """RMU whose point lies as far out as the reference's states do, times a scale.

        L = ‖h - c u‖² / d,    c = scale · mean ‖h_ref‖ over the items of the half

    c is read from the reference, so it is fixed before the first update.

    Source: Dang et al. 2024, arXiv:2408.06223.
    Differs: the mean is over all items; the released code takes that of the first batch.
    """
    return _square_distance(now.states, scale * now.norm * direction(now.states, seed))  # (N,)


def hidden_distance(now: Hidden) -> Tensor:
    """Squared distance of the states from those of the reference.

        L = ‖h - h_ref‖² / d

    Source: the retain term of RMU, Li et al. 2024 (WMDP), arXiv:2403.03218.
    """
    assert now.reference is not None
    return _square_distance(now.states, now.reference)  # (N,)


def direction(states: Tensor, seed: float) -> Tensor:
    """The random point u of length 1: (d,)."""
    generator = torch.Generator().manual_seed(int(seed))
    point = torch.rand(states.shape[-1], generator=generator)
    return (point / point.norm()).to(states.device)


def freeze_beyond(model: PreTrainedModel, deepest: int) -> None:
    """Freeze what lies behind the block `deepest`, which no loss reaches that ends there."""
    for module in _behind(model, deepest):
        module.requires_grad_(False)


def reached(model: PreTrainedModel, deepest: int | None) -> set[str]:
    """The parameters that a loss reaches which reads no block behind `deepest`; null: all."""
    behind = [] if deepest is None else _behind(model, deepest)
    beyond = {parameter for module in behind for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if parameter not in beyond}


def _behind(model: PreTrainedModel, deepest: int) -> list[nn.Module]:
    """The modules behind the block `deepest`."""
    blocks = decoder_blocks(model)
    behind: list[nn.Module] = list(blocks[deepest + 1 :])
    passed = False
    for name, child in model.get_decoder().named_children():
        if child is not blocks and (passed or ("norm" in name and "embed" not in name)):
            behind.append(child)
        passed = passed or child is blocks
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        behind.append(head)
    return behind


def _square_distance(states: Tensor, point: Tensor) -> Tensor:
    return (states - point).square().mean(-1)


_TEST = "tests/unlearn/test_hidden.py::test_values_worked_by_hand"

FORGET_BY_STATES = {
    "rmu": Loss(
        rmu, reads="hidden", mean_over="tokens", cost="< 1 C", fidelity="adapted", test=_TEST
    ),
    "adaptive_rmu": Loss(
        adaptive_rmu,
        reads="hidden",
        needs_reference_hidden="norms",
        mean_over="tokens",
        cost="< 1 C",
        fidelity="adapted",
        test=_TEST,
    ),
}

RETAIN_BY_STATES = {
    "hidden_distance": Loss(
        hidden_distance,
        half="retain",
        reads="hidden",
        needs_reference_hidden="states",
        mean_over="tokens",
        cost="< 1 C",
        test=_TEST,
    ),
}
