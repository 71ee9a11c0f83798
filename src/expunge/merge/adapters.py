"""Merge LoRA branches into one adapter or one full model, layer by layer.

Dimensions: M branches, r rank, (out, in) the shape of a linear layer. ΔW = scale · B A, A (r, in),
B (out, r).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from expunge.adapter_files import block_of
from expunge.errors import MergeError
from expunge.linear import is_linear, is_transposed, shape_of
from expunge.lora import LoraLinear
from expunge.merge.branches import Branch, read_branches, same_ranks
from expunge.merge.checkpoint import FLOATS, Checkpoint
from expunge.merge.companions import copy_companions
from expunge.merge.engine import Job, merge_to_folder
from expunge.merge.factoring import Pair, coefficients, factored, write_factors
from expunge.merge.operands import Operand, Update, Whole, constant, low_rank
from expunge.merge.section import Merge
from expunge.merge.tally import Tally
from expunge.merge.tensor import merged_float32
from expunge.merge.trim import Settings
from expunge.progress import Bar, progress


def merge_adapters(
    branches: Sequence[Path], config: Merge, out: Path, *, base: Path | None = None
) -> dict[str, Any]:
    """Merge the adapter folders `branches` as `config` says into the folder `out`; report on it.

    The report: `layers`, `norm` of the merged delta and `cosine` of it to each branch (over the
    whole model), `truncation_error` (relative, Frobenius; None where nothing was cut) and
    `storage_survival` (share of the weights with a delta whose stored value changed; None for an
    adapter).
    """
    read = _read(branches, config)
    if config.output == "model" and base is None:
        raise MergeError("output: model needs the base model that the branches were trained on")
    checkpoint = Checkpoint(base) if base is not None else None
    if checkpoint is not None:
        _check_fits(checkpoint, {layer: read[0].stored(layer) for layer in read[0].factors})
    if out.is_dir() and any(out.iterdir()):
        raise MergeError(f"{out} exists and is not empty; choose another folder")
    tally = Tally(len(read))
    with progress("merge", len(read[0].factors), "layers") as bar:
        if config.output == "model":
            assert checkpoint is not None
            for layer in read[0].factors:
                own = (branch.delta(layer) for branch in read)
                tally.count(_delta(read, config, layer), own)
                bar()
            tally.survival = _write_model(read, config, out, checkpoint)
        else:
            _write_merged_adapter(read, config, out, str(base or read[0].base), tally, bar)
    return tally.report()


def merged_deltas(branches: Sequence[Path], config: Merge) -> Iterator[tuple[str, Tensor]]:
    """Yield (layer name, merged float32 ΔW (out, in)) of each layer, exact in either space."""
    read = _read(branches, config)
    for layer in read[0].factors:
        yield layer, _delta(read, config, layer)


def merged_factors(branches: Sequence[Path], config: Merge) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (layer name, A (r, in), B (out, r)) of each layer as the merged adapter is written: of
    scale 1, truncated where it would be."""
    return _written(_read(branches, config), config)


