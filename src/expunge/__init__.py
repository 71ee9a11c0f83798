"""Remove chosen content from a language model, keep everything else, and prove both.

Each function takes a recipe (a YAML file, a mapping or a `Recipe`) and the folder to work in; what
that folder holds already is not computed again.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from expunge import semeval
    from expunge.pipeline import evaluate, merge, report, run, tune, unlearn

__all__ = ["evaluate", "merge", "report", "run", "semeval", "tune", "unlearn"]

_FUNCTIONS = {"evaluate", "merge", "report", "run", "tune", "unlearn"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that `import expunge` costs nothing."""
    import importlib

    if name in _FUNCTIONS:
        return getattr(importlib.import_module("expunge.pipeline"), name)
    if name == "semeval":
        return importlib.import_module("expunge.semeval")
    raise AttributeError(f"module 'expunge' has no attribute '{name}'")
