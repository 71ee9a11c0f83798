"""Model folders read in place: safetensors shards, mapped into memory and checked to the byte.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: type,
shape and place of each tensor), then the tensors end to end. Nothing of a header is believed before
it is checked: names, types, shapes, and that the places cover the file without gap or overlap.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from expunge import runs
from expunge.adapter_files import check_link
from expunge.errors import ModelError
from expunge.merge.companions import companions_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The types that can be merged; tensors of another are carried over where the models agree."""
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the format


PREFIXES = {"gpt2": "transformer.", "gpt_neo": "transformer.", "bloom": "transformer."}
"""By model type, what stands before the names of a model's tensors beneath its head."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a shard: where its bytes lie and what they mean."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of the first byte, from the start of the file."""

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.size * ITEM_BYTES[self.dtype]


class Checkpoint(Mapping[str, Stored]):
    """The tensors of a model folder by name; the bytes of one by `raw`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} holds no config.json, so it is not a model folder")
        companions_of(folder)  # a link among them is refused before anything is read
        self.tensors = _with_prefix(_read_folder(folder), self.config.get("model_type"))
        self._maps: dict[Path, np.ndarray] = {}

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def name(self) -> str:
        """What an adapter on it calls its base."""
        return str(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        config = runs.read_json(self.folder / "config.json")
        if not isinstance(config, dict):
            raise ModelError(f"{self.folder / 'config.json'} does not hold named fields")
        return config

    @property
    def files(self) -> list[Path]:
        """The shards, in order."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, read-only, where they lie: (nbytes,) uint8."""
        stored = self.tensors[name]
        if stored.file not in self._maps:
            self._maps[stored.file] = map_file(stored.file)
        return self._maps[stored.file][stored.offset : stored.offset + stored.nbytes]


def _with_prefix(tensors: dict[str, Stored], kind: Any) -> dict[str, Stored]:
    """Tensors under the names that a causal language model gives them: some families lie on the Hub
    as saved without their head, whose names lack what stands before them in one."""
    prefix = PREFIXES.get(kind) if isinstance(kind, str) else None
    if prefix is None or any(name.startswith(prefix) for name in tensors):
        return tensors
    return {n if n.startswith("lm_head.") else prefix + n: t for n, t in tensors.items()}


def map_file(path: Path) -> np.ndarray:
    """A whole file as read-only bytes, mapped: (size,) uint8."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, every claim of its header checked."""
    total = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(total - 8, _HEADER_LIMIT):
            raise ModelError(
                f"{path} is damaged: its header claims {length} bytes, the file has {total}"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: its header cannot be read ({error})") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} is damaged: its header does not name tensors")
    header.pop("__metadata__", None)
    begin = 8 + length
    tensors = [_entry(path, name, entry, begin) for name, entry in header.items()]
    place = begin
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != place:
            what = "overlaps the one before it" if tensor.offset < place else "leaves a gap"
            last = max(tensors, key=lambda tensor: tensor.offset + tensor.nbytes)
            end = last.offset + last.nbytes
            if end > total:  # what is out of place is that one, not its neighbours
                tensor, what = last, f"would end at byte {end}, but the file has {total}"
            raise ModelError(f"{path} is damaged: {tensor.name} {what}")
        place += tensor.nbytes
    if place != total:
        raise ModelError(
            f"{path} is damaged: its tensors end at byte {place}, but the file has {total}"
        )
    return {tensor.name: tensor for tensor in tensors}


def _entry(path: Path, name: str, entry: Any, begin: int) -> Stored:
    where = f"{path} is damaged: {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{where} lacks one of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ModelError(f"{where} has the unknown type {str(dtype)[:40]!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ModelError(f"{where} has a shape or offsets that are not whole numbers")
    stored = Stored(name, dtype, tuple(shape), path, begin + offsets[0])
    if stored.nbytes != offsets[1] - offsets[0]:
        raise ModelError(
            f"{where} is {dtype} {list(shape)}, {stored.nbytes} bytes, but takes "
            f"{offsets[1] - offsets[0]}"
        )
    return stored


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _read_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of every shard that transformers would read, and no others."""
    if not (folder / INDEX).is_file():
        return read_header(_shard(folder, SINGLE))
    index = runs.read_json(folder / INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map from tensors to files")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(where.values())):
        path = _shard(folder, name)
        found = read_header(path)
        for tensor in found:
            if where.get(tensor) != name:
                raise ModelError(f"{path} holds {tensor}, which {INDEX} does not place there")
        tensors |= found
    missing = sorted(where.keys() - tensors.keys())
    if missing:
        raise ModelError(f"{folder / where[missing[0]]} lacks {missing[0]}, which {INDEX} names")
    return tensors


def _shard(folder: Path, name: str) -> Path:
    """The path of a shard that lies in `folder` itself, or in the blobs of its Hub cache."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ModelError(f"{folder / INDEX} names {name[:80]!r}, which is not a safetensors file")
    path = folder / name
    if not path.is_file():
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise ModelError(
                f"{pickles[0]} is a pickle, which can run code when read; convert it where you "
                "trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
            )
        raise ModelError(f"{folder} holds no {name}, so it is not a whole safetensors model")
    check_link(folder, name)
    return path
