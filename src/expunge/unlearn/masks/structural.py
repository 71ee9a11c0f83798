"""Masks by a weight's place: whole tensors, or one column. They cost nothing to find."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from expunge.errors import TrainingError
from expunge.registry import did_you_mean
from expunge.unlearn.masks.sections import Column, LastBlocks, Layers

Selection = dict[str, Tensor | None]
"""The parameters that may move, by name: all of one (None), or the entries that are true."""


def last_blocks(model: nn.Module, config: LastBlocks) -> Selection:
    """The last k blocks, without the final norm and the head.

    Nothing runs backward through the blocks before them.

    Source: AILS-NTUA at SemEval-2025 Task 4 trains the last 8.
    """
    places = _places(model)
    blocks = 1 + max(block for block, _ in places.values())
    _check_block("count", config.count - 1, blocks)
    first = blocks - config.count
    return {name: None for name, (block, _) in places.items() if block >= first}


def layers(model: nn.Module, config: Layers) -> Selection:
    """Chosen modules of chosen blocks: MLPs, down-projections, attention.

    Source: RMU, Li et al. 2024, arXiv:2403.03218 (three down-projections); SHA256 at SemEval-2025
    Task 4 (the MLPs of blocks 0 to 5); a baseline of WAGLE, arXiv:2410.17509 (every MLP).
    """
    places = _places(model)
    blocks = 1 + max(block for block, _ in places.values())
    for block in config.blocks or ():
        _check_block("blocks", block, blocks)
    known = {part for _, inside in places.values() for part in inside}
    for pattern in config.modules or ():
        if not any(fnmatchcase(part, pattern) for part in known):
            raise _unknown("modules", pattern, known)
    return {
        name: None
        for name, (block, inside) in places.items()
        if (config.blocks is None or block in config.blocks)
        and (config.modules is None or _matches(inside, config.modules))
    }


def column(model: nn.Module, config: Column) -> Selection:
    """One column of a down-projection: what one neuron adds to the residual stream.

        W[:, j],    y = W x

    Source: Needle, Hong et al. 2024, arXiv:2406.11614.
    """
    places = _places(model)
    _check_block("block", config.block, 1 + max(block for block, _ in places.values()))
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in places
    }
    known = {name.rsplit(".", 1)[-1] for name in found}
    if config.module not in known:
        raise _unknown("module", config.module, known)
    name, layer = next(
        (name, layer)
        for name, layer in found.items()
        if places[f"{name}.weight"][0] == config.block and name.endswith("." + config.module)
    )
    if config.index >= layer.in_features:
        raise TrainingError(
            f"mask.index is {config.index}, but {name} has {layer.in_features} columns"
        )
    chosen = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool)
    chosen[:, config.index] = True
    return {f"{name}.weight": chosen.to(layer.weight.device)}


def _places(model: nn.Module) -> dict[str, tuple[int, tuple[str, ...]]]:
    """For each parameter of a block its number, and the names of the modules that it is within."""
    places = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        number = next((n for n, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            places[name] = int(parts[number]), tuple(parts[number + 1 : -1])
    if not places:
        raise TrainingError("the mask names blocks, and the model has none that are numbered")
    return places


def _matches(inside: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(part, pattern) for part in inside for pattern in patterns)


def _check_block(field: str, block: int, blocks: int) -> None:
    if not 0 <= block < blocks:
        asked = block + 1 if field == "count" else block
        raise TrainingError(f"mask.{field} names {asked}, but the model has {blocks} blocks")


def _unknown(field: str, name: str, known: set[str]) -> TrainingError:
    return TrainingError(
        f"mask.{field}: no module of a block is called '{name}'.{did_you_mean(name, known)} "
        f"Known: {', '.join(sorted(known))}"
    )
