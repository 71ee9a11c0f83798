"""From a merge file to the tensors that will be written: which, from where, by what.

Dimensions: M models of a merge, the base left out unless the method takes it as one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from expunge.errors import MergeError
from expunge.merge.absent import ABSENT
from expunge.merge.agreement import bytes_of_all, mismatch
from expunge.merge.checkpoint import FLOATS
from expunge.merge.compat import MergeFile, OutputSlice, Parameters, SliceInput, settle
from expunge.merge.engine import Job
from expunge.merge.families import Elect, Matrix
from expunge.merge.operands import Operand, Part
from expunge.merge.sources import HEAD, LAYER, Opened, Source, marks
from expunge.merge.trim import Settings

STORED = {word: code for code, word in FLOATS.items()}
_BASE_TOO = ("linear", "karcher", "passthrough")
"""Methods for which the base is one of the models."""
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


class Embeddings(Protocol):
    """What lines up the vocabularies of models."""

    def lines_up(self, name: str) -> bool:
        """Whether the rows of a tensor stand for words."""
        ...

    def line_up(
        self, parts: dict[Source, Part], columns: int
    ) -> tuple[dict[Source, Part], tuple[int, ...]]:
        """Each model's rows in the output's order, and their common shape."""
        ...


@dataclass(frozen=True)
class Place:
    """A tensor of the output: its name there and in each input, and where it stands."""

    name: str
    inputs: tuple[str, ...]
    """One a source of the slice."""

    slice: OutputSlice
    t: float
    """From 0 at the slice's first layer to 1 at its last."""


