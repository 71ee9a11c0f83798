"""The analysis `landscape` of a run: surfaces of what merges of its first two branches show."""

from collections.abc import Mapping
from typing import Any

from expunge.analyse.tables import Tables
from expunge.analysing.kept import Analysis, Look, kept
from expunge.analysing.looked import Looked
from expunge.calibrate.landscape import Landscape, balance_line, surface
from expunge.calibrate.section import Calibrate
from expunge.memory import release_freed_memory


def analyse_landscape(looked: Looked, seed: int, look: Look) -> Analysis:
    """Metrics along the line between two branches and over density, and where membership is
    balanced. Candidates are read in memory; nothing is generated."""
    several = [c for c in looked.recipe.calibrate.values() if c.of is None or len(c.of) > 1]
    chosen = next(iter(several), Calibrate())
    done = looked.done(seed)
    names = [name for name in looked.recipe.calibrated_branches(chosen) if name in done]
    if len(names) < 2:
        raise looked.nothing("a landscape lies between two LoRA branches that are finished")
    if not looked.sets.members:
        raise looked.nothing("its data name no members and nonmembers to balance")
    config, pair = Landscape(), names[:2]

    def make() -> tuple[Mapping[str, Any], Tables]:
        release_freed_memory()
        resident, given, ends = looked.between(pair, seed, config)
        rows = surface(resident, given, config, *ends)
        about = {"models": pair, "settings": config.model_dump(mode="json")}
        return about, {"surface": rows, "balance": balance_line(rows)}

    inputs = looked.keys({name: done[name] for name in pair}) | looked.data_keys
    return kept(looked, "landscape", config, inputs, make)