@contextmanager
def apply_deltas(model: nn.Module, deltas: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Within this block the linear layers of `model` hold W + ΔW; afterwards W, bit for bit.

    Rounds as a written model would.
    """
    originals: list[Pair] = []
    try:
        for name, delta in deltas:
            layer = _linear_layer(model, name, delta)
            weight = cast(Tensor, layer.weight).detach()
            originals.append((weight, weight.clone()))
            own = delta.T if is_transposed(layer) else delta
            weight.copy_(weight.float() + own.to(weight.device))
        yield
    finally:
        for weight, original in originals:
            weight.copy_(original)


def _read(folders: Sequence[Path], config: Merge) -> list[Branch]:
    branches = read_branches(folders)
    if config.weights is not None and len(config.weights) != len(branches):
        raise MergeError(
            f"{len(config.weights)} weights were given for {len(branches)} branches; give one each"
        )
    if len(config.groups or ()) > branches[0].blocks:
        raise MergeError(
            f"{len(config.groups or ())} groups were given, and the branches adapt "
            f"{branches[0].blocks} blocks; give at most one each"
        )
    if config.space == "factors":
        same_ranks(branches)
    return branches


def _weights(branches: Sequence[Branch], config: Merge, layer: str) -> tuple[float, ...]:
    """One weight a branch, times the factor of the layer's group."""
    factor = config.factor(block_of(layer), branches[0].blocks)
    return tuple(weight * factor for weight in config.weights or (1.0,) * len(branches))


def _operand(branches: Sequence[Branch], layer: str, base: Whole | None = None) -> Operand:
    """The ΔW's of one layer, as the weight lies where there is a `base`; else (out, in)."""
    first = branches[0]
    swapped = base is not None and first.transposed
    parts = [
        _product(a, b, branch.scales[layer], swapped)
        for branch in branches
        for a, b in [branch.factors[layer]]
    ]
    return Operand(layer, first.stored(layer) if swapped else first.shape(layer), base, parts)


def _product(a: Tensor, b: Tensor, scale: float, swapped: bool) -> Update:
    one, two = (b.T, a.T) if swapped else (a, b)
    return low_rank(one.contiguous().numpy(), two.contiguous().numpy(), scale)


def layer_operands(
    branches: Sequence[Branch], config: Merge, layer: str
) -> list[tuple[Operand, Settings]]:
    """What the merge of one layer is formed of: its ΔW's, or in factor space its A's and its B's.

        weight of A_i: sign(w_i) √|w_i s_i|,   weight of B_i: √|w_i s_i|,   s_i the scale

    so that one branch alone comes out as w s B A. With several, cross-terms B_i A_j appear.

    Source: peft add_weighted_adapter.
    """
    if config.space == "delta":
        settings = config.settings(layer, _weights(branches, config, layer))
        return [(_operand(branches, layer), settings)]
    roots = [
        math.copysign(math.sqrt(abs(weight) * branch.scales[layer]), weight)
        for weight, branch in zip(_weights(branches, config, layer), branches, strict=True)
    ]

    def given(which: int, letter: str, weights: Sequence[float]) -> tuple[Operand, Settings]:
        name = f"{layer}.lora_{letter}"
        factors = [branch.factors[layer][which] for branch in branches]
        parts = [constant(factor.numpy()) for factor in factors]
        operand = Operand(name, tuple(factors[0].shape), None, parts)
        return operand, config.settings(name, weights)

    return [given(0, "A", roots), given(1, "B", [abs(root) for root in roots])]


def _delta(branches: Sequence[Branch], config: Merge, layer: str) -> Tensor:
    """The merged ΔW of one layer: (out, in)."""
    if config.space == "factors":
        a, b = _merged_factors(branches, config, layer)
        return b @ a
    ((operand, settings),) = layer_operands(branches, config, layer)
    return torch.from_numpy(merged_float32(operand, config.row, settings))


def _merged_factors(branches: Sequence[Branch], config: Merge, layer: str) -> Pair:
    """A's merged with A's and B's with B's: (r, in), (out, r), to be used with scale 1."""
    a, b = (
        torch.from_numpy(merged_float32(operand, config.row, settings))
        for operand, settings in layer_operands(branches, config, layer)
    )
    return a, b


def _write_model(
    branches: Sequence[Branch], config: Merge, out: Path, base: Checkpoint
) -> float | None:
    """Write the base with the merged deltas added; what storing kept of them."""
    plain = Merge(method="linear", space="delta")

    def job(name: str) -> Job:
        stored, layer = base[name], name.removesuffix(".weight")
        if layer == name or layer not in branches[0].factors:
            return Job(name, stored.dtype, stored.shape, carried=base.raw(name))
        whole = Whole(base.raw(name), stored.dtype)
        method = config.row
        settings = config.settings(layer, _weights(branches, config, layer))
        operand = _operand(branches, layer, whole)
        if config.space == "factors":
            a, b = _merged_factors(branches, config, layer)
            update = _product(a, b, 1.0, branches[0].transposed)
            operand = Operand(layer, stored.shape, whole, [update])
            method, settings = plain.row, plain.settings(layer, (1.0,))
        return Job(name, stored.dtype, stored.shape, operand, method, settings)

    jobs = [job(name) for name in base]
    report = merge_to_folder(jobs, out, lambda folder: copy_companions(base.folder, folder))
    return report.storage_survival


def _write_merged_adapter(
    branches: Sequence[Branch], config: Merge, out: Path, base: str, tally: Tally, bar: Bar
) -> None:
    def told() -> Iterator[tuple[str, Tensor, Tensor]]:
        for written in _written(branches, config, tally):
            yield written
            bar()

    write_factors(told(), base, out, transposed=branches[0].transposed)


def _written(
    branches: Sequence[Branch], config: Merge, tally: Tally | None = None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The factors of each layer, told to the `tally`."""
    for layer in branches[0].factors:
        if config.space == "delta":
            a, b = _low_rank(branches, config, layer, tally)
        else:
            a, b = _merged_factors(branches, config, layer)
            if tally is not None:
                tally.count(b @ a, (branch.delta(layer) for branch in branches))
        yield layer, a.contiguous(), b.contiguous()


def _low_rank(branches: Sequence[Branch], config: Merge, layer: str, tally: Tally | None) -> Pair:
    """Factors of the merged ΔW of one layer: exact for a sum that fits the rank, else truncated."""
    settings = config.settings(layer, _weights(branches, config, layer))
    sums = coefficients(config.row, settings)
    wanted = tally is not None or sums is None
    delta = _delta(branches, config, layer) if wanted else None
    pairs = [
        (a, branch.scales[layer] * b) for branch in branches for a, b in [branch.factors[layer]]
    ]
    a, b, cut = factored(pairs, None if sums is None else sums.tolist(), config.rank, delta)
    if tally is not None and delta is not None:
        tally.count(delta, (branch.delta(layer) for branch in branches))
        if cut:
            tally.cut(delta, b @ a)
    return a, b


def _linear_layer(model: nn.Module, name: str, delta: Tensor) -> nn.Module:
    """A linear layer that `delta` fits, beneath its adapter if it has one."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise MergeError(f"the branches adapt {name}, which the model does not have") from None
    layer = layer.base if isinstance(layer, LoraLinear) else layer
    if not is_linear(layer) or shape_of(layer) != delta.shape:
        raise MergeError(f"{name} does not have the shape {tuple(delta.shape)} in the model")
    shared = [m for m in model.modules() if getattr(m, "weight", None) is layer.weight]
    if len(shared) > 1:
        raise MergeError(f"{name} shares its weight with another layer, so it cannot be changed")
    return layer


def _check_fits(base: Checkpoint, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse layers that the base lacks or holds in another shape or an unfit type."""
    for layer, shape in shapes.items():
        stored = base.get(f"{layer}.weight")
        if stored is None:
            raise MergeError(
                f"{base.folder} lacks {layer}.weight, which the branches adapt. Same model?"
            )
        if stored.shape != shape:
            raise MergeError(
                f"{layer} is {shape} in the branches but {stored.shape} in {base.folder}"
            )
        if stored.dtype not in FLOATS:
            raise MergeError(
                f"{base.folder} stores {layer}.weight as {stored.dtype}; a delta can be added to "
                f"{', '.join(FLOATS)}"
            )
        if layer == "lm_head" and base.config.get("tie_word_embeddings"):
            raise MergeError(
                f"{base.folder} ties lm_head to its embeddings, so lm_head cannot be changed"
            )
