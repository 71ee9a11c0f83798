"""Documents that return: forgotten by one model of a run, and given away by another made later."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.evaluate.leaks import document_of

Row = dict[str, Any]
Item = Mapping[str, Any]


def risen(
    model: str, items: Sequence[Item], sources: Mapping[str, Sequence[Item]], margin: float
) -> list[Row]:
    """Forget items that a model says better than each model it was made from, the worst first.

    rise = score - max over sources of their score  >  margin

    An item that some source was not scored on is left out.
    """
    known = {name: _scores(own) for name, own in sources.items()}
    rows = []
    for item in items:
        if item["half"] != "forget" or item["score"] is None or not known:
            continue
        if not all(item["id"] in own for own in known.values()):
            continue
        best = max(known, key=lambda name: known[name][item["id"]])
        rise = item["score"] - known[best][item["id"]]
        if rise > margin:
            rows.append(
                {
                    "model": model,
                    "document": document_of(item),
                    "id": item["id"],
                    "task": item["task"],
                    "kind": item["kind"],
                    "score": item["score"],
                    "best_source": best,
                    "source_score": known[best][item["id"]],
                    "rise": rise,
                    "generation": item["generation"],
                }
            )
    return sorted(rows, key=lambda row: (-row["rise"], row["id"]))


def returned(models: Mapping[str, Sequence[Item]], *, gone: float, back: float) -> list[Row]:
    """Documents that a model had forgotten, and one made later gives away, worst first.

    A document is as present as its best said item: forgotten at `gone` or below, back at `back` or
    above. `models` are in the order in which they were made, the target left out.
    """
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    for name, items in models.items():
        for item in items:
            if item["half"] == "forget" and item["score"] is not None:
                own = worst[document_of(item)]
                own[name] = max(own.get(name, 0.0), item["score"])
    rows = []
    for document, scores in worst.items():
        order = [name for name in models if name in scores]
        forgotten = [name for name in order if scores[name] <= gone]
        again = [
            name
            for name in order
            if scores[name] >= back
            and any(order.index(name) > order.index(other) for other in forgotten)
        ]
        if again:
            rows.append(
                {
                    "document": document,
                    "forgotten_in": forgotten,
                    "back_in": again,
                    "worst": max(scores[name] for name in again),
                    "scores": scores,
                }
            )
    return sorted(rows, key=lambda row: (-row["worst"], row["document"]))


def _scores(items: Sequence[Item]) -> dict[str, float]:
    return {i["id"]: i["score"] for i in items if i["half"] == "forget" and i["score"] is not None}
