"""Tables of what one model said: scores, generations, option logits, gradient norms, each once.

A table lies in a folder named by the hash of the model's weights. Its rows are keyed by the hash
of the tokens that were read, so two suites that ask for the same text in the same template share a
row, and a metric is a pure function of rows: recomputed without the model.

Dimensions: L scored tokens of one text, K options of one question.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from expunge import parallel, runs
from expunge.data.batches import TokenSequence
from expunge.disk import readable_errors
from expunge.errors import EvaluationError

VERSION = "1"
"""Of what the rows hold; a table of another version is computed anew."""

_SCHEMAS = {
    "scores": pa.schema(
        [
            ("key", pa.string()),
            ("logp", pa.list_(pa.float32())),
            ("rank", pa.list_(pa.int32())),
            ("hit", pa.list_(pa.bool_())),
            ("entropy", pa.list_(pa.float32())),
            ("variance", pa.list_(pa.float32())),
        ]
    ),
    "generations": pa.schema(
        # complete: the end of text follows; else more may be written on from there
        [("key", pa.string()), ("tokens", pa.list_(pa.int32())), ("complete", pa.bool_())]
    ),
    "options": pa.schema([("key", pa.string()), ("logits", pa.list_(pa.float32()))]),
    "gradients": pa.schema([("key", pa.string()), ("norm", pa.float64())]),
}


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What the model said of the L scored tokens of one text, natural logs."""

    logp: np.ndarray  # (L,) float32
    rank: np.ndarray  # (L,) int32, how many tokens are likelier
    hit: np.ndarray  # (L,) bool, whether it is the arg-max
    entropy: np.ndarray  # (L,) float32
    variance: np.ndarray  # (L,) float32, of log p under p

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood a token."""
        return -float(self.logp.mean(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model wrote: tokens without the end of text, as many as were asked for."""

    tokens: list[int]
    complete: bool
    """False where it was stopped once nothing could change its score."""


class Table:
    """Rows of one kind for one model, in parquet files of a folder; without one, in memory."""

    def __init__(self, kind: str, model_key: str, folder: Path | None) -> None:
        self.kind, self.model_key, self.folder = kind, model_key, folder
        self.schema = _SCHEMAS[kind]

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """All rows by key; files of another version are left alone."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob(f"{self.kind}-*.parquet")) if self.folder else ():
            _hold(found, self._read(path))
        return found

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Keys that have no row, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self.rows]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows, on disk before this returns."""
        if not rows:
            return
        if self.folder is not None:
            meta = {"model": self.model_key, "version": VERSION}
            table = pa.Table.from_pylist(list(rows), self.schema.with_metadata(meta))
            name = hashlib.sha256("".join(row["key"] for row in rows).encode()).hexdigest()[:16]
            with readable_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                with runs.replacing(self.folder / f"{self.kind}-{name}.parquet") as temporary:
                    pq.write_table(table, temporary, compression="zstd")
        self.learn(rows)

    def learn(self, rows: Sequence[dict[str, Any]]) -> None:
        """Hold rows, not on disk."""
        _hold(self.rows, rows)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise EvaluationError(f"cannot read the table {path}: {reason}") from None
        meta = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if meta.get("version") != VERSION:
            return []
        if meta.get("model") != self.model_key:
            raise EvaluationError(
                f"{path} holds what another model said ({meta.get('model')}, not "
                f"{self.model_key}); delete it or name another cache folder"
            )
        if table.schema.names != self.schema.names:
            raise EvaluationError(f"{path} has columns {table.schema.names}; delete it")
        return table.to_pylist()


def _hold(held: dict[str, dict[str, Any]], rows: Sequence[dict[str, Any]]) -> None:
    """Take rows in; of two generations after one prompt the longer stays."""
    for row in rows:
        if row["key"] not in held or _length(row) >= _length(held[row["key"]]):
            held[row["key"]] = row


def _length(row: dict[str, Any]) -> tuple[int, bool]:
    return len(row.get("tokens", ())), row.get("complete", False)


def key_of(*parts: object) -> str:
    """The key of a row: a hash of the tokens that are read, and of how."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def text_hash(text: str) -> str:
    """What stands for a text in a row of items, so that other data are seen to be others."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sequence_key(sequence: TokenSequence) -> str:
    """The key of a scored text: its tokens, and from which on they are scored."""
    return key_of("scores", sequence.tokens, sequence.scored_from("answer"))


def token_scores(row: dict[str, Any]) -> TokenScores:
    """A row of the table of scores."""
    return TokenScores(
        np.array(row["logp"], np.float32),
        np.array(row["rank"], np.int32),
        np.array(row["hit"], bool),
        np.array(row["entropy"], np.float32),
        np.array(row["variance"], np.float32),
    )


Compute = Callable[[list[int]], Iterable[list[dict[str, Any]]]]
"""(numbers of what is missing) → batches of their rows, each kept as soon as it is there."""


Serves = Callable[[int, dict[str, Any]], bool]
"""(number of what is asked, its row) → whether the row says all of it."""


def looked_up(
    table: Table,
    keys: Sequence[str],
    compute: Compute,
    sizes: Sequence[int],
    serves: Serves = lambda number, row: True,
) -> list[dict[str, Any]]:
    """The row of each key, in order; those that are missing are computed first, each once.

    Several ranks deal them out by their `sizes`, keep what they find, and tell it to the others.
    """
    wanted = _missing_everywhere(table, keys, serves)
    first = {}
    for number, key in enumerate(keys):
        if key in wanted:
            first.setdefault(key, number)
    if first:
        numbers = list(first.values())
        mine = parallel.deal([sizes[i] for i in numbers], parallel.world())[parallel.rank()]
        found = []
        for rows in compute([numbers[place] for place in mine]) if mine else ():
            table.add(rows)
            found += rows if parallel.world() > 1 else []
        for rows in parallel.gather(found):
            table.learn(rows)
    left = table.missing(keys)
    if left:
        raise EvaluationError(f"{len(left)} of {len(keys)} texts were not scored")
    return [table.rows[key] for key in keys]


def _missing_everywhere(table: Table, keys: Sequence[str], serves: Serves) -> set[str]:
    """Keys that no rank has a row of; rows that some have, from work of their own, are told."""
    own = _missing(table, keys, serves)
    if parallel.world() == 1:
        return own
    lacking = set().union(*parallel.gather(own))
    for rows in parallel.gather([table.rows[key] for key in lacking if key in table.rows]):
        table.learn(rows)
    return _missing(table, keys, serves)


def _missing(table: Table, keys: Sequence[str], serves: Serves) -> set[str]:
    return {
        key
        for number, key in enumerate(keys)
        if key not in table.rows or not serves(number, table.rows[key])
    }
