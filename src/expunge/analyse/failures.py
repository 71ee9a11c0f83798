"""How models fail: collapsed outputs in groups, damage by distance, documents that return."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from expunge.analyse.clusters import clusters
from expunge.analyse.collateral import collateral, distances
from expunge.analyse.returns import returned, risen
from expunge.config import Section
from expunge.data.examples import Example

Row = dict[str, Any]
Scored = Mapping[str, tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
"""Scores and items of each model, in the order in which they were made."""


class LookAtFailures(Section):
    """What counts as a failure."""

    distance: float = Field(default=0.6, gt=0, lt=1)
    """Cosine distance above which collapsed outputs are of different groups."""

    neighbours: float = Field(default=0.25, gt=0, lt=1)
    """Share of the retain items that count as neighbours of the forget set."""

    margin: float = Field(default=0.1, ge=0, lt=1)
    """By how much a score must exceed those of the models it was made from."""

    gone: float = Field(default=0.4, ge=0, le=1)
    """A document is forgotten where no item of it scores more."""

    back: float = Field(default=0.7, ge=0, le=1)
    """A document is given away where some item of it scores as much."""


def failures_tables(
    scored: Scored,
    sources: Mapping[str, Sequence[str]],
    forget: Sequence[Example],
    retain: Sequence[Example],
    config: LookAtFailures,
) -> dict[str, list[Row]]:
    """Every table of the analysis `failures`, by name.

    `sources` are what each model was made from. Damage is told against the target, where that was
    scored.
    """
    groups_rows, examples, damage, rises = [], [], [], []
    groups = distances(retain, forget, config.neighbours)
    target = scored.get("target")
    for name, (entry, items) in scored.items():
        found, shown = clusters(items, config.distance)
        groups_rows += [{"model": name, **row} for row in found]
        examples += [{"model": name, **row} for row in shown]
        if target is not None and name not in ("original", "target"):
            neutral = target[0]["nll"]["neutral"], entry["nll"]["neutral"]
            damage += collateral(name, target[1], items, groups, neutral)
        made_from = {s: scored[s][1] for s in sources.get(name, ()) if s in scored}
        if made_from and not {"original", "target"} & {*made_from}:
            rises += risen(name, items, made_from, config.margin)
    later = {n: items for n, (_, items) in scored.items() if n not in ("original", "target")}
    return {
        "clusters": groups_rows,
        "examples": examples,
        "collateral": damage,
        "risen": rises,
        "returned": returned(later, gone=config.gone, back=config.back),
    }
