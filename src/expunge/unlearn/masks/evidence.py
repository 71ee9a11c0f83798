"""What a mask's scores are made of: gradients of the NLL over a whole half, norms of inputs.

Dimensions: N tokens of a pack, in the width of a layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge import models, parallel
from expunge.data.batches import TokenSequence, pack, packs_by_length
from expunge.packs import given_to, hidden_states, in_buckets
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.optimizer import Optimizer
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.trainer import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def summed_gradient(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], config: Optimizer
) -> dict[str, Tensor]:
    """The gradient of the sum over items of their answers' mean NLL, by parameter; in float32."""
    objective = Objective((Term(half="retain", loss="nll_sequence"),))
    passes = Passes(model, {"retain": HalfData(sequences)}, objective, config.max_tokens)
    parameters = dict(model.named_parameters())
    with autocast(model.dtype, config.compute, models.device()):
        passes.backward([{"retain": (item,)} for item in range(len(sequences))])
    parallel.sum_gradients(list(parameters.values()))
    found = {}
    for name, parameter in parameters.items():
        given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = given.detach().float().mul_(len(sequences))
        parameter.grad = None
    return found


@torch.no_grad()
def input_norms(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], config: Optimizer
) -> dict[str, Tensor]:
    """For the weight of each linear layer but the head, the norm of each of its inputs over all
    tokens: (in,)."""
    head = model.get_output_embeddings()
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    squares = {
        name: torch.zeros(layer.in_features, device=layer.weight.device)
        for name, layer in layers.items()
    }

    def add(name: str, given: Tensor) -> None:
        squares[name] += given.detach().float().flatten(0, -2).square().sum(0)

    size = 1 if in_buckets(model) else config.max_tokens  # a bucket's padding would be counted
    with given_to(layers, add), autocast(model.dtype, config.compute, models.device()):
        for group in packs_by_length(sequences, max_tokens=size):
            hidden_states(model, pack(group, "document", models.device()))
    return {name: square.sqrt() for name, square in squares.items()}
