"""The analysis `failures` of a run: what its scored models wrote, item by item."""

from collections.abc import Mapping
from typing import Any

from expunge.analyse.failures import LookAtFailures, failures_tables
from expunge.analyse.tables import Tables
from expunge.analysing.kept import Analysis, Look, kept
from expunge.analysing.looked import Looked


def analyse_failures(looked: Looked, seed: int, look: Look) -> Analysis:
    """Collapsed outputs, collateral damage and returning documents of what was scored."""
    recipe, models = looked.recipe, looked.done(seed)
    scored, config = looked.evaluated_models(models), LookAtFailures()
    if not scored:
        raise looked.nothing("no model has been scored")

    def make() -> tuple[Mapping[str, Any], Tables]:
        sources = {name: recipe.made_from(name) for name in scored}
        sets = looked.sets
        tables = failures_tables(scored, sources, sets.forget, sets.retain, config)
        about = {
            "models": list(scored),
            "unfinished": [name for name in recipe.models if name not in scored],
            "settings": config.model_dump(),
        }
        return about, tables

    inputs = looked.keys({name: models[name] for name in scored})
    inputs |= {"evaluate": recipe.evaluate.model_dump_json(), **looked.data_keys}
    return kept(looked, "failures", config, inputs, make)