class Plan:
    """All that a merge file means."""

    def __init__(self, file: MergeFile) -> None:
        self.file = file
        self._opened = Opened()
        self.source = self._opened.source
        self.base = self._opened.base(file)
        self.slices = [self._with_base(one) for one in file.slices or [self._whole()]]
        self._check_counts()

    @property
    def sources(self) -> list[Source]:
        """Every model, in the order they are named, the base last unless it is among them."""
        found = [self.source(s.model) for one in self.slices for s in one.sources]
        found += [self.base] if self.base else []
        return list(dict.fromkeys(found))

    @property
    def donor(self) -> Source:
        """The model whose config and tokenizer the output has."""
        return self.base or self.sources[0]

    def places(self) -> list[Place]:
        """Every tensor of the output, in the order of the donor's file."""
        donor = self.donor.checkpoint
        first, last = self.slices[0], self.slices[-1]
        before = [n for n in donor if not LAYER.search(n)]
        places = [_fixed(n, last if _after(n) else first) for n in before]
        number = 0
        for one in self.slices:
            low, high = one.sources[0].layer_range
            for step in range(high - low):
                t = step / (high - low - 1) if high - low > 1 else 1.0
                places += self._layer(one, step, number, t)
                number += 1
        return places

    def jobs(self, embeddings: "Embeddings | None" = None) -> list[Job]:
        """Every tensor, with what it is made of; `embeddings` lines up those of vocabularies."""
        jobs = [self._job(place, embeddings) for place in self.places()]
        self._check_extra()
        return jobs

    def description(self) -> str:
        """All that decides the bytes of the output."""
        named = [
            Path(s.statistics).expanduser()
            for one in self.slices
            for s in one.sources
            if s.statistics is not None
        ]
        found = [source.fingerprint() for source in self.sources]
        found.append(marks(path for path in named if path.is_file()))
        return f"{self.file.model_dump_json()}{found}"

    def config_changes(self) -> dict[str, Any]:
        """Fields of config.json that the merge has made untrue."""
        changes: dict[str, Any] = {}
        if self.file.stored:
            changes["dtype"] = self.file.stored
            if "torch_dtype" in self.donor.checkpoint.config:
                changes["torch_dtype"] = self.file.stored
        layers = sum(s.sources[0].layer_range[1] - s.sources[0].layer_range[0] for s in self.slices)
        for field in ("num_hidden_layers", "n_layer", "n_layers"):
            if field in self.donor.checkpoint.config and layers:
                changes[field] = layers
        if layers != self.donor.layers and "layer_types" in self.donor.checkpoint.config:
            kinds = self.donor.checkpoint.config["layer_types"]
            ranges = [s.sources[0].layer_range for s in self.slices]
            changes["layer_types"] = [kinds[i] for low, high in ranges for i in range(low, high)]
        return changes

    def _whole(self) -> OutputSlice:
        """`models` as one slice of all their layers."""
        given = self.file.models or ()
        found = {max(1, self.source(g.model).layers): self.source(g.model).name for g in given}
        if len(found) > 1:
            said = ", ".join(f"{name} has {count}" for count, name in found.items())
            raise MergeError(f"models need equally many layers, and {said}: take slices")
        ranged = (SliceInput(**one.model_dump(), layer_range=(0, max(found))) for one in given)
        return OutputSlice(sources=tuple(ranged))

    def _with_base(self, one: OutputSlice) -> OutputSlice:
        """The slice with the base among its sources, as slerp and its kin need it."""
        alone = self.base is not None and self.base.alone
        base = one.base_model or (ABSENT if alone else self.file.base_model)
        name = self.file.name
        if base is None or any(self.source(s.model) == self.source(base) for s in one.sources):
            return one
        if name in _BASE_TOO and (alone or self.file.slices is not None):
            return one  # as in mergekit, which joins it to whole models alone
        weighed = "weight" in one.parameters or "weight" in self.file.parameters
        if name == "linear" and self.file.output == "model" and not weighed:
            raise MergeError(
                f"linear would count the base_model {self.source(base).name} as one more model, "
                "and it has no weight: list it among the models with a weight, or leave base_model "
                "out"
            )
        added_base = SliceInput(model=base, layer_range=one.sources[0].layer_range)
        return one.model_copy(update={"sources": (*one.sources, added_base)})

    def _base_of(self, one: OutputSlice) -> Source | None:
        """The base of a slice, where it is among its sources."""
        base = self.source(one.base_model) if one.base_model is not None else self.base
        return base if base in [self.source(s.model) for s in one.sources] else None

    def _layer(self, one: OutputSlice, step: int, number: int, t: float) -> list[Place]:
        """The tensors of one layer of the output."""
        lows = [source.layer_range[0] for source in one.sources]
        lead = self._base_of(one) or self.source(one.sources[0].model)
        at = [self.source(s.model) for s in one.sources].index(lead)
        names = [n for n in lead.checkpoint if _number(n) == lows[at] + step]
        if not names and not lead.alone:
            raise MergeError(f"{lead.name} has no layer {lows[at] + step}")
        return [
            Place(_renumbered(n, number), tuple(_renumbered(n, low + step) for low in lows), one, t)
            for n in names
        ]

    def _job(self, place: Place, embeddings: "Embeddings | None") -> Job:
        one, file = place.slice, self.file
        base = self._base_of(one)
        found = []
        for given, name in zip(one.sources, place.inputs, strict=True):
            source = self.source(given.model)
            held = source.find(name)
            if held is None:
                raise MergeError(f"{source.name} lacks {name}, which {self.donor.name} has")
            found.append((given, source, name, held))
        stored = [source.checkpoint[held] for _, source, _, held in found]
        held_by = [(source, held) for _, source, _, held in found]
        shapes = {s.shape for s in stored}
        lined_up = embeddings is not None and embeddings.lines_up(place.name)
        if len(shapes) > 1 and not lined_up:
            raise MergeError(mismatch(place.name, held_by))
        kinds = {s.dtype for s in stored}
        if not kinds <= FLOATS.keys():
            raw = bytes_of_all(place.name, held_by)
            return Job(place.name, stored[0].dtype, stored[0].shape, carried=raw)
        wanted = STORED[file.stored] if file.stored else _widest(kinds)
        shape = stored[0].shape
        parts = [source.part(held, base) for _, source, _, held in found]
        if embeddings is not None and lined_up:
            whole = {source: source.part(held, None) for _, source, _, held in found}
            rows, shape = embeddings.line_up(whole, shape[-1])
            parts = [rows[source] for _, source, _, _ in found]
        return self._merged(place, [f[:3] for f in found], parts, base, wanted, shape)

    def _merged(
        self,
        place: Place,
        found: Sequence[tuple[SliceInput, Source, str]],
        parts: Sequence[Part],
        base: Source | None,
        dtype: str,
        shape: tuple[int, ...],
    ) -> Job:
        """The job of a tensor of floats."""
        one, name = place.slice, self.file.name
        held = list(zip(found, parts, strict=True))
        given = [(f, part) for f, part in held if f[1] != base or name in _BASE_TOO]
        others = [f for f, _ in given]
        within: list[Parameters] = [one.parameters, self.file.parameters]
        weights, options = settle(
            self.file,
            [[source.parameters, *within] for source, _, _ in others],
            within,
            tensor=place.name,
            inputs=[inner for _, _, inner in others],
            t=place.t,
        )
        merged = [part for _, part in given]
        bottom = next((part for (_, source, _), part in held if source == base), None)
        if name == "slerp":
            assert bottom is not None
            merged = [bottom, *merged]
        operand, row = Operand(place.name, shape, bottom, merged), self.file.row
        raw = operand.untouched(dtype) if options.get("trim") != "model" else None
        if isinstance(row.how, Elect) and raw is not None:
            return Job(place.name, dtype, shape, carried=raw)
        settings = Settings(place.name, weights, options, self.file.seed)
        statistics = self._statistics([(source, inner) for source, _, inner in others])
        return Job(place.name, dtype, shape, operand, row, settings, statistics)

    def _statistics(self, given: Sequence[tuple[SliceInput, str]]) -> list[Tensor] | None:
        """What regmean and fisher need of each model for one tensor; None where one has none."""
        how = self.file.row.how
        if not (isinstance(how, Matrix) and how.statistics):
            return None
        found = [self._opened.matrix(source.statistics, name) for source, name in given]
        whole = [matrix for matrix in found if matrix is not None]
        return whole if len(whole) == len(found) else None

    def _check_counts(self) -> None:
        """Refuse a method without its base, or with too few or too many models."""
        row, name = self.file.row, self.file.name
        for one in self.slices:
            base = self._base_of(one)
            if row.base and base is None:
                raise MergeError(f"{name} needs base_model")
            count = sum(1 for s in one.sources if self.source(s.model) != base)
            if name in _BASE_TOO:
                count = len(one.sources)
            low, high = row.models
            if not low <= count <= high:
                asked = str(low) if low == high else f"at least {low}"
                beside = " beside its base" if row.base else ""
                raise MergeError(f"{name} merges {asked} model(s){beside}, and {count} are given")

    def _check_extra(self) -> None:
        """Refuse tensors that would be lost: in a whole model, and not in the donor."""
        if self.file.slices is not None:
            return
        known = self.donor.checkpoint
        for source in self.sources:
            for name in source.checkpoint:
                tied = name.endswith(HEAD) and source.checkpoint.config.get("tie_word_embeddings")
                if name not in known and not name.endswith(_BUFFERS) and not tied:
                    raise MergeError(f"{source.name} has {name}, which {self.donor.name} lacks")


def _number(name: str) -> int | None:
    found = LAYER.search(name)
    return int(found[1]) if found else None


def _renumbered(name: str, number: int) -> str:
    found = LAYER.search(name)
    assert found is not None
    return f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"


def _fixed(name: str, one: OutputSlice) -> Place:
    return Place(name, (name,) * len(one.sources), one, 0.0)


def _after(name: str) -> bool:
    """Whether a tensor outside the layers comes after them."""
    return not any(word in name for word in ("embed", "wte", "wpe"))


def _widest(kinds: set[str]) -> str:
    return next(iter(kinds)) if len(kinds) == 1 else "F32"
