"""Sources: where examples and documents come from, and which of them are taken.

A path is a local file, `data:FILE` (a file of the data folder) or `hub:ID` (a Hub data set).
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, PositiveInt, model_validator

from expunge.config import Section, parse_section
from expunge.data import messages
from expunge.data.examples import Document, Example, check_unique_ids
from expunge.data.hub import hub_rows
from expunge.data.rows import Row, file_path, read_rows
from expunge.errors import DataError
from expunge.registry import did_you_mean
from expunge.runs import hash_file

DATA_FOLDER_VARIABLE = "EXPUNGE_DATA"
DATA_FOLDER = Path("../shared/data")
ANY_TASK = "*"

_PAIRS = {"input": ("output",), "question": ("answer",), "prompt": ("completion", "response")}
EXAMPLE_COLUMNS = (
    *((a, b) for a, both in _PAIRS.items() for b in both),
    *((messages.COLUMN,), ("text",), ("document",)),
)
"""Ways to say prompt and answer, the first that a row has counts; a plain text has no prompt."""

DOCUMENT_COLUMNS = (("document",), ("text",))

Item = TypeVar("Item", Example, Document)


class Source(Section):
    """Where examples come from, and how many of them are taken."""

    path: str = Field(min_length=1)
    """A .parquet, .jsonl, .json or .csv file; `data:FILE` within the folder that EXPUNGE_DATA
    names; or `hub:ID`, a data set of the Hugging Face Hub."""

    split: str | None = None
    """Of a file with a `split` column: the rows to keep. Of a Hub data set: the split (`train`)."""

    subset: str | None = None
    """The configuration of a Hub data set, such as `forget10` of TOFU."""

    revision: str | None = None
    """The commit of a Hub data set. Without it a finished stage cannot notice that it changed."""

    documents: dict[str, PositiveInt] | None = None
    """Take the first N documents of each task named, with all their items; tasks not named are left
    out. The key `*` stands for every document, whatever its task."""

    skip: int = Field(default=0, ge=0)
    """Leave out this many documents of each task before taking any."""

    first: str | None = None
    """A file of documents (such as members.jsonl) that come first when `documents` cuts."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, given: Any) -> Any:
        """A string stands for a source of that path."""
        return {"path": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.path in ("hub:", "data:"):
            raise ValueError(f"path names nothing behind {self.path}")
        if not self.path.startswith("hub:") and (self.subset or self.revision):
            raise ValueError("subset and revision belong to a hub: path")
        if self.documents is not None and not self.documents:
            raise ValueError("documents names no task, so nothing would be taken")
        if self.documents and ANY_TASK in self.documents and len(self.documents) > 1:
            raise ValueError(f"documents takes either '{ANY_TASK}' or task names, not both")
        if self.first is not None and not self.documents:
            raise ValueError("first only matters where documents says how many to take")
        if self.skip and not self.documents:
            raise ValueError("skip only matters where documents says how many to take")
        return self


def named_source(path: str, out: Path) -> Source:
    """The source that a command names, which writes `out` of it: another file than `path`."""
    source = parse_section({"path": path}, Source, origin="FILE")
    if not path.startswith("hub:") and out.resolve() == locate(path).resolve():
        raise DataError(f"{out} is the file that is read; name another to write")
    return source


def read_examples(source: Source) -> list[Example]:
    """The examples of a source, in file order."""
    rows = source_rows(source)
    columns = _columns(rows[0], EXAMPLE_COLUMNS, source.path)
    examples = []
    for number, row in enumerate(rows):
        prompt, answer = _pair(row, columns, source.path)
        name, task = _id(row, number, source.path), _task(row, source.path)
        examples.append(Example(name, prompt, answer, task))
    check_unique_ids(examples, source.path)
    return _first_documents(examples, [(item.document, item.task) for item in examples], source)


def read_documents(
    source: Source, only: Collection[str] | None = None, *, sampled: bool = True
) -> list[Document]:
    """The whole texts of a source, in file order; with `only`, those whose id is in it, and where
    these are no sample, another is a `DataError`."""
    rows = source_rows(source)
    (column,) = _columns(rows[0], DOCUMENT_COLUMNS, source.path)
    documents = [
        Document(
            id=_id(row, number, source.path),
            text=filled(row, column, source.path),
            task=_task(row, source.path),
        )
        for number, row in enumerate(rows)
    ]
    check_unique_ids(documents, source.path)
    if only is not None:
        others = [document.id for document in documents if document.id not in only]
        if len(others) == len(documents):
            raise DataError(f"{source.path} holds none of the {len(only)} documents asked for")
        if others and not sampled:
            raise DataError(
                f"{source.path}: {len(others)} of its {len(documents)} documents have no item in "
                f"forget ({', '.join(others[:3])}{' …' if len(others) > 3 else ''}); take them "
                "out, give their items, or say by forget.documents how many are forgotten"
            )
        documents = [document for document in documents if document.id in only]
    return _first_documents(documents, [(one.id, one.task) for one in documents], source)


def source_hash(source: Source) -> str:
    """Stands for what a source yields: contents (or Hub id and revision) and what is taken of them.

    The same content under another path has the same hash.
    """
    choice = source.model_dump(mode="json", exclude={"path", "first"})
    content = source.path if source.path.startswith("hub:") else hash_file(locate(source.path))
    first = hash_file(locate(source.first)) if source.first else None
    text = json.dumps([choice, content, first], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def locate_folder(path: str) -> Path:
    """The local folder that `path` names; `data:` stands for the data folder."""
    place = _place(path)
    if not place.is_dir():
        hint = f". For a Hub data set write hub:{path}" if path.count("/") == 1 else ""
        raise DataError(f"there is no folder at {place}{hint}")
    return place


def locate(path: str) -> Path:
    """The local file that `path` names; `data:` stands for the data folder."""
    place = _place(path)
    if place.is_dir():
        raise DataError(f"{place} is a folder; name a file in it")
    if not place.is_file():
        hint = f". For a Hub data set write hub:{path}" if path.count("/") == 1 else ""
        raise DataError(f"there is no data file at {place}{hint if not place.suffix else ''}")
    return place


def _place(path: str) -> Path:
    if path.startswith("data:"):
        return _data_folder(path) / path.removeprefix("data:")
    return file_path(path)


def _data_folder(path: str) -> Path:
    named = os.environ.get(DATA_FOLDER_VARIABLE)
    folder = Path(named).expanduser() if named else DATA_FOLDER
    if folder.is_dir():
        return folder
    reason = (
        f"{DATA_FOLDER_VARIABLE} names {named}, which is no folder"
        if named
        else f"{DATA_FOLDER_VARIABLE} is not set and there is no folder {DATA_FOLDER}"
    )
    raise DataError(f"cannot find {path}: {reason}")


def source_rows(source: Source) -> list[Row]:
    """The records of a source as they are, of its split; `documents` is for the caller to apply."""
    if source.path.startswith("hub:"):
        return hub_rows(source.path, source.subset, source.split, source.revision)
    rows = read_rows(locate(source.path))
    if source.split is None:
        return rows
    found = dict.fromkeys(repr(row.fields.get("split")) for row in rows)
    kept = [row for row in rows if row.fields.get("split") == source.split]
    if not kept:
        raise DataError(
            f"{source.path} has no rows of the split '{source.split}'. "
            f"Its splits: {', '.join(list(found)[:10])}"
        )
    return kept


def _columns(row: Row, known: Sequence[tuple[str, ...]], origin: str) -> tuple[str, ...]:
    """The first known set of columns that the first row has; every other row must have it too."""
    for columns in known:
        if all(name in row.fields for name in columns):
            return columns
    wanted = " or ".join(" + ".join(columns) for columns in known)
    found = ", ".join(repr(name)[:60] for name in list(row.fields)[:20]) or "none"
    raise DataError(f"{origin}, {row.place} lacks the columns {wanted}. Found: {found}")


def _pair(row: Row, columns: tuple[str, ...], origin: str) -> tuple[str, str]:
    """The prompt and the answer in these columns of a row."""
    if columns == (messages.COLUMN,):
        return messages.asked_and_answered(row.fields.get(columns[0]), f"{origin}, {row.place}")
    prompt = _string(row, columns[0], origin) if len(columns) == 2 else ""
    return prompt, filled(row, columns[-1], origin)


def _id(row: Row, number: int, origin: str) -> str:
    if "id" not in row.fields:
        return str(number)
    value = row.fields["id"]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return filled(row, "id", origin)


def filled(row: Row, name: str, origin: str) -> str:
    """The text in a column of a row; an empty one is refused."""
    value = _string(row, name, origin)
    if not value.strip():
        raise DataError(f"{origin}, {row.place}: '{name}' is empty")
    return value


def _task(row: Row, origin: str) -> str:
    return _string(row, "task", origin) if row.fields.get("task") is not None else ""


def _string(row: Row, name: str, origin: str) -> str:
    if name not in row.fields:
        raise DataError(f"{origin}, {row.place} lacks '{name}', which the first row has")
    value = row.fields[name]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{origin}, {row.place}: '{name}' must be text, but is {kind}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{origin}, {row.place}: '{name}' holds half a surrogate pair, not text")
    return value


def _first_documents(
    items: list[Item], places: Sequence[tuple[str, str]], source: Source
) -> list[Item]:
    """The items whose document is taken; `places` gives each item's document and task."""
    if source.documents is None:
        return items
    any_task = ANY_TASK in source.documents
    keys = [(document, ANY_TASK) for document, _ in places] if any_task else places
    preferred = _preferred({document for document, _ in places}, source)
    taken: set[tuple[str, str]] = set()
    for task, count in source.documents.items():
        found = list(dict.fromkeys(key for key in keys if key[1] == task))
        known = {task for _, task in keys}
        _check_enough(task, source.skip + count, len(found), known, source.path)
        found.sort(key=lambda key: key[0] not in preferred)  # stable: else in file order
        taken.update(found[source.skip : source.skip + count])
    return [item for item, key in zip(items, keys, strict=True) if key in taken]


def _preferred(known: Collection[str], source: Source) -> set[str]:
    if source.first is None:
        return set()
    named = {document.id for document in read_documents(Source(path=source.first))}
    if named.isdisjoint(known):
        raise DataError(f"{source.first} names no document of {source.path}: ids do not match")
    return named


def _check_enough(task: str, count: int, found: int, tasks: Iterable[str], origin: str) -> None:
    if found >= count:
        return
    if found:
        of_task = "" if task == ANY_TASK else f" of {task}"
        raise DataError(f"{origin} has only {found} documents{of_task}, but {count} are asked for")
    named = sorted(known for known in tasks if known)
    known = (
        f" Its tasks: {', '.join(repr(name)[:60] for name in named[:10])}"
        if named
        else " Its rows name no task"
    )
    raise DataError(f"{origin} has no task '{task}'.{did_you_mean(task, named)}{known}")
