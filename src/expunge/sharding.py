"""FSDP2: each rank holds a slice of every weight, and gathers a layer while it is needed.

The layers are sharded one by one, and what is outside them (embedding, norm, head) together.
Gradients of slices are summed over ranks, not averaged, like those that each rank holds whole.

torch's own part in this takes 0.7 s and 50 MB to import: that is left to `shard`. Where it has not
been imported, nothing is sliced.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from expunge import parallel, zero
from expunge.errors import RunError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel


def wanted() -> bool:
    """Whether `accelerate launch` asks for FSDP2 or ZeRO-3; what we do not do is refused."""
    if zero.wanted():
        return True
    if parallel.world() == 1 or not _asked("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise RunError("FSDP version 1 is not supported; set fsdp_version: 2")
    if _asked("FSDP_OFFLOAD_PARAMS"):
        raise RunError("fsdp_offload_params is not supported; set it to false")
    if _asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise RunError(
            "fsdp_activation_checkpointing is not read; set it to false, and "
            "optimizer.checkpointing: true in the recipe"
        )
    return True


def shard(model: PreTrainedModel) -> None:
    """Keep a slice of each weight on this rank's device; the model may lie on the CPU before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = torch.device(parallel.device())
    parallel.barrier()
    mesh = init_device_mesh(device.type, (parallel.world(),))
    if zero.wanted():
        zero.shard(model, mesh)
        return
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false"
    decoder = model.get_decoder()
    blocks = next(child for child in decoder.children() if isinstance(child, nn.ModuleList))
    for layer in blocks:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    # The head is read after the decoder's forward pass, so the outermost weights stay gathered
    # until the backward pass ends.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if _is_module(module):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    model.decode = lambda *given, **options: decoder(*given, **options)  # pyright: ignore
    register_fsdp_forward_method(model, "decode")


def is_sharded(model: nn.Module) -> bool:
    """Whether the ranks hold slices of the model's weights."""
    return _is_module(model) or zero.is_sliced(model)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name, as this rank holds it."""
    if zero.is_sliced(model):
        return zero.slices(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def release(model: nn.Module) -> None:
    """Go back to slices after passes without a gradient, which leave weights gathered."""
    for module in model.modules():
        if _is_module(module):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's slice, or a whole tensor itself."""
    return tensor.to_local() if is_sliced(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor gathered from all ranks, who all must ask for it."""
    if hasattr(tensor, "slice"):
        return zero.gathered(tensor)
    return tensor.full_tensor() if is_sliced(tensor) else tensor


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of a weight, of which a parameter may be a flat slice."""
    return getattr(parameter, "whole_shape", parameter.shape)


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, sliced as `example` is."""
    tensor = tensor.to(example.device).view(example.shape)
    if not is_sliced(example):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def norm_of_all(norm: float, tensors: Sequence[Tensor]) -> float:
    """The 2-norm of whole tensors, from the `norm` of what this rank holds of them."""
    if not any(map(is_sliced, tensors)):
        return norm
    return math.sqrt(parallel.total({"square": norm**2})["square"])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every weight, gathered from all ranks to the memory of each; shared ones stay shared."""
    found: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in found:
            gathered = whole(tensor).detach()
            found[id(tensor)] = gathered.cpu() if parallel.is_main() else gathered.new_empty(0)
    return {name: found[id(tensor)] for name, tensor in state.items()}


def is_sliced(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this rank holds a slice of the tensor alone."""
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def _is_module(module: nn.Module) -> TypeGuard[FSDPModule]:
    found = sys.modules.get("torch.distributed.fsdp")
    return found is not None and isinstance(module, found.FSDPModule)


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"
