"""Adapters on disk: ordinary peft folders of plain LoRA, written whole and read with care."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from expunge import runs
from expunge.disk import safetensors_errors
from expunge.errors import ModelError

REPEATED = 4
"""Parts of a pattern that may repeat: a name of n letters takes n to the power of their number."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_BEYOND_LORA = (
    *("use_dora", "bias", "lora_bias", "modules_to_save", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora", "velora_config"),
    *("alora_invocation_tokens", "monteclora_config", "arrow_config", "kasa_config"),
)
"""Options of peft whose update is not scale · B A."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of peft after which the adapter belongs to another base."""


def adapter_config(
    names: list[str],
    base: str,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    transposed: bool = False,
) -> dict[str, object]:
    """The `adapter_config.json` that peft expects; targets are given by full name.

    `transposed` says that the base's weights lie as (in, out).
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": transposed,
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
        with safetensors_errors():
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
    for name in (CONFIG, WEIGHTS):
        check_link(folder, name)
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
                    raise ModelError(f"{folder}: {_no_factor(key)}")
                factors.setdefault(name.removeprefix(PREFIX), {})[which] = file.get_tensor(key)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged: {error}") from None
    for name, pair in factors.items():
        if len(pair) != 2:
            raise ModelError(f"{folder}: {name} lacks one of lora_A and lora_B")
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in factors.items()}, config


def check_link(folder: Path, name: str) -> None:
    """Refuse a file that is a link out of its folder, unless to the blobs of its Hub cache."""
    home, real = folder.resolve(), (folder / name).resolve()
    if not real.is_relative_to(home) and real.parent != home.parent.parent / "blobs":
        raise ModelError(
            f"{folder / name} is a link out of its folder, to {real}; put the file itself there"
        )


def _no_factor(key: str) -> str:
    """What a tensor is that is no A or B of a linear layer, and what takes it."""
    merge = "expunge merge FILE, with output: model, takes it"
    if "lora_embedding_" in key or key.endswith("embed_tokens.base_layer.weight"):
        return f"{key} adapts an embedding, and only linear layers are read; {merge}"
    return f"{key} is not a plain LoRA factor; {merge}"


def adapter_scales(
    folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any]
) -> dict[str, float]:
    """The scale of each layer: α/r, or α/√r for rsLoRA, with α and r by layer where so given.

    Source: peft (patterns match a layer name or its ending); rsLoRA, arXiv:2312.03732.
    """
    scales = {}
    for name, (a, b) in factors.items():
        rank = by_pattern(config.get("rank_pattern"), name, config.get("r"))
        alpha = by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        if a.dim() != 2 or b.dim() != 2 or not rank == a.shape[0] == b.shape[1]:
            raise ModelError(
                f"{folder}: {name} should have rank {rank} by its {CONFIG}, but its factors are "
                f"A {tuple(a.shape)}, B {tuple(b.shape)}"
            )
        if not isinstance(alpha, int | float) or not alpha > 0:
            raise ModelError(f"{folder}: lora_alpha must be a positive number, not {alpha!r}")
        scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales


def block_of(name: str) -> int | None:
    """The block that a layer lies in, counted from 0, by its name; None outside any."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def blocks_of(names: Iterable[str]) -> int:
    """How many blocks there are up to the last that a layer of these names lies in."""
    return 1 + max((block for name in names if (block := block_of(name)) is not None), default=-1)


def by_pattern(patterns: Any, name: str, default: Any) -> Any:
    """The value of the first pattern that `name` is or ends in, as peft reads it.

    A pattern that could take exponential time is a `ModelError`: one with a repeated group, with a
    group of another kind than (…) and (?:…), which could hide one, or with many repetitions.
    """
    if not isinstance(patterns or {}, Mapping):
        raise ModelError(f"patterns map layers to numbers; {str(patterns)[:40]!r} does not")
    for pattern, value in (patterns or {}).items():
        try:
            if re.search(r"\)[*+{?]|\(\?[^:]", pattern):
                raise ModelError(
                    f"the pattern {pattern[:80]!r} repeats groups; name layers plainly"
                )
            if len(re.findall(r"[*+{]", pattern)) > REPEATED:
                raise ModelError(
                    f"the pattern {pattern[:80]!r} repeats more than {REPEATED} parts; name layers "
                    "plainly"
                )
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise ModelError(f"{pattern[:80]!r} is not a pattern: {error}") from None
    return default
