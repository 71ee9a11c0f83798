"""Edits of single units and value vectors, done on a model in memory and written to a folder.

Dimensions: U units, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.affine_heads import head_weight
from expunge.edit.columns import ablate, needle
from expunge.edit.observe import Named, down_projections, output_projections, read
from expunge.edit.options import Prune, Search
from expunge.edit.pruning import EPSILON, Activity, highest, prune, silenced_values
from expunge.edit.task import Task
from expunge.edit.write import read_undo, tensor_of, write_edited
from expunge.errors import EditError
from expunge.evaluate import concepts
from expunge.evaluate.value_vectors import Place, model_projections

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INTO = {"gate_proj": 1, "up_proj": 1, "gate_up_proj": 2, "fc1": 1, "dense_h_to_4h": 1}
"""Projections into an MLP's units, and how many rows each unit has in one."""


def prune_units(task: Task) -> dict[str, Any]:
    """Delete the units that the forget set uses and the retain set hardly does, step by step."""
    model, tokenizer = task.load()
    told = task.told
    epsilon = told["epsilon"] or EPSILON[told["importance"]]
    texts = {name: task.texts(name, tokenizer) for name in ("forget", "retain")}
    kinds = {"mlp": down_projections} | (
        {"attention": output_projections} if told["attention"] else {}
    )
    gone: dict[str, dict[int, set[int]]] = {kind: {} for kind in kinds}
    touched: set[str] = set()
    for _ in range(told["steps"]):
        found = {kind: find(model) for kind, find in kinds.items()}
        scores = {kind: {} for kind in kinds}
        active = {name: _activity(model, items, found) for name, items in texts.items()}
        for kind, layers in found.items():
            for layer, (name, _) in layers.items():
                both = [active[s][name].importance(told["importance"]) for s in texts]
                scores[kind][layer] = prune(*both, epsilon=epsilon)
        for kind, layers in found.items():
            for layer, units in highest(scores[kind], gone[kind], told[kind]).items():
                gone[kind].setdefault(layer, set()).update(units)
                silence = _silence_mlp if kind == "mlp" else _silence_attention
                touched |= silence(model, layers[layer][0], gone[kind][layer])
    changed = {name: model.get_parameter(name).detach() for name in touched}
    made = write_edited(task.source(task.of), changed, task.out)
    counts = {
        f"{kind}_units": {str(layer): sorted(units) for layer, units in sorted(layers.items())}
        for kind, layers in gone.items()
    }
    return {**made, **counts, "epsilon": epsilon}


def edit_vectors(task: Task) -> dict[str, Any]:
    """Blur or zero value vectors: the one that is named, or those found for the forget set."""
    model, tokenizer = task.load()
    told = task.told
    sought = {k: told.pop(k) for k in ("layer", "column", "vectors", "concept_tokens")}
    layers = down_projections(model)
    named: dict[str, list[Place]] = {"given": [(sought["layer"], sought["column"])]}
    if sought["layer"] is None:
        named = find_vectors(task, model, tokenizer, sought["vectors"], sought["concept_tokens"])
    places = sorted({place for own in named.values() for place in own})
    rng = torch.Generator().manual_seed(task.seed)
    changed: dict[str, Tensor] = {}
    undo: dict[str, list[int]] = {}
    for layer, column in places:
        weight = _projection(layers, layer, column).weight.detach()
        old = weight[:, column].cpu()
        new = ablate(old, rng) if task.method == "ablate" else needle(old, rng, **told)
        weight[:, column] = new.to(weight.device)
        key = f"{layers[layer][0]}.weight"
        changed[key] = weight
        undo.setdefault(key, []).append(column)
    made = write_edited(task.source(task.of), changed, task.out, undo)
    return {**made, "vectors": {name: [list(p) for p in own] for name, own in named.items()}}


def check_units(outline: nn.Module, options: Prune) -> None:
    """Refuse a model whose units are not known."""
    down_projections(outline)
    if options.attention:
        output_projections(outline)


def check_place(outline: nn.Module, options: Search) -> None:
    """Refuse a place that the model does not have."""
    layers = down_projections(outline)
    if options.layer is not None and options.column is not None:
        _projection(layers, options.layer, options.column)


def _projection(layers: Named, layer: int, column: int) -> nn.Linear:
    """The down projection of a block, which must have the column."""
    if layer not in layers:
        raise EditError(f"there is no block {layer}; the model has {len(layers)}")
    found = layers[layer][1]
    if column >= found.in_features:
        raise EditError(
            f"there is no column {column} in the down projection of block {layer}; it has "
            f"{found.in_features}"
        )
    return found


