"""A frozen base in four bits, held by bitsandbytes, for LoRA to train on.

Dimensions: (out, in) the shape of a linear layer. A weight is 4 bits of a code, scaled by the
largest of its block of 64, the scales themselves in 8 bits.

Source: QLoRA, Dettmers et al. 2023, arXiv:2305.14314.
"""

import importlib
import importlib.util
import logging
import sys
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge import sharding
from expunge.errors import ModelError

Quantize = Literal["nf4", "fp4"]

BLOCK = 64
"""Weights that share a scale."""

BYTES_A_WEIGHT = 0.5 + 1 / BLOCK + 4 / (BLOCK * 256)
"""Code, scale, and the float32 that 256 scales share."""

INSTALL = "model.quantize needs bitsandbytes: pip install 'expunge[qlora]'"


def check_possible() -> None:
    """Refuse quantising before any compute is spent: without the package, or with sharded weights.

    Each process of a replicated launch holds the quantised model whole.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(INSTALL)
    if sharding.wanted():
        raise ModelError(
            "model.quantize holds weights in blocks that cannot be sliced; launch without FSDP and "
            "ZeRO-3, or leave it out"
        )


def loading(kind: Quantize, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What transformers is asked for, to quantise linear layers as it reads them, head left out."""
    from transformers import BitsAndBytesConfig

    bitsandbytes()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def settle(model: nn.Module) -> None:
    """Make the quantised layers of a loaded model safe to train on.

    bitsandbytes repacks the weights of a layer that is called in evaluation on some CPUs, and then
    passes no gradient through it; and its CPU kernels unpack rows that end within a block wrongly.
    """
    for name, layer in model.named_modules():
        if not is_quantized(layer):
            continue
        width = layer.in_features
        if layer.weight.device.type == "cpu" and width % BLOCK:  # pyright: ignore
            raise ModelError(
                f"model.quantize: {name} has rows of {width}, and on a CPU bitsandbytes unpacks "
                f"only multiples of {BLOCK}"
            )
        layer.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer holds its weight in four bits."""
    weight = getattr(layer, "weight", None)
    return isinstance(layer, nn.Linear) and getattr(weight, "quant_state", None) is not None


def weight_of(layer: nn.Linear) -> Tensor:
    """The weight of a linear layer, out of its four bits if it is held so: (out, in) float32."""
    weight = layer.weight.detach()
    if not is_quantized(layer):
        return weight.float()
    state = layer.weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
    return bitsandbytes().functional.dequantize_4bit(weight.data, state).float()


def bitsandbytes() -> ModuleType:
    """The package, kept from code on the Hub: on some CPUs its import fetches a compiled kernel."""
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    fetcher = sys.modules.get("kernels")
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType] - its import fails
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if fetcher is not None:
            sys.modules["kernels"] = fetcher
