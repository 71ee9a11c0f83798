"""How much of a layer's update is left once the merged weight is stored, type by type.

Dimensions: (out, in) the shape of a layer.
"""

from typing import Any

from expunge.analyse.deltas import LowRank
from expunge.merge.checkpoint import FLOATS, Checkpoint
from expunge.merge.fused import Rounding, Tally
from expunge.merge.operands import KINDS, Operand, Whole, low_rank
from expunge.merge.section import Merge
from expunge.merge.survival import Survival
from expunge.merge.tensor import merge_operand

Row = dict[str, Any]


def storage(delta: LowRank, layer: str, base: Checkpoint) -> Row | None:
    """The shares of a layer's entries whose stored value changes when ΔW is added to its weight.

        stored = #{round(W + ΔW) ≠ W} / #{ΔW ≠ 0}

    in the type that the base is stored in; of those, the shares whose code in int8 and int4
    differs as well (see merge/survival.py). None where the base holds no such layer as floats.
    """
    weight = base.get(f"{layer}.weight")
    if weight is None or weight.dtype not in FLOATS:
        return None
    update = low_rank(delta.a.float().numpy(), delta.b.float().numpy(), 1.0)
    whole = Whole(base.raw(weight.name), weight.dtype)
    operand = Operand(layer, weight.shape, whole, [update])
    plain = Merge(method="linear", space="delta")
    tally, survival, rounding = Tally(), Survival(), Rounding(KINDS[weight.dtype])
    settings = plain.settings(layer, (1.0,))
    for start, raw in merge_operand(operand, plain.row, settings, rounding, tally):
        survival.sample(operand, start, raw, rounding.kind)
    survival.moved, survival.changed = tally.moved, tally.changed
    stored, int8, int4 = survival.shares()
    return {"dtype": weight.dtype.lower(), "stored": stored, "int8": int8, "int4": int4}
