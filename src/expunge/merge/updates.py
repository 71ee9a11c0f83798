"""Adapters as updates of stored tensors: every kind of LoRA that peft saves.

Dimensions: r rank, (out, in) the shape of a linear layer, V words of a vocabulary.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from expunge import runs
from expunge.adapter_files import CONFIG, PREFIX, WEIGHTS, by_pattern, check_link
from expunge.errors import ModelError
from expunge.merge.checkpoint import FLOATS, Checkpoint, Stored, map_file, read_header
from expunge.merge.operands import (
    KINDS,
    Factors,
    Part,
    Update,
    Whole,
    added,
    decode,
    low_rank_of,
)

_UNREAD = (
    *("lora_bias", "layer_replication", "trainable_token_indices", "target_parameters"),
    *("use_qalora", "use_bdlora", "velora_config", "alora_invocation_tokens"),
    *("monteclora_config", "arrow_config", "kasa_config", "megatron_config"),
)
"""Options of peft whose update is something else."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ENDINGS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


class Adapter:
    """One adapter folder: which tensors of a base it changes, and how."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ModelError(f"{folder} holds no {name}, so it is not an adapter folder")
            check_link(folder, name)
        self.config = _checked(folder, runs.read_json(folder / CONFIG))
        self._tensors = read_header(folder / WEIGHTS)
        self._raw = map_file(folder / WEIGHTS)
        self.factors: dict[str, dict[str, Stored]] = {}
        self.replaced: dict[str, Stored] = {}
        for key, stored in self._tensors.items():
            name = key.removeprefix(PREFIX)
            ending = next((e for e in _ENDINGS if name.endswith(e)), None)
            if ending:
                layer = name.removesuffix(ending)
                self.factors.setdefault(layer, {})[_ENDINGS[ending]] = stored
            else:
                plain = name.replace(".modules_to_save", "").replace(".base_layer", "")
                self.replaced[plain] = stored

    def names(self) -> set[str]:
        """The tensors of the base that it changes."""
        return {f"{layer}.weight" for layer in self.factors} | set(self.replaced)

    def part(self, name: str, base: Checkpoint) -> Part | None:
        """What it makes of one tensor of `base`; None where it leaves it alone."""
        found = self.factors.get(name.removesuffix(".weight"))
        update = self._update(name, found, base) if found else None
        if name not in self.replaced:
            return update
        stored = self.replaced[name]
        self._fits(name, stored.shape, base)
        whole = Whole(self._bytes(stored), stored.dtype, str(stored.file))
        return added(whole, update, stored.shape[-1]) if update else whole

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that it changes."""
        lora = {f"{layer}.weight": self._shape(layer, f) for layer, f in self.factors.items()}
        return lora | {name: stored.shape for name, stored in self.replaced.items()}

    @property
    def ranks(self) -> list[int]:
        """The rank of each layer."""
        found = (f.get("a") or f.get("embedding_a") for f in self.factors.values())
        return [stored.shape[0] for stored in found if stored is not None and stored.shape]

    def check(self, base: Checkpoint) -> None:
        """Refuse an adapter that changes what the base does not have, or not so shaped."""
        self._check_tied(base)
        for name in sorted(self.names()):
            self.part(name, base)
        for found in self.factors.values():
            for stored in found.values():
                if not np.isfinite(self._numbers(stored)).all():
                    raise ModelError(f"{stored.file}: {stored.name} holds NaN or infinite numbers")

    def _check_tied(self, base: Checkpoint) -> None:
        """Refuse what would part a head from the embeddings that it is tied to, or lose it."""
        if not base.config.get("tie_word_embeddings"):
            return
        apart = [n for n in self.names() if n.endswith("lm_head.weight") and n not in base]
        apart += [
            name
            for name, stored in self.replaced.items()
            if name.endswith("embed_tokens.weight") and ".base_layer." not in stored.name
        ]
        if apart:
            raise ModelError(
                f"{self.folder} changes {min(apart)} alone, and {base.folder} ties its head to its "
                "embeddings: merge it onto a base saved with tie_word_embeddings: false"
            )

    def _update(self, name: str, found: dict[str, Stored], base: Checkpoint) -> Update:
        """Its factors are read when they are asked for, however many layers there are."""
        layer = name.removesuffix(".weight")
        one, two = self._pair(layer, found)
        scale = np.float32(self._scale(layer, one.shape[0], one.shape, two.shape))
        swapped, (rows, columns) = self._swapped(found), self._shape(layer, found)
        self._fits(name, (rows, columns), base)

        def factors() -> Factors:
            a, b = self._numbers(one), self._numbers(two)
            if swapped:
                a, b = b.T, a.T
            return np.require(a, requirements=["C", "W"]), np.ascontiguousarray(scale * b)

        if "magnitude" not in found:
            return low_rank_of(factors)
        whole = Whole(base.raw(name), base[name].dtype)
        magnitude = self._numbers(found["magnitude"]).ravel()
        return _dora(low_rank_of(factors), magnitude, whole, columns)

    def _pair(self, layer: str, found: dict[str, Stored]) -> tuple[Stored, Stored]:
        """lora_A (r, in) and lora_B (out, r) of a layer."""
        embedding = "embedding_a" in found or "embedding_b" in found
        keys = ("embedding_a", "embedding_b") if embedding else ("a", "b")
        if any(key not in found for key in keys):
            raise ModelError(f"{self.folder}: {layer} lacks one of lora_A and lora_B")
        one, two = (found[key] for key in keys)
        shapes = one.shape, two.shape
        if any(len(shape) != 2 for shape in shapes) or one.shape[0] != two.shape[1]:
            raise ModelError(f"{self.folder}: {layer} has factors of {shapes[0]} and {shapes[1]}")
        return one, two

    def _swapped(self, found: dict[str, Stored]) -> bool:
        """Whether the weight is stored as (in, out), or is an embedding's."""
        return bool("embedding_a" in found or self.config.get("fan_in_fan_out"))

    def _shape(self, layer: str, found: dict[str, Stored]) -> tuple[int, int]:
        """The shape of the weight that a layer's factors change."""
        one, two = self._pair(layer, found)
        out, inner = two.shape[0], one.shape[1]
        return (inner, out) if self._swapped(found) else (out, inner)

    def _scale(self, layer: str, rank: int, *shapes: tuple[int, ...]) -> float:
        stated = by_pattern(self.config.get("rank_pattern"), layer, self.config.get("r"))
        alpha = by_pattern(self.config.get("alpha_pattern"), layer, self.config.get("lora_alpha"))
        if stated != rank:
            raise ModelError(
                f"{self.folder}: {layer} should have rank {stated} by its {CONFIG}, but its "
                f"factors are {' and '.join(map(str, shapes))}"
            )
        if not isinstance(alpha, int | float) or not alpha > 0:
            raise ModelError(f"{self.folder}: lora_alpha must be a positive number, not {alpha!r}")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _fits(self, name: str, shape: tuple[int, ...], base: Checkpoint) -> None:
        if name not in base:
            raise ModelError(
                f"{self.folder} changes {name}, which {base.folder} does not have. Same model?"
            )
        if base[name].shape != shape:
            raise ModelError(
                f"{self.folder} has {name} as {shape}, but {base.folder} as {base[name].shape}"
            )

    def _bytes(self, stored: Stored) -> np.ndarray:
        return self._raw[stored.offset : stored.offset + stored.nbytes]

    def _numbers(self, stored: Stored) -> np.ndarray:
        if stored.dtype not in FLOATS:
            raise ModelError(f"{stored.file}: {stored.name} is {stored.dtype}, not a float")
        return decode(self._bytes(stored), KINDS[stored.dtype]).reshape(stored.shape)


