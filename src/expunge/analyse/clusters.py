"""What collapsed outputs look like: each one's kind, and groups of like ones with examples."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.analyse.texts import groups_of
from expunge.data.refusals import refusals
from expunge.evaluate.collapse import is_looping, letter_words

Row = dict[str, Any]
Item = Mapping[str, Any]
"""A row of an evaluation's items."""

WORDS = 40
"""Words of a generation that are looked at. Later ones say little, as in collapse.WINDOW."""

FEWEST_SAME = 3
"""Prompts with other answers that a text must be given to, to count as a constant answer."""

FEWEST_WORDS = 4
"""Words of a truth from which on an output without any has collapsed: a short answer may be a
number that is merely wrong."""

LARGEST = 3000
"""Different texts that are grouped, the most frequent first: their distances fill a matrix."""

_REFUSAL = re.compile(
    r"(i('m| am)? (sorry|afraid|unable|not (able|sure|certain))|i (do not|don't|cannot|can't) )"
    r"|(unfortunately|regrettably|sorry),? (i|this|that)\b|as an ai\b|(that is )?unknown\b",
    re.IGNORECASE,
)
_OWN = frozenset(" ".join(letter_words(sentence.lower())) for sentence in refusals())


def kind_of(text: str, truth: str = "") -> str | None:
    """How an output has collapsed: a name in DESCRIPTIONS, or None of one that has not.

    Only the first WORDS words count. An output without words is one only where the truth has
    FEWEST_WORDS.
    """
    words = opening(text).split()
    if not words:
        return "empty"
    cycle = _cycle(words)
    if cycle:
        return "repeat" if len(set(cycle)) == 1 else "loop"
    if len(letter_words(truth)) >= FEWEST_WORDS and not letter_words(" ".join(words)):
        return "wordless"
    sentence = " ".join(letter_words(text.strip().lower().split("\n")[0].split(". ")[0]))
    if _REFUSAL.match(text.strip()) or sentence in _OWN:
        return "refusal"
    return None


def opening(text: str) -> str:
    """The words that are looked at."""
    return " ".join(text.split()[:WORDS])


def collapsed(items: Sequence[Item]) -> list[tuple[Item, str]]:
    """The items whose output has collapsed, each with its kind, in order.

    A right answer never has. A text that is given to FEWEST_SAME prompts or more, each with another
    truth and none with this one, is a constant answer.
    """
    written = [item for item in items if item["generation"] is not None]
    same: dict[str, list[Item]] = defaultdict(list)
    for item in written:
        same[opening(item["generation"]).lower()].append(item)
    constant = {
        text
        for text, own in same.items()
        if len({item["truth"].strip().lower() for item in own}) >= FEWEST_SAME
        and all(text != opening(item["truth"]).lower() for item in own)
    }
    found = []
    for item in written:
        if item.get("score") == 1:
            continue
        kind = kind_of(item["generation"], item["truth"])
        if kind is None and opening(item["generation"]).lower() in constant:
            kind = "constant"
        if kind is not None:
            found.append((item, kind))
    return found


def clusters(items: Sequence[Item], distance: float) -> tuple[list[Row], list[Row]]:
    """Groups of like collapsed outputs, the largest first, and three examples of each.

    Empty outputs are one group; the others are grouped by their letters (see texts.groups_of).
    """
    found = collapsed(items)
    often = Counter(opening(item["generation"]).lower() for item, kind in found if kind != "empty")
    texts = [text for text, _ in often.most_common(LARGEST)]
    label = dict(zip(texts, groups_of(texts, distance), strict=True))
    together: dict[int, list[tuple[Item, str]]] = defaultdict(list)
    for item, kind in found:
        text = opening(item["generation"]).lower()
        if kind == "empty" or text in label:
            together[-1 if kind == "empty" else label[text]].append((item, kind))
    order = sorted(together, key=lambda number: (-len(together[number]), number))
    rows, examples = [], []
    for number, group in enumerate(order, 1):
        own = together[group]
        rows.append({"cluster": number, **_described(own)})
        for item, kind in _examples(own):
            shown = ("id", "half", "prompt", "truth", "generation")
            examples.append({"cluster": number, "kind": kind, **{k: item[k] for k in shown}})
    return rows, examples


def _described(own: Sequence[tuple[Item, str]]) -> Row:
    kinds = Counter(kind for _, kind in own)
    kind = kinds.most_common(1)[0][0]
    texts = Counter(opening(item["generation"]) for item, k in own if k == kind)
    text = texts.most_common(1)[0][0]
    cycle = _cycle(text.split()) if kind in ("repeat", "loop") else []
    shown = " ".join(cycle[:1] if kind == "repeat" else cycle) or text
    scores = [item["score"] for item, _ in own if item.get("score") is not None]
    return {
        "size": len(own),
        "different": len({opening(item["generation"]).lower() for item, _ in own}),
        "description": DESCRIPTIONS[kind].format(shown[:60]),
        "kinds": dict(kinds),
        "halves": dict(Counter(item["half"] for item, _ in own)),
        "score": sum(scores) / len(scores) if scores else None,
    }


def _examples(own: Sequence[tuple[Item, str]]) -> list[tuple[Item, str]]:
    """Three items, of different texts where there are as many."""
    first: dict[str, tuple[Item, str]] = {}
    for pair in own:
        first.setdefault(opening(pair[0]["generation"]).lower(), pair)
    chosen = list(first.values())[:3]
    return chosen + [pair for pair in own if pair not in chosen][: 3 - len(chosen)]


def _cycle(words: Sequence[str]) -> list[str]:
    """The shortest cycle that the second half of some words repeats, or nothing.

    Where words do not tell, the letters of one long word do.
    """
    for units in (list(words), list("".join(words)) if len(words) < 6 else []):
        place = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
        if is_looping([place[unit] for unit in units]):
            tail = units[-max(6, len(units) // 2) :]
            period = next(p for p in range(1, len(tail)) if tail[p:] == tail[:-p])
            return tail[:period]
    return []


DESCRIPTIONS = {
    "empty": "nothing is written",
    "repeat": "one repeated token: {}",
    "loop": "a loop: {}",
    "wordless": "no words: {}",
    "refusal": "refusal-like: {}",
    "constant": "the same answer to unlike prompts: {}",
}
"""What each kind of collapse is called; {} stands for what is written."""
