"""Every item with what each model said, as the page carries it: whole, or cut to what fits.

What a generation copies from its truth is marked by spans of characters.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.evaluate.leaks import document_of
from expunge.evaluate.memorisation import copied_spans
from expunge.report.pieces import Cell, Items, Table

ROOM_BYTES = 3_600_000
"""What items may take of a page of 5 MB; the library of charts takes 0.9 MB, figures the rest."""

CUTS = (1 << 30, 20_000, 4000, 2000, 1000, 500, 250, 120, 40)
"""Longest text in characters: the first of these with which all items fit."""

MARKED = 20_000
"""Characters of a text in which copied passages are looked for: the time grows with its square."""

Answers = dict[str, Mapping[str, Any]]
"""Model to its row of one item."""

Text = str | tuple[str, int]
"""A text, or its beginning and how many characters were left out."""

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
"""No text can end the element that it is carried in, or begin a comment there."""


def explorer(items: Items, *, room: int = ROOM_BYTES, whole: str) -> dict[str, Any]:
    """The data of the page's list of items; `whole` says where what was cut can be read."""
    rows = _by_item(items)
    models = list(items)
    given = list(rows.values())
    kept, cut, size = given, 0, 0
    for cut in CUTS:
        size = len(script_json(_packed(given, models, cut)).encode())
        if size <= room:
            break
    else:
        count = max(1, len(given) * room // size)
        kept = [given[number * len(given) // count] for number in range(count)]
    data = _packed(kept, models, cut, mark=True)
    return data | {"given": len(given), "whole": whole}


def script_json(content: Any) -> str:
    """JSON that can stand in a script element: no text in it is read as markup."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)


def items_table(items: Items) -> Table:
    """Every item of every model, its texts whole."""
    header = ("model", "id", "half", "task", "kind", "score", "nll", "prompt", "truth")
    rows: list[tuple[Cell, ...]] = [
        (model, *(row.get(name) for name in header[1:]), row.get("generation"))
        for model, own in items.items()
        for row in own
    ]
    return Table("items", "Every item of every model.", (*header, "generation"), rows)


def _by_item(items: Items) -> dict[tuple[str, ...], Answers]:
    """Term and id to model to row, in the order of the first model that has the item."""
    found: dict[tuple[str, ...], Answers] = {}
    for model, rows in items.items():
        for row in rows:
            key = tuple(str(row[name]) for name in ("half", "task", "kind", "id"))
            found.setdefault(key, {})[model] = row
    return found


def _packed(
    rows: Sequence[Answers], models: Sequence[str], cut: int, *, mark: bool = False
) -> dict[str, Any]:
    return {"models": models, "items": [_item(answers, models, cut, mark) for answers in rows]}


def _item(answers: Answers, models: Sequence[str], cut: int, mark: bool) -> dict[str, Any]:
    first = next(iter(answers.values()))
    return {
        "id": str(first["id"]),
        "document": document_of(first),
        **{name: str(first[name]) for name in ("half", "task", "kind")},
        "prompt": _cut(first["prompt"], cut),
        "truth": _cut(first["truth"], cut),
        "answers": [_answer(answers.get(model), cut, mark) for model in models],
    }


def _answer(row: Mapping[str, Any] | None, cut: int, mark: bool) -> list[Any] | None:
    """Text, score, loss and copied spans of one model; None where it was not asked."""
    if row is None:
        return None
    said = row.get("generation")
    score, nll, least = row.get("score"), row.get("nll"), min(cut, MARKED)
    return [
        None if said is None else _cut(said, cut),
        None if score is None else round(float(score), 3),
        None if nll is None else round(nll, 3),
        copied_spans(row["truth"][:least], said[:least]) if mark and said is not None else [],
    ]


def _cut(text: str, cut: int) -> Text:
    return text if len(text) <= cut else (text[:cut], len(text) - cut)
