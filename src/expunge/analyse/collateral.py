"""What unlearning costs beside what is forgotten, by how near that lies to the forget set.

Dimensions: n items that both models were asked.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from expunge.analyse.texts import nearest
from expunge.data.examples import Example
from expunge.evaluate.drawing import document_of
from expunge.evaluate.paired import paired_difference

Row = dict[str, Any]
Item = Mapping[str, Any]

NEAR, SAME, OTHER, NEUTRAL = "neighbour", "same task", "unrelated", "neutral text"


def distances(
    retain: Sequence[Example], forget: Sequence[Example], share: float
) -> dict[str, tuple[str, float]]:
    """The group and the similarity of each retain item, by id.

        similarity = max over forget documents of cos(tf-idf(item), tf-idf(document))

    `neighbour`: the `share` of items that are most similar, unless they have no word in common;
    `same task`: others whose task the forget set has; `unrelated`: the rest.
    """
    documents: dict[str, list[str]] = defaultdict(list)
    for example in forget:
        documents[example.document] += [example.prompt, example.answer]
    texts = [f"{example.prompt} {example.answer}" for example in retain]
    near = nearest(texts, [" ".join(parts) for parts in documents.values()]).tolist()
    order = sorted(range(len(retain)), key=lambda i: (-near[i], retain[i].id))
    first = {i for i in order[: round(share * len(retain))] if near[i] > 0}
    tasks = {example.task for example in forget}
    return {
        example.id: (NEAR if i in first else SAME if example.task in tasks else OTHER, near[i])
        for i, example in enumerate(retain)
    }


def collateral(
    model: str,
    before: Sequence[Item],
    after: Sequence[Item],
    groups: Mapping[str, tuple[str, float]],
    neutral: tuple[float | None, float | None],
) -> list[Row]:
    """What a model lost against the target, by group and by kind of item.

        drop = mean of score_target - score_model,   rise = mean of nll_model - nll_target

    with the 95 % bootstrap interval of paired items (see paired.paired_difference). `neutral` are
    the losses on plain text of the target and of the model, of which only the means are kept.
    """
    then = {item["id"]: item for item in before if item["half"] == "retain"}
    pairs = [(then[i["id"]], i) for i in after if i["half"] == "retain" and i["id"] in then]
    rows = []
    for group in (NEAR, SAME, OTHER):
        for kind in ("all", "sc", "qa"):
            own = [
                (old, new)
                for old, new in pairs
                if groups[new["id"]][0] == group and kind in ("all", new["kind"])
            ]
            if own:
                similar = [groups[new["id"]][1] for _, new in own]
                rows.append(
                    {
                        "model": model,
                        "group": group,
                        "kind": kind,
                        "similarity": sum(similar) / len(similar),
                        "drop": _change(own, "score", -1, f"{group} {kind} score"),
                        "rise": _change(own, "nll", 1, f"{group} {kind} nll"),
                    }
                )
    old, new = neutral
    if old is not None and new is not None:
        rise = {"value": new - old, "n": None, "low": None, "high": None}
        rows.append({"model": model, "group": NEUTRAL, "kind": "all", "rise": rise})
    return rows


def _change(pairs: Sequence[tuple[Item, Item]], metric: str, sign: int, name: str) -> Row | None:
    """How a metric went up (sign 1) or down (-1), over the items that both models have it of."""
    both = [(old[metric], new[metric], document_of(old)) for old, new in pairs]
    known = [one for one in both if None not in one[:2]]
    if not known:
        return None
    old, new, owners = zip(*known, strict=True)
    found = paired_difference([sign * x for x in old], [sign * x for x in new], owners, name=name)
    return asdict(found)
