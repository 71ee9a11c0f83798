"""Where the branches of a merge pull a weight in opposite directions, and which of them wins.

Dimensions: M branches, n entries of one tensor.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from expunge.merge import plain
from expunge.merge.adapters import layer_operands
from expunge.merge.branches import Branch
from expunge.merge.families import Elect
from expunge.merge.operands import Operand
from expunge.merge.section import Merge
from expunge.merge.trim import Settings, find_trim

Row = dict[str, Any]


def sign_conflicts(operand: Operand, how: Elect, settings: Settings) -> np.ndarray:
    """Counts of a tensor's entries: those of two branches or more, in conflict, won by each branch.

        τ_i = trim(δ_i), as the merge trims it
        conflict where some v_i > 0 and some v_j < 0,   v_i = τ_i, or w_i τ_i of a weighted vote
        won by branch i where sign(v_i) = sign(Σ_j v_j), a sum of 0 electing +

    Several branches can win one entry.

    Source: TIES, arXiv:2306.01708.
    """
    trim = find_trim(operand, how.keep, settings, plain)
    weighted = settings.options.get("vote") == "weighted"
    weights = torch.tensor(settings.weights if weighted else [1.0] * len(operand.models))
    total = np.zeros(2 + len(operand.models), np.int64)
    for piece in operand:
        votes = plain.trimmed(piece, trim)  # (M, n)
        votes = votes * weights[:, None].to(votes.device)
        several = (votes != 0).sum(0) > 1
        conflict = (votes > 0).any(0) & (votes < 0).any(0)
        elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
        won = [int((conflict & (vote * elected > 0)).sum()) for vote in votes]
        total += np.array([int(several.sum()), int(conflict.sum()), *won])
    return total


def conflict_rows(
    branches: Sequence[Branch], names: Sequence[str], config: Merge, layers: Iterable[str]
) -> list[Row]:
    """A row for each layer and each space: that of the merge, and ΔW = scale · B A itself."""
    how = config.row.how
    assert isinstance(how, Elect)
    spaces = [config.space] if config.space == "delta" else ["factors", "delta"]
    rows = []
    for layer in layers:
        for space in spaces:
            told = config.model_copy(update={"space": space})
            given = layer_operands(branches, told, layer)
            counts = sum(sign_conflicts(one, how, settings) for one, settings in given)
            entries = sum(one.size for one, _ in given)
            rows.append({"layer": layer, "space": space, **_shares(counts, entries, names)})
    return rows


def _shares(counts: Any, entries: int, names: Sequence[str]) -> Row:
    """Shares: of all entries that two keep, of those in conflict, of these won by each branch."""
    several, conflicts, *won = (int(count) for count in counts)
    return {
        "entries": entries,
        "shared": several / entries,
        "conflict": conflicts / several if several else None,
        "won": {
            name: number / conflicts if conflicts else None
            for name, number in zip(names, won, strict=True)
        },
    }