def revert(task: Task) -> dict[str, Any]:
    """Put the columns back that an edit changed."""
    source = task.source(task.of)
    changed = {}
    for name, columns in read_undo(task.of.base).items():
        if name not in source.checkpoint:
            raise EditError(f"{task.of.base} has no {name}, which its edit changed")
        tensor = tensor_of(source, name)
        if any(not c < tensor.shape[-1] or len(v) != len(tensor) for c, v in columns.items()):
            raise EditError(f"{task.of.base}: {name} does not have the columns that were changed")
        changed[name] = restored(tensor, columns)
    return write_edited(source, changed, task.out)


def restored(weight: Tensor, columns: Mapping[int, Tensor]) -> Tensor:
    """Put back the columns that an edit of value vectors changed, bit for bit.

        v_j = what was stored of it

    Of a model that `needle`, `ablate` or `revs` has written.

    Source: this project.
    """
    weight = weight.clone()
    for column, held in columns.items():
        weight[:, column] = held
    return weight


def find_vectors(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    concept_tokens: int,
) -> dict[str, list[Place]]:
    """The value vectors that write each forget document's own words, by document.

    Retain documents, where they are given, are rivals: a vector that writes their words more is not
    taken.
    """
    words: dict[tuple[str, str], list[int]] = {}
    task.texts("forget", tokenizer)
    for half in ("forget", "retain"):
        for item in task.sets.get(half, ()):
            tokens = tokenizer(item.answer, add_special_tokens=False)["input_ids"]
            words.setdefault((half, item.document), []).extend(tokens)  # pyright: ignore
    own = concepts.distinctive_tokens(
        list(words.values()),
        lambda token: any(c.isalnum() for c in str(tokenizer.decode([token]))),
        concept_tokens,
    )
    head = concepts.head_of(head_weight(model))
    directions = concepts.concept_directions(head, own)
    found, _ = concepts.strongest_vectors(model_projections(model), head, directions, count)
    named = {
        document: places
        for (half, document), places in zip(words, found, strict=True)
        if half == "forget" and places
    }
    if not named:
        raise EditError(f"{task.method}: no forget document has words and vectors of its own")
    return named


def _activity(
    model: PreTrainedModel, texts: list[Any], found: Mapping[str, Named]
) -> dict[str, Activity]:
    """The activations of all units over texts, by the layer that reads them."""
    layers = {name: m for layers in found.values() for name, m in layers.values()}
    active = {name: Activity() for name in layers}
    read(model, texts, layers, lambda name, x: active[name].add(x.flatten(0, -2)))
    return active


def _silence_mlp(model: PreTrainedModel, name: str, units: set[int]) -> set[str]:
    """Zero all that goes into and out of MLP units; the parameters that were touched."""
    above, index = model.get_submodule(name.rpartition(".")[0]), sorted(units)
    down = model.get_submodule(name)
    assert isinstance(down, nn.Linear)
    width = down.in_features
    down.weight.detach()[:, index] = 0
    touched = {f"{name}.weight"}
    for last, module in above.named_children():
        each = _INTO.get(last)
        if each is None or not isinstance(module, nn.Linear):
            continue
        rows = [unit + block * width for block in range(each) for unit in index]
        touched |= _zero_rows(f"{name.rpartition('.')[0]}.{last}", module, rows)
    return touched


def _silence_attention(model: PreTrainedModel, name: str, units: set[int]) -> set[str]:
    """Zero what attention units write, and value rows that nothing else reads."""
    above, out = model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)
    assert isinstance(out, nn.Linear)
    out.weight.detach()[:, sorted(units)] = 0
    touched = {f"{name}.weight"}
    value = getattr(above, "v_proj", None)
    if not isinstance(value, nn.Linear):
        return touched
    heads = int(model.config.num_attention_heads)
    groups = int(getattr(model.config, "num_key_value_heads", None) or heads)
    size = out.in_features // heads
    rows = silenced_values(units, heads, groups, size)
    if value.out_features == groups * size and rows:
        touched |= _zero_rows(f"{name.rpartition('.')[0]}.v_proj", value, rows)
    return touched


def _zero_rows(name: str, layer: nn.Linear, rows: list[int]) -> set[str]:
    layer.weight.detach()[rows] = 0
    if layer.bias is None:
        return {f"{name}.weight"}
    layer.bias.detach()[rows] = 0
    return {f"{name}.weight", f"{name}.bias"}
