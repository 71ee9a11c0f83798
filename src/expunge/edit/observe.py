"""What a model's layers are given while it reads texts.

Dimensions: N tokens of a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge.data.batches import TokenSequence, pack
from expunge.edit.repair import Sketch
from expunge.errors import EditError
from expunge.evaluate.value_vectors import down_layer
from expunge.packs import given_to, hidden_states
from expunge.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OUT = re.compile(
    r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\."
    r"(?:self_attn|attention|attn)\.(?:o_proj|out_proj|dense)$"
)

Named = dict[int, tuple[str, nn.Linear]]
"""By block, the name and the layer."""


def down_projections(model: nn.Module) -> Named:
    """The down projection of each block's MLP."""
    found: Named = {}
    for name, module in model.named_modules():
        layer = down_layer(name)
        if layer is not None and isinstance(module, nn.Linear):
            found[layer] = (name, module)
    if not found:
        raise EditError(
            f"{type(model).__name__} has no down projections that are known "
            "(down_proj, fc2, dense_4h_to_h)"
        )
    return found


def output_projections(model: nn.Module) -> Named:
    """The output projection of each block's attention."""
    found: Named = {}
    for name, module in model.named_modules():
        match = _OUT.search(name)
        if match and isinstance(module, nn.Linear):
            found[int(match[1])] = (name, module)
    if not found:
        raise EditError(
            f"{type(model).__name__} has no output projections of attention that are known "
            "(o_proj, out_proj, dense)"
        )
    return found


def sketches(
    model: PreTrainedModel, texts: Sequence[TokenSequence], names: Sequence[str], rank: int
) -> dict[str, Sketch]:
    """How the inputs of some linear layers lie, over texts; layers that share inputs share one."""
    layers = {name: model.get_submodule(name) for name in names}
    found: dict[str, Sketch] = {}
    leaders: dict[str, str] = {}
    seen: dict[str, Tensor] = {}

    def take(name: str, x: Tensor) -> None:
        seen[name] = x
        leader = leaders.get(name)
        if leader is None:
            same = (other for other in found if seen.get(other) is x)
            leader = leaders[name] = next(same, name)
        if leader == name:
            found.setdefault(name, Sketch(rank)).add(x.flatten(0, -2))
        elif seen.get(leader) is not x:
            raise EditError(f"{name} and {leader} shared their inputs once and then did not")

    read(model, texts, layers, take, after=seen.clear)
    return {name: found[leader] for name, leader in leaders.items()}


def read(
    model: PreTrainedModel,
    texts: Sequence[TokenSequence],
    layers: Mapping[str, nn.Module],
    take: Callable[[str, Tensor], None],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Forward texts one by one, handing each layer's inputs to `take`."""
    device = next(model.parameters()).device
    with given_to(layers, take), torch.no_grad(), progress("read", len(texts), "texts") as bar:
        for text in texts:
            hidden_states(model, pack([text], "document", device))
            after()
            bar(1)
