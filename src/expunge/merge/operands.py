"""What one merged tensor is made of: stored tensors and low-rank updates, read slice by slice.

Dimensions: M models, n numbers of one slice (whole rows of a matrix), r rank.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from expunge.memory import map_in
from expunge.merge.codec import BFLOAT16, DELTA, FLOAT16, FLOAT32, scatter
from expunge.products import product

KINDS = {"F32": FLOAT32, "BF16": BFLOAT16, "F16": FLOAT16}
SLICE = 1 << 24
"""Numbers in a slice, so that a tensor of any size takes a bounded amount of memory."""

_BLOCKS, _LINE = 64, 16  # of rows in a sample; numbers that it takes side by side
_HELD_BYTES = 1 << 26  # of updates that are formed once instead of once a pass


@dataclass(frozen=True)
class Whole:
    """A stored tensor: its bytes, (size · itemsize,) uint8 and read-only, and their type."""

    raw: np.ndarray
    dtype: str
    origin: str = ""
    """The file, for messages."""

    def read(self, low: int, high: int, columns: int) -> tuple[np.ndarray, int]:
        """The bytes of the numbers low … high, and the kind to read them as."""
        size = 4 if self.dtype == "F32" else 2
        return self.raw[low * size : high * size], KINDS[self.dtype]


Factors = tuple[np.ndarray, np.ndarray]
"""A (r, columns) and B (rows, r), float32."""


@dataclass(frozen=True)
class Update:
    """A difference from the base that is formed when asked for, in float32."""

    rows: Callable[[int, int], np.ndarray]
    """(first row, last row) → δ of these rows, (rows, columns) float32."""

    whole: bool = False
    """`rows` gives weights, not a difference from the base."""

    origin: str = ""
    """The file, for messages."""

    factors: Callable[[], Factors] | None = None
    """Gives A and B where δ = B A."""

    held: bool = False
    """`rows` gives what is in memory already."""

    def read(self, low: int, high: int, columns: int) -> tuple[np.ndarray, int]:
        """The bytes of δ at low … high, both at the start of a row."""
        delta = np.ascontiguousarray(self.rows(low // columns, high // columns), np.float32)
        raw = delta.reshape(-1).view(np.uint8)
        raw.flags.writeable = False
        return raw, FLOAT32 if self.whole else DELTA


Part = Whole | Update


@dataclass(frozen=True)
class Slice:
    """Some rows of every model's tensor, as bytes."""

    start: int
    """Place of the first number in its tensor."""

    n: int
    base: np.ndarray
    base_kind: int
    models: tuple[np.ndarray, ...]
    kinds: np.ndarray
    """(M,) int64: how each of `models` is read."""

    def scattered(self, step: int) -> "Slice":
        """Every step-th piece of a few numbers, as if they were all."""
        count = -(-(self.n // _LINE) // step)

        def some(raw: np.ndarray) -> np.ndarray:
            words = len(raw) // self.n * _LINE // 8
            out = np.empty((count, words), np.uint64)
            scatter(raw.ctypes.data, words, step, out)
            return out.reshape(-1).view(np.uint8)

        models = tuple(some(raw) for raw in self.models)
        return Slice(0, count * _LINE, some(self.base), self.base_kind, models, self.kinds)

    @property
    def deltas(self) -> np.ndarray:
        """δ_i in float32: (M, n)."""
        base = decode(self.base, self.base_kind)
        return np.stack(
            [
                decode(raw, kind) if kind == DELTA else decode(raw, kind) - base
                for raw, kind in zip(self.models, self.kinds, strict=True)
            ]
        )


@dataclass(frozen=True)
class Operand:
    """One tensor of the merged model and what it is made of."""

    name: str
    shape: tuple[int, ...]
    base: Part | None
    """None where the parts are deltas of nothing, such as factors of adapters."""

    models: Sequence[Part]

    @property
    def size(self) -> int:
        """How many numbers."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def columns(self) -> int:
        """Length of a row: the last dimension, or the whole of a vector."""
        return self.shape[-1] if self.shape else 1

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where its slices begin and end: whole rows, in order."""
        step = max(1, SLICE // max(1, self.columns)) * self.columns
        return [(low, min(self.size, low + step)) for low in range(0, self.size, step)]

    def __iter__(self) -> Iterator[Slice]:
        return (self.slice(low, high) for low, high in self.spans)

    def sample(self, numbers: int) -> Slice:
        """About so many numbers from all over, as if they were one slice.

        Where no update need be formed they are short pieces of all rows, at an odd distance so that
        they fall on all columns: the rows of a low-rank update are of very different lengths.
        Otherwise they are blocks of rows.
        """
        if not any(isinstance(part, Update) and not part.held for part in self.models):
            return self.slice(0, self.size).scattered(max(1, self.size // numbers) | 1)
        rows = self.size // self.columns
        wanted = min(rows, max(1, numbers // self.columns))
        blocks = min(_BLOCKS, wanted)
        each = wanted // blocks
        firsts = [(rows - each) * block // max(1, blocks - 1) for block in range(blocks)]
        pieces = [self.slice(r * self.columns, (r + each) * self.columns) for r in firsts]
        return Slice(
            0,
            blocks * each * self.columns,
            np.concatenate([piece.base for piece in pieces]),
            pieces[0].base_kind,
            tuple(np.concatenate(raws) for raws in zip(*(p.models for p in pieces), strict=True)),
            pieces[0].kinds,
        )

    def slice(self, low: int, high: int) -> Slice:
        """The numbers low … high, both at the start of a row."""
        base, kind = self.base.read(low, high, self.columns) if self.base else _zeros(high - low)
        read = [part.read(low, high, self.columns) for part in self.models]
        kinds = np.array([kind for _, kind in read], np.int64)
        return Slice(low, high - low, base, kind, tuple(raw for raw, _ in read), kinds)

    def map_in(self) -> None:
        """Map the stored tensors' pages, so that no kernel waits for them."""
        for part in (self.base, *self.models):
            if isinstance(part, Whole):
                map_in(part.raw)

    def untouched(self, dtype: str) -> np.ndarray | None:
        """The base's bytes where every model holds those very ones, as where an adapter is not."""
        if not isinstance(self.base, Whole) or self.base.dtype != dtype:
            return None
        place = self.base.raw.ctypes.data
        same = all(isinstance(p, Whole) and p.raw.ctypes.data == place for p in self.models)
        return self.base.raw if same else None

    def held(self) -> "Operand":
        """The same with its updates formed once and kept, where they are small enough."""
        updates = [part for part in self.models if isinstance(part, Update)]
        if not updates or 4 * self.size * len(updates) > _HELD_BYTES:
            return self
        parts = [self._formed(p) if isinstance(p, Update) else p for p in self.models]
        return Operand(self.name, self.shape, self.base, parts)

    def _formed(self, update: Update) -> Update:
        rows = update.rows(0, self.size // max(1, self.columns))
        delta = np.ascontiguousarray(rows, np.float32).reshape(-1, self.columns)
        return replace(update, rows=lambda first, last: delta[first:last], held=True)

    def without_base(self) -> "Operand":
        """The same of weights alone: updates are added to the base, and the base is left out."""
        parts = [
            added(self.base, part, self.columns)
            if self.base is not None and isinstance(part, Update) and not part.whole
            else part
            for part in self.models
        ]
        return Operand(self.name, self.shape, None, parts)


def added(base: Part, update: Update, columns: int) -> Update:
    """The weights that an update makes of a base."""

    def rows(first: int, last: int) -> np.ndarray:
        raw, kind = base.read(first * columns, last * columns, columns)
        return decode(raw, kind).reshape(last - first, -1) + update.rows(first, last)

    return Update(rows, whole=True)


def blame(operand: Operand) -> str:
    """Which input of an operand holds numbers that are not finite, as a sentence."""
    parts = [operand.base] if operand.base is not None else []
    for part in [*parts, *operand.models]:
        alone = Operand(operand.name, operand.shape, None, [part])
        if any(not np.isfinite(piece.deltas).all() for piece in alone):
            where = f"{part.origin}: " if part.origin else ""
            return f"{where}{operand.name} holds NaN or infinite numbers"
    return f"{operand.name} overflows once merged"


def summed(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """The sum of arrays of one shape, in order; 0 of none."""
    total = np.zeros(())
    for array in arrays:
        total = total + array
    return total


def decode(raw: np.ndarray, kind: int) -> np.ndarray:
    """Stored numbers as float32: (n,)."""
    if kind == BFLOAT16:
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == FLOAT16:
        return raw.view(np.float16).astype(np.float32)
    return raw.view(np.float32)


def low_rank(a: np.ndarray, b: np.ndarray, scale: float) -> Update:
    """δ = scale · B A, formed row by row: A (r, in), B (out, r), float32."""
    return low_rank_of(lambda: (a, np.float32(scale) * b))


def low_rank_of(factors: Callable[[], Factors]) -> Update:
    """δ = B A of factors that are asked for anew with each slice, so that none are kept."""

    def rows(first: int, last: int) -> np.ndarray:
        a, b = factors()
        return product(torch.from_numpy(b[first:last]), torch.from_numpy(a).T).numpy()

    return Update(rows, factors=factors)


def constant(delta: np.ndarray) -> Update:
    """δ that is held in memory: (rows, …) float32."""
    flat = delta.reshape(len(delta) if delta.ndim > 1 else 1, -1)
    return Update(lambda first, last: flat[first:last])


def _zeros(n: int) -> tuple[np.ndarray, int]:
    zeros = np.zeros(4 * n, np.uint8)
    zeros.flags.writeable = False
    return zeros, FLOAT32
