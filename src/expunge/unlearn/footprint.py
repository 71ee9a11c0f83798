"""Memory of a training stage, from its config and the lengths of its items alone.

Dimensions: L layers, d width, k width of the keys, m width between the MLP's matrices, H heads,
V vocabulary, P parameters; T tokens of a pack, n tokens of its longest sequence, r rank.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expunge import runs
from expunge.errors import ModelError
from expunge.heads import BLOCK
from expunge.models import Dtype, config_field
from expunge.quantized import BYTES_A_WEIGHT
from expunge.short_attention import places
from expunge.unlearn.masks.sections import Column, LastBlocks, Layers, Mask
from expunge.unlearn.passes import filled
from expunge.unlearn.trainer import Optimizer

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

PROCESS = 900_000_000
"""Bytes of the program itself: torch and transformers loaded, code made for its products."""


@dataclass(frozen=True)
class Shape:
    """What of a decoder its memory depends on."""

    layers: int
    width: int
    keys: int
    between: int
    heads: int
    vocabulary: int
    parameters: int

    @classmethod
    def of(cls, config: dict[str, Any], parameters: int) -> "Shape":
        """From the fields of a config.json."""
        config = config.get("text_config") or config
        needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
        found = {name: config_field(config, name) for name in needed}
        for name, value in found.items():
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"the model's config.json names no {name}")
        width, heads = found["hidden_size"], found["num_attention_heads"]
        head = config.get("head_dim") or width // heads
        return cls(
            layers=found["num_hidden_layers"],
            width=width,
            keys=head * (config.get("num_key_value_heads") or heads),
            between=config_field(config, "intermediate_size") or 4 * width,
            heads=heads,
            vocabulary=found["vocab_size"],
            parameters=parameters,
        )

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA on every linear layer of the blocks."""
        d, k, m = self.width, self.keys, self.between
        return self.layers * rank * (4 * d + 2 * (d + k) + 3 * (d + m))

    def matrices(self) -> int:
        """Parameters of the linear layers of the blocks."""
        d, k, m = self.width, self.keys, self.between
        return self.layers * (2 * d * (d + k) + 3 * d * m)

    def movable(self, mask: Mask | None) -> int:
        """Parameters of the tensors that a mask lets move, at most."""
        d, m = self.width, self.between
        block = self.matrices() // self.layers + 4 * d
        if isinstance(mask, LastBlocks):
            return mask.count * block
        if isinstance(mask, Layers):
            return len(mask.blocks or range(self.layers)) * block
        return d * m if isinstance(mask, Column) else self.parameters


@dataclass(frozen=True)
class Demand:
    """A training stage as its memory sees it."""

    optimizer: Optimizer
    weights: Dtype
    """Type in which the model is held."""
    passes: tuple[tuple[int, ...], ...]
    """Tokens of the micro-batches of each pass of each step."""
    piece: int
    """Tokens of the largest piece of a micro-batch that cannot be forwarded in parts."""
    longest: int
    """Tokens of the longest sequence."""
    rank: int | None = None
    """Of the adapter; None where every weight is trained."""
    trained: int | None = None
    """Parameters of the adapter, where they are known."""
    mask: Mask | None = None
    dropout: bool = False
    kl: bool = False
    """Whether a loss reads the KL to the reference."""
    kept: int = 0
    """Tokens whose reference states are held."""
    quantized: bool = False
    """Whether the blocks' matrices are held in 4 bits, and unpacked one by one."""
    shards: int = 1
    """Processes that each hold a slice of the model, and of what is trained of it."""
    recomputes: bool = True
    """Whether its step rule goes with checkpointing."""
    buffers: int = 0
    """Float32 copies of what is trained, beside the weights, one gradient and two moments."""

    def tokens(self) -> int:
        """Tokens of the largest pack; one piece of a micro-batch may exceed `max_tokens`, alone."""
        limit, largest = self.optimizer.max_tokens, 0
        for sizes in set(self.passes):
            if sum(sizes) > largest:
                packs = filled(sizes, limit)
                largest = max(largest, *(sum(sizes[i] for i in pack) for pack in packs))
        return min(largest, max(limit, self.piece))

    def at(self, **settings: Any) -> "Demand":
        """The same stage under other settings of its optimizer."""
        return replace(self, optimizer=self.optimizer.model_copy(update=settings))


def checkpoints(optimizer: Optimizer) -> bool:
    """Whether each layer is computed again in the backward pass."""
    return optimizer.checkpointing


