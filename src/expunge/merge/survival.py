"""How much of an edit is left once weights are stored: in the output's type, in int8, in int4.

Dimensions: rows × columns, a matrix. Quantised codes are sampled from one row in 64, with the
scale of the unedited weights: a row's for int8; for int4 that of 128 weights of a row, or of the
fewer that are left at its end. A weight counts as edited when its merged value in the output's
type differs, and as kept when its code differs.
"""

from collections.abc import Sequence

import numpy as np

from expunge.merge.codec import FLOAT32
from expunge.merge.operands import Operand, decode

_EVERY, _GROUP = 64, 128


class Survival:
    """Counts over the tensors of a merge."""

    def __init__(self) -> None:
        self.moved = self.changed = 0
        self.sampled = self.kept8 = self.kept4 = 0

    def sample(self, operand: Operand, start: int, raw: np.ndarray, kind: int) -> None:
        """Take in some rows of a merged slice."""
        columns = operand.columns
        if operand.base is None or len(operand.shape) < 2:
            return
        size = 4 if kind == FLOAT32 else 2
        rows = len(raw) // size // columns
        old, old_kind = operand.base.read(start, start + rows * columns, columns)
        chosen = slice(-(start // columns) % _EVERY, None, _EVERY)
        before = decode(_rows(old, rows, chosen), old_kind)
        after = decode(_rows(raw, rows, chosen), kind)
        edited = before != after
        self.sampled += int(edited.sum())
        self.kept8 += int((edited & _differs(before, after, columns, columns, 127)).sum())
        self.kept4 += int((edited & _differs(before, after, columns, _GROUP, 7)).sum())

    def note(self) -> list[int]:
        """The counts, for a journal."""
        return [self.moved, self.changed, self.sampled, self.kept8, self.kept4]

    def take(self, note: Sequence[int]) -> None:
        """Add the counts of a note."""
        if note:
            self.moved += note[0]
            self.changed += note[1]
            self.sampled += note[2]
            self.kept8 += note[3]
            self.kept4 += note[4]

    def shares(self) -> tuple[float | None, float | None, float | None]:
        """Kept by the output's type, by int8, by int4; None where nothing was edited."""
        stored = self.changed / self.moved if self.moved else None
        if not self.sampled:
            return stored, None, None
        return stored, self.kept8 / self.sampled, self.kept4 / self.sampled


def _rows(raw: np.ndarray, rows: int, chosen: slice) -> np.ndarray:
    """The bytes of some rows of a slice."""
    return np.ascontiguousarray(raw.reshape(rows, -1)[chosen]).reshape(-1)


def _differs(
    before: np.ndarray, after: np.ndarray, columns: int, group: int, levels: int
) -> np.ndarray:
    """Where rows have different codes under the scales of the first, one for each group."""
    rows = [x.reshape(-1, columns) for x in (before, after)]
    short = -columns % group
    if short:
        rows = [np.pad(x, ((0, 0), (0, short))) for x in rows]  # zeros change no scale, no code
    one, two = (x.reshape(-1, group) for x in rows)
    scale = np.maximum(np.abs(one).max(1, keepdims=True), 1e-30) / levels
    codes = [np.clip(np.rint(x / scale), -levels, levels) for x in (one, two)]
    return (codes[0] != codes[1]).reshape(-1, columns + short)[:, :columns].ravel()
