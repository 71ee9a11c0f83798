"""A decoder block as one function with a gradient of its own, for training on a CPU."""

from expunge.fused.modules import FAMILIES, fuse

__all__ = ["FAMILIES", "fuse"]
