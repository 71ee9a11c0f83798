"""The resident model: one target in memory, candidates swapped into it in place.

Dimensions: r rank, (out, in) the shape of a linear layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from expunge import lora, models
from expunge.calibrate.candidate import Candidate, folders_of
from expunge.data.batches import TokenSequence
from expunge.edit.observe import sketches
from expunge.edit.repair import Space, sage
from expunge.evaluate.prompts import sizes_of
from expunge.evaluate.reader import Reader
from expunge.evaluate.tables import key_of, sequence_key
from expunge.merge.adapters import merged_factors
from expunge.merge.branches import read_branches, uneven
from expunge.merge.factoring import write_factors
from expunge.merge.section import Merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SKETCH_RANK = 64
"""Directions of a layer's inputs that a repair knows."""

_AS_IT_IS = Merge(method="linear", space="delta")

Factors = Iterator[tuple[str, Tensor, Tensor]]
"""(layer, A (r, in), B (out, r)), to be used with scale 1."""


class Resident:
    """The target in memory, and what candidates have said, by content.

    A reader of a candidate is valid within its block only: the next one changes the same weights.
    """

    def __init__(
        self,
        base: Path,
        ends: Mapping[str, Path],
        *,
        key: str,
        hashes: Mapping[str, str],
        dtype: models.Dtype,
        folder: Path | None,
        max_batch: int,
        kept: Sequence[TokenSequence] = (),
    ) -> None:
        """`ends` are adapter folders by their label and `hashes` stand for them, as `key` does for
        the target; `kept` are texts of the retain half, for repairs."""
        self.base, self.ends, self.key, self.hashes = base, ends, key, hashes
        self.dtype: models.Dtype = dtype
        self.folder, self.max_batch, self.kept = folder, max_batch, kept
        self.read: set[str] = set()
        self.whole: set[str] = set()
        self.seconds = 0.0

    @cached_property
    def model(self) -> PreTrainedModel:
        """The target, loaded when something is missing from the tables."""
        return models.load_model(self.base, dtype=self.dtype)

    @cached_property
    def spaces(self) -> dict[str, Space]:
        """How the inputs of the adapted layers lie on the retain half, read off the target once."""
        (folder, *_) = self.ends.values()
        names = [layer for layer, _, _ in merged_factors([folder], _AS_IT_IS)]
        lora.swap_factors(self.model, [])
        with lora.switched_off(self.model):
            found = sketches(self.model, self.kept, names, SKETCH_RANK)
        return {name: sketch.space for name, sketch in found.items()}

    @property
    def spent(self) -> dict[str, Any]:
        """The keys of the candidates that were `read`, of these the `whole`, and the seconds."""
        return {"read": sorted(self.read), "whole": sorted(self.whole), "seconds": self.seconds}

    @contextmanager
    def reader(self, candidate: Candidate, *, whole: bool = False) -> Iterator[Reader]:
        """A reader of a candidate; its weights are swapped in once something is not known yet.
        `whole` says that items are to be read, and not documents alone."""
        start = time.monotonic()

        def load() -> PreTrainedModel:
            lora.swap_factors(self.model, self.factors(candidate))
            return self.model

        context, vocabulary_size = sizes_of(self.base / "config.json")
        made = [self.hashes[end.label] for end, _ in candidate.parts]
        if candidate.repair:
            made += [sequence_key(text) for text in self.kept]
        reader = Reader(
            load,
            models.load_tokenizer(self.base),
            context=context,
            vocabulary_size=vocabulary_size,
            key=key_of("candidate", self.key, made, candidate.model_dump_json(), self.dtype),
            folder=self.folder,
            max_batch=self.max_batch,
            dtype=self.dtype,
        )
        yield reader
        if reader.forwards:
            self.read.add(reader.key[:12])
            self.whole |= {reader.key[:12]} if whole else set()
            self.seconds += time.monotonic() - start

    def factors(self, candidate: Candidate) -> Factors:
        """The candidate's update, layer by layer."""
        merge = candidate.merge
        if merge is None:
            return
        for layer, a, b in merged_factors(folders_of(candidate, self.ends), merge):
            if candidate.repair:
                a = sage(a, self.spaces[layer], strength=candidate.repair, relative=True)
            yield layer, a, b

    def can_merge(self, candidate: Candidate) -> bool:
        """Whether the factors of its parts have one shape, where they are merged apart."""
        merge, folders = candidate.merge, folders_of(candidate, self.ends)
        apart = merge is not None and merge.space == "factors"
        return not apart or uneven(read_branches(folders)) is None

    def write(self, candidate: Candidate, out: Path) -> None:
        """Write a candidate as a peft folder."""
        transposed = read_branches(folders_of(candidate, self.ends))[0].transposed
        made = ((layer, a.float(), b.float()) for layer, a, b in self.factors(candidate))
        write_factors(made, str(self.base), out, transposed=transposed)
