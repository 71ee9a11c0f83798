"""The cache of generation: slots that rows join and leave, each at a column of its own.

Dimensions: S slots, R live rows, H key-value heads, C columns, d their width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from expunge.evaluate.generate import Frontier


class Slots(CacheLayerMixin):
    """Keys and values of S rows, (S, H, C, d); a step writes one column of each live row."""

    def __init__(self, keys: Tensor, values: Tensor, frontier: Frontier) -> None:
        super().__init__()
        self.keys, self.values, self.frontier = keys, values, frontier
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the columns were made when the first prompts were read."""

    def get_seq_length(self) -> int:
        """Columns that a step reads."""
        return self.frontier.width

    def get_max_length(self) -> int:
        """Columns that were made."""
        assert self.keys is not None
        return self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask covers, from the first."""
        return self.frontier.width, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Write each row's new column; return the live rows' columns."""
        live, width = len(key_states), self.frontier.width
        assert self.keys is not None
        assert self.values is not None
        rows, columns = torch.arange(live, device=key_states.device), self.frontier.columns
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        return self.keys[:live, :, :width], self.values[:live, :, :width]
