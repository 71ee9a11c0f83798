"""Linear layers, whichever way their weight lies: torch's hold (out, in), GPT-2's Conv1D (in, out).

A LoRA of either has factors A (r, in) and B (out, r); its ΔW = scale · B A lies as the weight does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from expunge.adapter_files import block_of
from expunge.errors import ModelError
from expunge.registry import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is y = W x + b, of a kind that can be adapted."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is a linear one whose weight lies as (in, out)."""
    if isinstance(layer, nn.Linear):
        return False
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; of one in four bits too, whose weight has another shape."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    inner, out = cast(Tensor, layer.weight).shape
    return out, inner


def chosen_layers(
    model: PreTrainedModel, targets: Collection[str] | None, blocks: Sequence[int] | None
) -> list[str]:
    """Names of the linear layers but the head that have one of some last names and lie in some
    blocks, in name order; null means all, and none found is an error."""
    head = model.get_output_embeddings()
    linear = {
        name: name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if is_linear(module) and module is not head
    }
    if not linear:
        raise ModelError(
            f"{type(model).__name__} has no linear layers, which LoRA adapts; say training: full"
        )
    known = set(linear.values())
    for target in targets or ():
        if target not in known:
            raise ModelError(
                f"the model has no linear layer called '{target}'."
                f"{did_you_mean(target, known)} It has: {', '.join(sorted(known))}."
            )
    there = sorted({block for name in linear if (block := block_of(name)) is not None})
    for block in blocks or ():
        if block not in there:
            places = f"{there[0]} to {there[-1]}" if there else "no blocks"
            raise ModelError(
                f"lora.layers names block {block}, and the model's linear layers lie in {places}"
            )
    chosen = [
        name
        for name, last in linear.items()
        if (targets is None or last in targets) and (blocks is None or block_of(name) in blocks)
    ]
    if not chosen:
        raise ModelError(f"no layer of lora.targets lies in the blocks {sorted(blocks or ())}")
    return sorted(chosen)
