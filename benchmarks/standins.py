"""What stand-ins are worth: what attacks say of members, of documents never seen, and of stand-ins.

A calibration without non-members balances the members against `expunge data standins`. Here both
exist: each attack is scored against either, and the stand-ins against the documents never seen,
of which a perfect stand-in could not be told (AUC 1/2).

    python benchmarks/standins.py RUN MODEL [MODEL ...] [--seed 42] [--out FILE]
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.calibrate.reading import documents_of
from expunge.data.sets import Sets
from expunge.data.standins import stand_ins
from expunge.evaluate.balance import CHEAP, balance
from expunge.evaluate.reader import open_reader
from expunge.pipeline import Pipeline
from expunge.provenance import git_commit

RESAMPLES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/standins.json"))
    given = parser.parse_args()
    pipeline = Pipeline.of_run(given.run)
    members, unseen = pipeline.sets.members, pipeline.sets.nonmembers
    made, left_out = stand_ins(members, count=len(unseen), seed=0)
    found = {
        "commit": git_commit(),
        "seed": given.seed,
        "members": len(members),
        "unseen": len(unseen),
        "standins": len(made),
        "without facts to replace": len(left_out),
        "models": {},
    }
    for name in given.models:
        found["models"][name] = compared(pipeline, name, given.seed, made)
        show(name, found["models"][name])
    kept = json.loads(given.out.read_text()) if given.out.exists() else {}
    kept[pipeline.recipe.name] = found
    given.out.write_text(json.dumps(kept, indent=1) + "\n")


def compared(pipeline: Pipeline, name: str, seed: int, made: list[Any]) -> dict[str, Any]:
    """By pair of sides, the balance under each attack."""
    sets = pipeline.sets
    weights = pipeline.weights(name, seed)
    tables = pipeline.folder.store / "cache" / "tables"
    dtype = pipeline.recipe.model.dtype
    reader = open_reader(weights.base, weights.adapter, dtype=dtype, folder=tables)
    sides = Sets([], [], sets.members, [*sets.nonmembers, *made], [])
    scored = documents_of(reader, pipeline._material(sides, reader.tokenizer), CHEAP)
    cut = len(sets.nonmembers)
    parts = {
        attack: {"members": inside, "unseen": outside[:cut], "standins": outside[cut:]}
        for attack, (inside, outside) in scored.items()
    }

    def against(one: str, other: str) -> Mapping[str, Any]:
        pairs = {attack: (part[one], part[other]) for attack, part in parts.items()}
        return balance(pairs, resamples=RESAMPLES)

    return {
        f"{one}/{other}": against(one, other)
        for one, other in (("members", "unseen"), ("members", "standins"), ("standins", "unseen"))
    }


def show(name: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    print(name)
    for sides, attacks in found.items():
        for attack, numbers in attacks.items():
            low, high = numbers["auc_low"], numbers["auc_high"]
            text = f"{numbers['auc']:.2f} [{low:.2f}, {high:.2f}]"
            print(f"  {sides:18} {attack:16} AUC {text}  two-sided {numbers['two_sided']:.2f}")


if __name__ == "__main__":
    main()
