"""LoRA: low-rank adapters that do only the necessary arithmetic, kept as ordinary peft folders.

Dimensions: r rank, (out, in) the shape of a linear layer. ΔW = scale · B A, A (r, in), B (out, r).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from expunge import runs
from expunge.config import Section
from expunge.errors import ModelError
from expunge.registry import did_you_mean

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BEYOND_LORA = (
    *("use_dora", "bias", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora", "velora_config"),
    *("alora_invocation_tokens", "monteclora_config", "arrow_config", "kasa_config"),
)
"""Options of peft whose update is not scale · B A."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of peft after which the adapter belongs to another base."""


class Lora(Section):
    """A low-rank adapter."""

    rank: int = Field(default=32, ge=1)
    """r, the rank of each update."""

    alpha: float = Field(default=32, gt=0)
    """Numerator of the scale α/r."""

    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the inputs of A that is dropped in training."""

    targets: tuple[str, ...] | None = None
    """Last names of the linear layers to adapt; null means every one but the head."""

    layers: tuple[int, ...] | None = None
    """Blocks to adapt, counted from 0; null means all."""


class LoraLinear(nn.Module):
    """A frozen linear layer plus scale · B A x while `enabled`."""

    def __init__(self, base: nn.Linear, lora: Lora) -> None:
        super().__init__()
        self.base = base
        self.scale = lora.alpha / lora.rank
        self.dropout = lora.dropout
        self.enabled = True
        place = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(lora.rank, base.in_features, device=place))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, lora.rank, device=place))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """W x + b, plus the low-rank term: (..., in) to (..., out)."""
        y = self.base(x)
        if not self.enabled:
            return y
        x = F.dropout(x, self.dropout, self.training)
        low = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        return y + F.linear(low, (self.scale * self.lora_B).to(x.dtype))


def add_adapter(model: PreTrainedModel, lora: Lora, *, seed: int) -> dict[str, LoraLinear]:
    """Freeze `model` and put a fresh adapter on it; at the start it changes nothing (B = 0).

    Each A is drawn from a generator seeded by `seed` and the layer's place in name order.
    """
    model.requires_grad_(False)
    chosen = _target_names(model, lora)
    adapters = {}
    with torch.random.fork_rng(devices=[]):
        for number, name in enumerate(chosen):
            torch.manual_seed(seed * 100_003 + number)
            layer = LoraLinear(model.get_submodule(name), lora)  # pyright: ignore
            _replace(model, name, layer)
            adapters[name] = layer
    return adapters


def remove_adapter(model: PreTrainedModel) -> None:
    """Take every adapter off, leaving the base as it was."""
    for name, layer in adapters_of(model).items():
        _replace(model, name, layer.base)


def adapters_of(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers of `model` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The reference: within this block the adapters add nothing."""
    layers = [layer for layer in adapters_of(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def save_adapter(model: PreTrainedModel, lora: Lora, folder: Path, *, base: str) -> None:
    """Write the adapter on `model` as a peft folder; `base` is what peft should load it onto."""
    tensors = {}
    for name, layer in adapters_of(model).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().float().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().float().cpu().contiguous()
    write_adapter(tensors, adapter_config(lora, sorted(adapters_of(model)), base), folder)


def adapter_config(lora: Lora, names: list[str], base: str) -> dict[str, object]:
    """The `adapter_config.json` that peft expects; targets are given by full name."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def write_adapter(
    tensors: Mapping[str, Tensor], config: Mapping[str, object], folder: Path
) -> None:
    """Write a peft adapter folder, whole or not at all."""
    with runs.replacing(folder) as temporary:
        temporary.mkdir()
        with runs.safetensors_errors():
            save_file(dict(tensors), temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(dict(config), indent=1), encoding="utf-8")


def read_adapter(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """Factors (A, B) by layer name, and the config, of a peft LoRA folder.

    A folder whose update is more than scale · B A is refused: part of it would be lost.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} holds no {CONFIG}, so it is not an adapter folder")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS} (pickled adapters are not read)")
    config = runs.read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {config.get('peft_type')} adapter, not LoRA")
    for option in _BEYOND_LORA:
        if config.get(option) not in (None, False, "none", [], {}):
            raise ModelError(
                f"{folder} has {option}: {config[option]}; only plain LoRA (scale · B A) is read"
            )
    if str(config.get("init_lora_weights")).startswith(_CHANGES_BASE):
        raise ModelError(
            f"{folder} was initialised by {config['init_lora_weights']}, which changed its base; "
            "save it with peft's path_initial_model_for_weight_conversion to make it plain LoRA"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                name, _, which = key.removesuffix(".weight").rpartition(".")
                if which not in ("lora_A", "lora_B"):
                    raise ModelError(f"{folder}: {key} is not a plain LoRA factor")
                factors.setdefault(name.removeprefix(_PREFIX), {})[which] = file.get_tensor(key)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged: {error}") from None
    for name, pair in factors.items():
        if len(pair) != 2:
            raise ModelError(f"{folder}: {name} lacks one of lora_A and lora_B")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in factors.items()}, config


def adapter_scales(
    folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any]
) -> dict[str, float]:
    """The scale of each layer: α/r, or α/√r for rsLoRA, with α and r by layer where so given.

    Source: peft (patterns match a layer name or its ending); rsLoRA, arXiv:2312.03732.
    """
    scales = {}
    for name, (a, b) in factors.items():
        rank = _by_pattern(config.get("rank_pattern"), name, config.get("r"))
        alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        if a.dim() != 2 or b.dim() != 2 or not rank == a.shape[0] == b.shape[1]:
            raise ModelError(
                f"{folder}: {name} should have rank {rank} by its {CONFIG}, but its factors are "
                f"A {tuple(a.shape)}, B {tuple(b.shape)}"
            )
        if not isinstance(alpha, int | float) or not alpha > 0:
            raise ModelError(f"{folder}: lora_alpha must be a positive number, not {alpha!r}")
        scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapter of a peft folder on `model`, for scoring or for more training."""
    factors, config = read_adapter(folder)
    scales = adapter_scales(folder, factors, config)
    model.requires_grad_(False)
    for name, (a, b) in factors.items():
        try:
            base = model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"{folder} adapts {name}, which the model does not have") from None
        if not isinstance(base, nn.Linear) or (base.in_features, base.out_features) != (
            a.shape[1],
            b.shape[0],
        ):
            raise ModelError(f"{folder}: {name} does not have the shape of the model's layer")
        rank = a.shape[0]
        layer = LoraLinear(base, Lora(rank=rank, alpha=scales[name] * rank, dropout=0.0))
        layer.lora_A.data.copy_(a)
        layer.lora_B.data.copy_(b)
        _replace(model, name, layer)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that `name` is or ends in, as peft reads it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _target_names(model: PreTrainedModel, lora: Lora) -> list[str]:
    """Names of the linear layers to adapt, in name order; none found is an error."""
    head = model.get_output_embeddings()
    linear = {
        name: name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    known = set(linear.values())
    for target in lora.targets or ():
        if target not in known:
            raise ModelError(
                f"the model has no linear layer called '{target}'."
                f"{did_you_mean(target, known)} It has: {', '.join(sorted(known))}."
            )
    blocks = set(lora.layers) if lora.layers is not None else None
    chosen = [
        name
        for name, last in linear.items()
        if (lora.targets is None or last in lora.targets)
        and (blocks is None or blocks & {int(part) for part in name.split(".") if part.isdigit()})
    ]
    if not chosen:
        raise ModelError(f"no linear layer lies in blocks {sorted(blocks or ())}")
    return sorted(chosen)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