def _checked(folder: Path, config: Any) -> dict[str, Any]:
    """The config of an adapter whose update can be formed."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else json.dumps(config)[:40]
        raise ModelError(f"{folder} is a {kind} adapter, not LoRA")
    for option in _UNREAD:
        if config.get(option) not in (None, False, "none", [], {}):
            raise ModelError(f"{folder} has {option}: {config[option]}, which cannot be merged")
    if str(config.get("init_lora_weights")).startswith(_CHANGES_BASE):
        raise ModelError(
            f"{folder} was initialised by {config['init_lora_weights']}, which changed its base; "
            "save it with peft's path_initial_model_for_weight_conversion to make it plain LoRA"
        )
    return config


def _dora(plain: Update, magnitude: np.ndarray, base: Whole, columns: int) -> Update:
    """δ of weight-decomposed LoRA: m (W + s B A) / |W + s B A| - W, norms by row.

    Source: DoRA, arXiv:2402.09353.
    """

    def rows(first: int, last: int) -> np.ndarray:
        raw, kind = base.read(first * columns, last * columns, columns)
        before = decode(raw, kind).reshape(last - first, columns)
        after = before + plain.rows(first, last)
        length = np.linalg.norm(after, axis=1, keepdims=True)
        return magnitude[first:last, None] * after / length - before

    return Update(rows)
