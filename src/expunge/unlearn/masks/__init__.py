"""Weight masks: which weights training may move. The others stay as they are, bit for bit.

A mask is a function of the weights, the data and the seed. It is kept beside the checkpoint, so
that a run that goes on has the same.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from expunge import parallel, runs, sharding
from expunge.data.batches import TokenSequence
from expunge.disk import safetensors_errors
from expunge.errors import TrainingError
from expunge.needs import BOTH, FORGET, Needs
from expunge.unlearn.hidden import reached
from expunge.unlearn.masks import scored, structural
from expunge.unlearn.masks.evidence import input_norms, summed_gradient
from expunge.unlearn.masks.scored import Evidence, check_scores, highest
from expunge.unlearn.masks.sections import Column, LastBlocks, Layers, Mask, Scored, Wagle
from expunge.unlearn.masks.structural import Selection
from expunge.unlearn.optimizer import Optimizer
from expunge.unlearn.tensor_files import opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MASKS", "Column", "LastBlocks", "Layers", "Mask", "MaskRow", "Scored", "Wagle", "mask"]

FILE, FACTS = "mask.safetensors", "mask.json"


@dataclass(frozen=True)
class MaskRow:
    """One row of the table."""

    fn: Callable[..., Any]
    """(model, section) → what may move; or Evidence → a score of each entry, where it `scores`."""
    test: str
    scores: bool = False
    passes: tuple[Literal["forget", "retain"], ...] = ()
    """Halves that a forward and backward pass is made over."""
    inputs: bool = False
    """Reads the norms of the inputs of linear layers, and scores those alone."""
    needs: Needs = FORGET
    cost: str = "none; less to run backward"
    fidelity: str = "exact"


def mask(
    model: PreTrainedModel,
    config: Mask,
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    optimizer: Optimizer,
    *,
    seed: int,
    folder: Path | None,
    deepest: int | None = None,
) -> dict[str, Tensor]:
    """Let only the chosen parameters of `model` be trained; returns the masks of those in part.

    They are chosen among those that a loss reaches which reads no block behind `deepest`, where
    there is such a block. What was chosen lies in `folder` as mask.safetensors, and how much of
    what in mask.json.
    """
    file = folder / FILE if folder is not None else None
    if file is not None and parallel.from_main(file.exists()):
        chosen = _read(model, file)
    else:
        given = forget, retain, optimizer, seed
        chosen = _chosen(model, config, reached(model, deepest), *given)
        if folder is not None and parallel.is_main():
            _write(model, config, chosen, folder)
        parallel.barrier()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return {name: entries for name, entries in chosen.items() if entries is not None}


def check_mask(outline: PreTrainedModel, config: Mask, deepest: int | None = None) -> None:
    """Refuse a mask of parts that the model does not have, or that no loss reaches which reads no
    block behind `deepest`, from the model's outline on the meta device."""
    if not isinstance(config, Scored | Wagle):
        found = MASKS[config.kind].fn(outline, config)
        if not reached(outline, deepest) & {*found}:
            raise TrainingError(
                f"the mask {config.kind} lets move what lies behind block {deepest} alone, and the "
                f"terms read no block behind {deepest}"
            )


def _chosen(
    model: PreTrainedModel,
    config: Mask,
    within: set[str],
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    optimizer: Optimizer,
    seed: int,
) -> Selection:
    row = MASKS[config.kind]
    if sharding.is_sharded(model) and (row.scores or config.kind == "column"):
        raise TrainingError(
            f"mask.kind {config.kind} chooses single weights, which ranks that hold slices cannot "
            "do; use last_blocks or layers, or ranks that hold the model whole"
        )
    if isinstance(config, Scored | Wagle):
        scores = _scores(model, config, within, forget, retain, optimizer, seed)
        check_scores(scores)
        found: Selection = {
            name: None if bool(entries.all()) else entries
            for name, entries in highest(scores, config.ratio).items()
            if bool(entries.any())
        }
    else:
        found = {name: m for name, m in row.fn(model, config).items() if name in within}
    if not found:
        raise TrainingError(f"the mask {config.kind} leaves no weight that may move")
    return found


