"""The value vectors of a model: the columns of its MLPs' down projections, and its output head.

Dimensions: V tokens, d hidden size, P vectors.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from expunge.errors import EvaluationError
from expunge.lora import LoraLinear
from expunge.merge.operands import KINDS, decode
from expunge.merge.sources import HEAD, Source
from expunge.quantized import weight_of

_DOWN = re.compile(
    r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.(?:mlp\.)?(?:down_proj|fc2|dense_4h_to_h)"
)

Place = tuple[int, int]
"""Layer and column of a value vector."""

Projections = Mapping[int, Callable[[], Tensor]]
"""The down projection of each layer, (d, columns) float32, formed when it is called for."""


def down_layer(name: str) -> int | None:
    """The number of the block whose down projection a module is, by its name."""
    match = _DOWN.search(name)
    return int(match[1]) if match and match.end() == len(name) else None


def gathered(projections: Projections, places: Sequence[Place]) -> Tensor:
    """The vectors at some places, each layer formed once: (P, d) float32."""
    rows: dict[Place, Tensor] = {}
    for layer in sorted({layer for layer, _ in places}):
        columns = sorted({column for own, column in places if own == layer})
        found = projections[layer]()[:, columns].T.contiguous()
        rows |= {(layer, c): row for c, row in zip(columns, found, strict=True)}
    return torch.stack([rows[place] for place in places])


def model_projections(model: nn.Module) -> Projections:
    """The down projections of a model in memory; of an adapted layer W + scale · B A."""
    found: dict[int, Callable[[], Tensor]] = {}
    for name, module in model.named_modules():
        layer = down_layer(name)
        if layer is not None and isinstance(module, nn.Linear | LoraLinear):
            _place(found, layer, name, lambda module=module: _weight(module))
    return _some(found, type(model).__name__)


def stored_projections(source: Source) -> Projections:
    """The down projections of a model on disk, perhaps with an adapter, read where they lie."""
    found: dict[int, Callable[[], Tensor]] = {}
    for name in source.checkpoint:
        layer = down_layer(name.removesuffix(".weight"))
        if layer is not None and name.endswith(".weight"):
            _place(found, layer, name, lambda name=name: _stored(source, name))
    return _some(found, source.name)


def stored_head(source: Source) -> Tensor:
    """The output head of a model on disk: (V, d) float32."""
    name = source.find(HEAD)
    if name is None:
        raise EvaluationError(f"{source.name} has no {HEAD}, and no embeddings tied to it")
    return _stored(source, name)


def _stored(source: Source, name: str) -> Tensor:
    stored = source.checkpoint[name]
    if stored.dtype not in KINDS:
        raise EvaluationError(f"{source.name}: {name} is {stored.dtype}, not a plain float")
    raw, kind = source.part(name, None).read(0, stored.size, stored.shape[-1])
    return torch.from_numpy(decode(raw, kind).reshape(stored.shape).copy())


def _weight(layer: nn.Linear | LoraLinear) -> Tensor:
    if isinstance(layer, nn.Linear):
        return weight_of(layer).cpu()
    delta = layer.scale * layer.lora_B.detach().float() @ layer.lora_A.detach().float()
    return (weight_of(layer.base) + delta).cpu()


def _place(
    found: dict[int, Callable[[], Tensor]], layer: int, name: str, read: Callable[[], Tensor]
) -> None:
    if layer in found:
        raise EvaluationError(f"layer {layer} has several down projections, {name} among them")
    found[layer] = read


def _some(found: dict[int, Callable[[], Tensor]], name: str) -> Projections:
    if not found:
        raise EvaluationError(
            f"{name} has no down projections that are known (down_proj, fc2, dense_4h_to_h)"
        )
    return found
