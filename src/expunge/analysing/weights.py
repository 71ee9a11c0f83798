"""The analysis `weights` of a run: its branches, merges, edits and snapshots as changes."""

from collections.abc import Mapping
from typing import Any

from expunge import runs
from expunge.analyse.tables import Tables
from expunge.analyse.weights import Changed, LookAtWeights, summary, weights_tables
from expunge.analysing.kept import Analysis, Look, kept
from expunge.analysing.looked import Looked


def analyse_weights(looked: Looked, seed: int, look: Look) -> Analysis:
    """Angles, norms, spectra, overlaps, sign conflicts and storage of what is finished."""
    recipe, done = looked.recipe, looked.done(seed)
    if "target" not in done:
        raise looked.nothing("its target is not made")
    changed = {name: w for name, w in done.items() if _is_a_change(looked, name)}
    branches = {name: w for name, w in changed.items() if name in recipe.branches}
    made = {name: w for name, w in changed.items() if name not in recipe.branches}
    snapshots = {name: looked.snapshots(name, seed) for name in recipe.branches}
    run = Changed(
        looked.target.base,
        branches,
        made,
        {name: recipe.made_from(name) for name in made},
        {name: config for name, config in recipe.merges.items() if name in made},
        {name: found for name, found in snapshots.items() if found},
    )
    if not changed and not run.snapshots:
        raise looked.nothing("no branch has kept weights")
    config = LookAtWeights()

    def make() -> tuple[Mapping[str, Any], Tables]:
        tables = weights_tables(run, config)
        about = {
            "models": list(changed),
            "unfinished": [name for name in recipe.models if name not in done],
            "settings": config.model_dump(),
        }
        return {**about, "summary": summary(tables)}, tables

    inputs = looked.keys({"target": looked.target, **changed})
    for name, found in run.snapshots.items():
        inputs |= {f"{name}.{step}": runs.hash_folder(folder) for step, folder in found.items()}
    return kept(looked, "weights", config, inputs, make)


def _is_a_change(looked: Looked, name: str) -> bool:
    """Whether a model is the target's shape with other weights, and no guard or part of one."""
    if name in ("original", "target") or name in looked.recipe.guards:
        return False
    branch = looked.recipe.branches.get(name)
    return branch is None or branch.blocks is None
