"""Write a full model as base plus deltas, one tensor in memory at a time.

A safetensors file is the length of its header (8 bytes), the header (JSON: type, shape and place
of each tensor), then the tensors end to end. Neither types nor shapes change here, so the header
of a shard is copied as it is, and only the bytes of changed tensors differ.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from expunge import runs
from expunge.errors import MergeError, ModelError

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
_TEMPLATES = "additional_chat_templates"


@dataclass
class Stored:
    """How much of the deltas survived rounding to the type that the base is stored in."""

    changed: int = 0
    nonzero: int = 0

    @property
    def survival(self) -> float:
        """Share of the weights with a delta whose stored value changed."""
        return self.changed / self.nonzero if self.nonzero else 1.0


def add(weight: Tensor, delta: Tensor, stored: Stored) -> Tensor:
    """W + ΔW in float32, rounded to the type of `weight`: (out, in)."""
    merged = (weight.float() + delta).to(weight.dtype)
    nonzero = delta != 0
    stored.nonzero += int(nonzero.count_nonzero())
    stored.changed += int((nonzero & (merged != weight)).count_nonzero())
    return merged


def check_fits(base: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse layers that the base lacks or holds in another shape or an unfit type."""
    if not (base / "config.json").is_file():
        raise ModelError(f"{base} holds no config.json, so it is not a model folder")
    config = runs.read_json(base / "config.json")
    tensors: dict[str, Any] = {}
    for shard in _shards(base):
        with shard.open("rb") as file:
            tensors |= _read_header(file, shard)[1]
    for layer, shape in shapes.items():
        entry = tensors.get(f"{layer}.weight")
        if entry is None:
            raise MergeError(f"{base} lacks {layer}.weight, which the branches adapt. Same model?")
        if tuple(entry["shape"]) != shape:
            raise MergeError(
                f"{layer} is {shape} in the branches but {tuple(entry['shape'])} in {base}"
            )
        if entry["dtype"] not in _TYPES:
            raise MergeError(
                f"{base} stores {layer}.weight as {entry['dtype']}; a delta can be added to "
                f"{', '.join(_TYPES)}"
            )
        if layer == "lm_head" and config.get("tie_word_embeddings"):
            raise MergeError(f"{base} ties lm_head to its embeddings, so lm_head cannot be changed")


def write_model(
    base: Path, layers: Collection[str], delta_of: Callable[[str], Tensor], out: Path
) -> Stored:
    """Write `base` with `delta_of(layer)` added to each of `layers` as the model folder `out`."""
    stored = Stored()
    with runs.replacing(out) as temporary:
        temporary.mkdir()
        for shard in _shards(base):
            with shard.open("rb") as source, (temporary / shard.name).open("wb") as sink:
                _write_shard(source, sink, shard, layers, delta_of, stored)
                sink.flush()
                os.fsync(sink.fileno())
        for pattern in _COMPANIONS:
            for path in sorted(base.glob(pattern)):
                if path.is_file() and path.name != runs.PROVENANCE:
                    shutil.copyfile(path, temporary / path.name)
        if (base / _TEMPLATES).is_dir():
            shutil.copytree(base / _TEMPLATES, temporary / _TEMPLATES)
    return stored


def _write_shard(
    source: BinaryIO,
    sink: BinaryIO,
    path: Path,
    layers: Collection[str],
    delta_of: Callable[[str], Tensor],
    stored: Stored,
) -> None:
    raw, tensors = _read_header(source, path)
    sink.write(raw)
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        content = bytearray(end - start)
        if source.readinto(content) != len(content):  # pyright: ignore[reportAttributeAccessIssue]
            raise ModelError(f"{path} is damaged: it ends within {name}")
        layer = name.removesuffix(".weight")
        if layer in layers and layer != name:
            weight = torch.frombuffer(content, dtype=_TYPES[entry["dtype"]])
            weight = weight.view(entry["shape"])
            merged = add(weight, delta_of(layer), stored)
            if not torch.isfinite(merged).all():
                raise MergeError(f"{layer} overflows {entry['dtype']} once the delta is added")
            sink.write(merged.contiguous().view(torch.uint8).numpy().data)
        else:
            sink.write(content)


def _shards(base: Path) -> list[Path]:
    """The safetensors files that transformers would read from `base`."""
    if (base / _INDEX).is_file():
        names = sorted(set(runs.read_json(base / _INDEX)["weight_map"].values()))
    else:
        names = [_SINGLE]
    for name in names:
        if not (base / name).is_file():
            raise ModelError(f"{base} holds no {name}, so it is not a whole safetensors model")
    return [base / name for name in names]


def _read_header(file: BinaryIO, path: Path) -> tuple[bytes, dict[str, Any]]:
    """The header of a safetensors file, as bytes and by tensor; the file is left at the data."""
    length = file.read(8)
    size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
    text = file.read(size) if 0 < size <= path.stat().st_size else b""
    try:
        tensors = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ModelError(f"{path} is damaged: its header cannot be read") from None
    tensors.pop("__metadata__", None)
    return length + text, tensors
