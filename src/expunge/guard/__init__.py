"""Guards: what stands before and after a model whose weights stay as they are.

guarded = expunge.guard.load("guard", model, tokenizer)
guarded.generate("Who is Ada Bell?")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expunge.guard.wrapper import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # imported when it is called for: torch and transformers take seconds
        from expunge.guard.wrapper import load

        return load
    raise AttributeError(f"module 'expunge.guard' has no attribute {name!r}")