def _scores(
    model: PreTrainedModel,
    config: Scored | Wagle,
    within: set[str],
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    optimizer: Optimizer,
    seed: int,
) -> dict[str, Tensor]:
    """The score of each entry that is scored, by parameter."""
    row = MASKS[config.kind]
    model.requires_grad_(True)
    model.eval()
    halves = {"forget": forget, "retain": retain}
    gradients = {half: summed_gradient(model, halves[half], optimizer) for half in row.passes}
    inputs = input_norms(model, forget, optimizer) if row.inputs else {}
    options = {"mu": config.mu} if isinstance(config, Wagle) else {}
    scores = {}
    for name, parameter in model.named_parameters():
        if name not in within or (row.inputs and name not in inputs):
            continue
        # Seeded by name, so that the order of parameters cannot change the draw.
        draw = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        of = {half: found.pop(name) for half, found in gradients.items()}
        seen = Evidence(parameter.detach().float(), **of, inputs=inputs.get(name), random=draw)
        scores[name] = row.fn(seen, **options)
    return scores


def _write(model: PreTrainedModel, config: Mask, chosen: Selection, folder: Path) -> None:
    """Bits, eight a byte, of what may move in part; names of what may move whole."""
    weights = {
        name: sharding.shape_of(getattr(parameter, "slice", parameter)).numel()
        for name, parameter in model.named_parameters()
    }
    moves = {n: weights[n] if m is None else int(m.sum()) for n, m in chosen.items()}
    packed = {
        name: torch.from_numpy(np.packbits(entries.cpu().numpy()))
        for name, entries in chosen.items()
        if entries is not None
    }
    whole = json.dumps([name for name, entries in chosen.items() if entries is None])
    total = sum(weights.values())
    facts = {
        "mask": config.model_dump(mode="json"),
        "weights": total,
        "may_move": sum(moves.values()),
        "share": sum(moves.values()) / total,
        "tensors": {name: {"may_move": n, "of": weights[name]} for name, n in moves.items()},
    }
    runs.write_json(folder / FACTS, facts)
    with runs.replacing(folder / FILE) as temporary, safetensors_errors():
        save_file(packed, temporary, metadata={"whole": whole})


def _read(model: PreTrainedModel, file: Path) -> Selection:
    parameters = dict(model.named_parameters())
    cure = "delete it, and the weights are chosen again"
    with opened(file, cure, "np") as stored:
        chosen: Selection = dict.fromkeys(json.loads(stored.metadata()["whole"]))
        for name in stored.keys():  # noqa: SIM118 - not a dict
            held = parameters[name]
            bits = np.unpackbits(stored.get_tensor(name), count=held.numel()).astype(bool)
            chosen[name] = torch.from_numpy(bits).view(held.shape).to(held.device)
    return chosen


_TESTS = "tests/unlearn/test_masks.py"
_FULL = replace(FORGET, besides=("training: full",))
_BASE = f"{_TESTS}::test_baselines_are_the_largest_weights_and_chance"

MASKS = {
    "wagle": MaskRow(
        scored.wagle,
        scores=True,
        passes=("forget", "retain"),
        needs=replace(BOTH, besides=_FULL.besides),
        cost="1 C for each item of both halves, once; two gradient buffers",
        fidelity="adapted",
        test=f"{_TESTS}::test_wagle_worked_by_hand",
    ),
    "gradient": MaskRow(
        scored.gradient,
        scores=True,
        passes=("forget",),
        needs=_FULL,
        cost="1 C for each forget item, once; a gradient buffer",
        test=f"{_TESTS}::test_as_mu_grows_wagle_is_weight_times_gradient",
    ),
    "magnitude": MaskRow(scored.magnitude, scores=True, needs=_FULL, cost="none", test=_BASE),
    "wanda": MaskRow(
        scored.wanda,
        scores=True,
        inputs=True,
        needs=_FULL,
        cost="a forward pass over the forget items, once",
        fidelity="adapted",
        test=f"{_TESTS}::test_wanda_reads_the_inputs_of_linear_layers",
    ),
    "random": MaskRow(scored.random, scores=True, needs=_FULL, cost="none", test=_BASE),
    "last_blocks": MaskRow(
        structural.last_blocks,
        needs=_FULL,
        test=f"{_TESTS}::test_a_place_names_the_tensors_that_may_move",
    ),
    "layers": MaskRow(
        structural.layers,
        needs=_FULL,
        test=f"{_TESTS}::test_a_place_names_the_tensors_that_may_move",
    ),
    "column": MaskRow(
        structural.column,
        needs=_FULL,
        test=f"{_TESTS}::test_a_column_is_what_one_neuron_writes",
    ),
}
