"""A stand-in: several models, or one with changed embeddings, read in packs as if they were one.

Its hidden states are those of all models side by side, and its logits what a guard makes of
theirs; keys and values of all lie in one cache, those of each in layers of their own.

Shapes: N positions, d_k width of model k, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.affine_heads import as_head_reads, output_head
from expunge.errors import ModelError
from expunge.guard.contrast import Combine
from expunge.guard.corrupt import Corruption, eco
from expunge.packs import in_buckets
from expunge.products import product

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class StandIn(nn.Module):
    """What packed scoring and generation take in place of a guarded model."""

    def __init__(
        self,
        model: PreTrainedModel,
        helpers: Sequence[PreTrainedModel | None] = (),
        combine: Combine | None = None,
        corruption: Corruption | None = None,
    ) -> None:
        """A helper of None is the model itself. Noise is for the texts of `corrupted` alone."""
        super().__init__()
        for one in (model, *helpers):
            if one is not None and in_buckets(one):
                raise ModelError(
                    f"{type(one).__name__} keeps a state from token to token, which a guard "
                    "that changes logits or embeddings cannot follow"
                )
        self.model = model
        self.helpers = nn.ModuleList([one for one in helpers if one is not None])
        self._own = [one is None for one in helpers]
        self._combine, self._corruption = combine, corruption
        self.corrupted: dict[tuple[int, ...], int] = {}
        """Texts whose first tokens, so many, get noise on their embeddings."""

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The model's."""
        return self.model.generation_config

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.model.dtype

    @property
    def reads_whole(self) -> bool:
        """Whether texts must be read whole, what they share included."""
        return self._corruption is not None

    def get_decoder(self) -> Any:
        """What turns tokens into states."""
        return self._decode

    def get_output_embeddings(self) -> Any:
        """The model's head."""
        return self.model.get_output_embeddings()

    def logits_of(self, states: Tensor, *, choosing: bool = False) -> Tensor:
        """Logits (N, V) of states (N, Σ d_k); `choosing` a token, implausible ones fall."""
        parts = iter(states.split(self._widths, -1))
        base, *others = (
            product(part, output_head(one).to(part.dtype))
            for one, part in zip(self._models, parts, strict=True)
        )
        if self._combine is None:
            return base
        rest = iter(others)
        return self._combine(base, [base if own else next(rest) for own in self._own], choosing)

    @property
    def _models(self) -> list[Any]:
        return [self.model, *self.helpers]

    @property
    def _widths(self) -> list[int]:
        return [output_head(one).shape[1] for one in self._models]

    def _decode(
        self, *, input_ids: Tensor, past_key_values: Cache | None = None, **given: Any
    ) -> Any:
        from expunge.guard.layers import Layers

        found, start = [], 0
        for one in self._models:
            decoder = one.get_decoder()
            cache = None if past_key_values is None else Layers(past_key_values, start)
            states = decoder(
                **self._inputs(one, input_ids, given.get("lengths")),
                past_key_values=cache,
                **given,
            ).last_hidden_state
            found.append(as_head_reads(one, states))
            start += one.config.get_text_config().num_hidden_layers
        return SimpleNamespace(last_hidden_state=torch.cat(found, -1))

    def _inputs(
        self, model: Any, tokens: Tensor, lengths: tuple[int, ...] | None
    ) -> dict[str, Tensor]:
        if self._corruption is None or lengths is None or not self.corrupted:
            return {"input_ids": tokens}
        embedding = model.get_input_embeddings()
        rms = rms_of(embedding.weight)
        parts = []
        for row in tokens[0].split(lengths):
            count = self.corrupted.get(tuple(row.tolist()), 0)
            parts.append(noisy(embedding(row), row[:count].tolist(), rms, self._corruption))
        return {"inputs_embeds": torch.cat(parts)[None]}


def noisy(embeddings: Tensor, prompt: Sequence[int], rms: float, corruption: Corruption) -> Tensor:
    """Embeddings of a text (T, d) with noise on those of its prompt, at its start."""
    if not prompt:
        return embeddings
    count, how = len(prompt), {"strength": corruption.strength, "seed": corruption.seed}
    changed = eco(embeddings[:count], prompt, rms, **how)
    return torch.cat([changed, embeddings[count:]])


def rms_of(weight: Tensor) -> float:
    """Root mean square of the entries of an embedding matrix."""
    return float(weight.float().square().mean().sqrt())
