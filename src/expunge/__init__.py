"""Remove chosen content from a language model, keep everything else, and prove both.

Each function takes a recipe (a YAML file, a mapping or a `Recipe`) and the folder to work in; what
that folder holds already is not computed again.
"""

__version__ = "0.1.0"


from pathlib import Path
from typing import Any

from expunge import semeval
from expunge.pipeline import Pipeline, RecipeLike

__all__ = ["evaluate", "merge", "report", "run", "semeval", "tune", "unlearn"]

# These stand in place of the subpackages of the same names; import from those with
# `from expunge.merge.methods import ...`.


def run(recipe: RecipeLike, out: Path | str) -> dict[int, Path]:
    """Run every stage of a recipe; returns the folder of each seed's report."""
    return Pipeline(recipe, out).run()


def tune(recipe: RecipeLike, out: Path | str) -> Path:
    """Make the target of a recipe; returns its folder."""
    return Pipeline(recipe, out).target.base


def unlearn(recipe: RecipeLike, out: Path | str, branch: str | None = None) -> dict[str, Path]:
    """Train the branches of a recipe (or one of them) for its first seed; returns their folders."""
    return {name: w.folder for name, w in Pipeline(recipe, out).branches(branch).items()}


def merge(recipe: RecipeLike, out: Path | str) -> dict[str, Path]:
    """Merge the branches of a recipe for its first seed; returns the merges' folders."""
    return {name: w.folder for name, w in Pipeline(recipe, out).merges().items()}


def evaluate(recipe: RecipeLike, out: Path | str) -> dict[str, dict[str, Any]]:
    """Score every model of a recipe for its first seed; returns each one's scores."""
    pipeline = Pipeline(recipe, out)
    weights = pipeline.models(pipeline.recipe.seeds[0])
    unscored = pipeline.recipe.unscored
    return {n: pipeline.evaluate(n, made)[0] for n, made in weights if n not in unscored}


def report(recipe: RecipeLike, out: Path | str) -> Path:
    """Write the report of a recipe's first seed; returns its folder."""
    pipeline = Pipeline(recipe, out)
    return pipeline.report(pipeline.recipe.seeds[0])