def shape_of(folder: Path) -> Shape:
    """The shape of the model in a folder, from its config and the headers of its files."""
    return Shape.of(runs.read_json(folder / "config.json"), count_parameters(folder))


def count_parameters(folder: Path) -> int:
    """Parameters of a safetensors folder, from its headers alone."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for size in tensor["shape"]:
                    count *= size
                total += count
    return total


def memory_of(shape: Shape, demand: Demand, *, scale: float = 1.0) -> int:
    """Bytes at the peak of a training stage: what stays, and what a pack of T tokens adds.

    `scale` multiplies the part that grows with T, where a measured step says by how much.
    """
    return int(PROCESS + lasting(shape, demand) + scale * passing(shape, demand))


def lasting(shape: Shape, demand: Demand) -> int:
    """Weights, gradient, moments and references: there for the whole stage."""
    held = weight_bytes(shape, demand) / demand.shards + gathered_bytes(shape, demand)
    trained, narrow = shape.movable(demand.mask) / demand.shards, 0
    if demand.rank is not None:  # every process holds the whole adapter
        trained = demand.trained or shape.adapter(demand.rank)
        held += 4 * trained
    elif demand.optimizer.compute != "float32" and demand.shards == 1:
        narrow = shape.parameters * BYTES[demand.optimizer.compute]  # kept while autocast is on
    states = demand.kept * shape.width * BYTES[demand.weights]
    moments = 2 if demand.optimizer.kind == "adamw" else 0
    return int(held + narrow + states + 4 * trained * (1 + moments + demand.buffers))


def weight_bytes(shape: Shape, demand: Demand) -> int:
    """The model as it is held: with `quantized` the blocks' matrices in codes and scales."""
    narrow = min(shape.matrices(), shape.parameters) if demand.quantized else 0
    wide = shape.parameters - narrow
    return int(narrow * BYTES_A_WEIGHT) + wide * BYTES[demand.weights]


def gathered_bytes(shape: Shape, demand: Demand) -> int:
    """Of a sharded model: what is whole at once, two blocks, the embedding and the head."""
    if demand.shards == 1:
        return 0
    blocks = 2 * shape.matrices() // shape.layers
    return (blocks + 2 * shape.vocabulary * shape.width) * BYTES[demand.weights]


def passing(shape: Shape, demand: Demand) -> float:
    """What one pack adds: kept activations, one layer's gradients, a block of logits."""
    tokens = demand.tokens()
    layer = tokens * layer_bytes(shape, demand)
    kept = shape.layers * layer
    if checkpoints(demand.optimizer):
        kept = shape.layers * tokens * shape.width * BYTES[demand.weights] + layer
    wide = tokens * (3 * shape.between + 4 * shape.width) * _product(demand)
    block = min(BLOCK, tokens) * shape.vocabulary
    logits = block * (4 * (4 if demand.kl else 2) + _product(demand))
    if demand.quantized:  # the largest matrix, unpacked for its product
        wide += shape.between * shape.width * BYTES[demand.weights]
    if demand.rank is None:  # the head has a gradient of its own, of each pack and of the sum
        logits += shape.vocabulary * shape.width * (8 + 2 * _product(demand))
    return kept + wide + logits


def layer_bytes(shape: Shape, demand: Demand) -> float:
    """Bytes a token that one decoder layer keeps for the backward pass.

    Each norm keeps its input in float32; q, k, v, the softmax's weights, and what stands before and
    behind the MLP's product are kept in the type of the products. Inputs of linear layers are kept
    for LoRA's A or for the weight's gradient; dropout keeps one for each layer, and its mask.
    """
    w, d, k, m = _product(demand), shape.width, shape.keys, shape.between
    norms = 2 * 4 * d
    attention = w * (d + 2 * k + shape.heads * places(demand.longest))
    gates = 3 * m * w
    inputs = w * (3 * d + m)
    if demand.rank is None:
        norms += 2 * d * (4 if demand.weights == "float32" else BYTES[demand.weights])
    else:
        inputs += 7 * demand.rank * w
    if demand.dropout:
        inputs += w * (3 * d) + w * (6 * d + m)
    return norms + attention + gates + inputs


def _product(demand: Demand) -> int:
    """Bytes of a number in the matrix products."""
    narrow = demand.weights != "float32"
    return BYTES[demand.weights if narrow else demand.optimizer.compute]


def sizes(groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[int, ...]:
    """Tokens of each micro-batch of item indices."""
    return tuple(sum(lengths[index] for index in group) for group in groups)
