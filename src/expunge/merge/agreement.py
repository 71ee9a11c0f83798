"""What the models of a merge must agree on, tensor by tensor; where they do not, who differs."""

from collections.abc import Sequence

import numpy as np

from expunge.errors import MergeError
from expunge.merge.checkpoint import FLOATS
from expunge.merge.sources import HEAD, Source

Held = Sequence[tuple[Source, str]]
"""Models, each with the name under which it holds the tensor."""

_CONVERT = "only float32, bfloat16 and float16 can be merged, so convert it"


def bytes_of_all(name: str, held: Held) -> np.ndarray:
    """The bytes of a tensor that is not of floats: every model must hold the same."""
    first, own = held[0]
    stored, raw = first.checkpoint[own], first.checkpoint.raw(own)
    for source, theirs in held:
        other = source.checkpoint[theirs]
        if (other.dtype, other.shape) != (stored.dtype, stored.shape):
            odd, usual = (stored, other) if other.dtype in FLOATS else (other, stored)
            raise MergeError(
                f"{odd.file}: {odd.name} is {odd.dtype} {list(odd.shape)}, but {usual.dtype} "
                f"{list(usual.shape)} in {usual.file}; {_CONVERT}"
            )
        if source.adapter is not None and theirs in source.adapter.names():
            raise MergeError(
                f"{source.name} changes {theirs}, which is {other.dtype} in {other.file}; "
                f"{_CONVERT}"
            )
        if not (source.checkpoint.raw(theirs) == raw).all():
            raise MergeError(
                f"{name} is {stored.dtype} and differs between {stored.file} and {other.file}; "
                f"{_CONVERT}"
            )
    return raw


def mismatch(name: str, held: Held) -> str:
    """Which shape a tensor has in which model."""
    shapes = ", ".join(f"{list(s.checkpoint[own].shape)} in {s.name}" for s, own in held)
    more = ""
    if any(word in name for word in ("embed", "wte", HEAD)):
        more = "; name a tokenizer_source to line up vocabularies"
    return f"{name} is {shapes}{more}"
