"""DeepSpeed ZeRO-3: each rank holds a slice of every weight, gathered while its layer runs.

DeepSpeed slices the weights and gathers them; our optimiser moves the slices. Gradients are summed
over ranks and scattered as soon as a weight's is whole. Dimensions: V vocabulary, d width.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import Parameter

from expunge import parallel
from expunge.errors import RunError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def wanted() -> bool:
    """Whether `accelerate launch` asks for ZeRO-3; what we do not do is refused."""
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if parallel.world() == 1 or not asked:
        return False
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        raise RunError(
            f"deepspeed_config_file ({file}) is not read; leave it out, and set zero_stage: 3 and "
            "the devices of offloading to none, as configs/accelerate/zero3.yaml does"
        )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    if stage != "3":
        raise RunError(f"ZeRO stage {stage} is not supported; set zero_stage: 3")
    for part in ("OPTIMIZER", "PARAM"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none") != "none":
            raise RunError("offloading by DeepSpeed is not supported; set the devices to none")
    return True


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Keep a flat slice of each weight on this rank's device."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls torch by a name that is to change.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    import deepspeed  # pyright: ignore[reportMissingImports]
    from deepspeed.runtime.zero.parameter_offload import (  # pyright: ignore[reportMissingImports]
        DeepSpeedZeRoOffload,
    )

    # Its own all-reduce in shared memory would need a compiler, and is not called here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    offload = DeepSpeedZeRoOffload(
        model,
        timers=None,
        ds_config=settings,
        param_persistence_threshold=0,  # a kept copy would not see what the optimiser does
        max_reuse_distance=0,
    )
    decoder, head = model.get_decoder(), model.get_output_embeddings()

    def decode(**options: Any) -> Any:
        coordinator = offload.get_param_coordinator()
        # Embeddings stay gathered after a backward pass, and the optimiser has moved their slices.
        coordinator.release_backward_leftovers()
        coordinator.reset_step()
        return decoder(**options)

    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(mesh.device_type))
    for parameter in model.parameters():
        _slice(parameter, mesh)
        parameter.register_post_accumulate_grad_hook(_scatter)
    model.decode = decode  # pyright: ignore
    model.gathered_head = lambda: _Gathered.apply(head.weight)  # pyright: ignore


def is_sliced(model: nn.Module) -> bool:
    """Whether the ranks hold slices of the model's weights."""
    return hasattr(model, "gathered_head")


def slices(model: nn.Module) -> dict[str, Parameter]:
    """What is trained, by name: the slice of each weight, or a weight that every rank holds."""
    return {
        name: getattr(parameter, "slice", parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def gathered(parameter: Tensor) -> Tensor:
    """A sliced weight whole, in its shape, gathered from all ranks."""
    return parameter.slice.detach().full_tensor().view(parameter.ds_shape)  # pyright: ignore


class _Gathered(torch.autograd.Function):
    """A sliced weight as a tensor; its gradient is summed over ranks and scattered."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return gathered(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        _add_to_slice(ctx.parameter, gradients[0])


def _slice(parameter: Tensor, mesh: DeviceMesh) -> None:
    """Give the weight its `slice`: DeepSpeed's part of it, the last one without its padding."""
    from torch.distributed.tensor import DTensor, Shard

    part = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
    count = parameter.ds_numel  # pyright: ignore[reportAttributeAccessIssue]
    mine = max(0, min(len(part), count - parallel.rank() * len(part)))
    held = DTensor.from_local(
        part[:mine], mesh, [Shard(0)], run_check=False, shape=torch.Size([count]), stride=(1,)
    )
    parameter.slice = Parameter(held)  # pyright: ignore[reportAttributeAccessIssue]
    parameter.slice.whole_shape = parameter.ds_shape  # pyright: ignore


def _scatter(parameter: Tensor) -> None:
    assert parameter.grad is not None
    _add_to_slice(parameter, parameter.grad)
    parameter.grad = None


@torch.no_grad()
def _add_to_slice(parameter: Tensor, gradient: Tensor) -> None:
    from torch.distributed.tensor import DTensor

    held, size = parameter.slice, len(parameter.ds_tensor)  # pyright: ignore
    flat = gradient.new_zeros(size * parallel.world())
    flat[: gradient.numel()] = gradient.reshape(-1)
    mine = flat.new_empty(size)
    dist.reduce_scatter_single(mine, flat)
    local = mine[: len(held.to_local())]
    if held.grad is None:
        held.grad = DTensor.from_local(
            local,
            held.device_mesh,
            held.placements,
            run_check=False,
            shape=held.shape,
            stride=held.stride(),
        )
    else:
        held.grad.to_local().add_(local)
