"""A part of a cache, as the helper model that writes it sees it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache


class Layers(Cache):
    """The layers of a cache from `start` on, as a model of its own sees them."""

    def __init__(self, whole: Cache, start: int) -> None:
        super().__init__(layers=[])
        self._whole, self._start = whole, start

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write and read a layer."""
        place = layer_idx + self._start
        return self._whole.update(key_states, value_states, place, *args, **options)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in a layer."""
        return self._whole.get_seq_length(layer_idx + self._start)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that a mask covers, from the first."""
        return self._whole.get_mask_sizes(query_length, layer_idx + self._start)
