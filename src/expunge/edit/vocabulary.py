"""Rank editing done on a model in memory: targets of the forget set, block by block.

Dimensions: V tokens, d hidden size, L blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.affine_heads import head_weight
from expunge.config import Section
from expunge.edit.observe import Named, down_projections
from expunge.edit.ranks import Lens, lens_of, rarest, revs
from expunge.edit.task import Task
from expunge.edit.write import write_edited
from expunge.errors import EditError
from expunge.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Seen:
    """What one block did at the last position of a prompt."""

    activations: Tensor  # (n,)
    written: Tensor  # (d,) by the MLP
    residual: Tensor  # (d,) after the block


def edit_ranks(task: Task) -> dict[str, Any]:
    """Move the rarest tokens of each forget answer down the ranks of what the model writes."""
    model, tokenizer = task.load()
    told = task.told
    texts = task.texts("forget", tokenizer)[: told["items"]]
    lens, layers = lens_to(model), down_projections(model)
    size = len(lens.head)
    limits = {"margin": round(told["margin"] * size), "depth": round(told["depth"] * size)}
    limits |= {"candidates": told["candidates"], "rounds": told["rounds"]}
    end = tokenizer.eos_token_id
    targets = [
        (text.tokens[:place], text.tokens[place])
        for text in texts
        for place in rarest(text.tokens, text.answer_start, told["targets"], end)  # pyright: ignore
    ]
    if not targets:
        raise EditError("the forget answers hold no token to move down")
    edited: dict[int, set[int]] = {}
    before = [rank_of(model, lens, *target) for target in targets]
    with progress("move tokens down", len(targets), "tokens") as bar:
        for prompt, token in targets:
            for layer, columns in move_down(model, layers, lens, prompt, token, limits).items():
                edited.setdefault(layer, set()).update(columns)
            bar()
    after = [rank_of(model, lens, *target) for target in targets]
    names = {layer: f"{layers[layer][0]}.weight" for layer in edited}
    changed = {name: model.get_parameter(name).detach() for name in names.values()}
    undo = {names[layer]: sorted(columns) for layer, columns in edited.items()}
    made = write_edited(task.source(task.of), changed, task.out, undo)
    return {
        **made,
        "columns": {str(layer): sorted(columns) for layer, columns in sorted(edited.items())},
        "targets": len(targets),
        "margin_rank": limits["margin"],
        "beyond_margin_before": sum(r >= limits["margin"] for r in before) / len(before),
        "beyond_margin_after": sum(r >= limits["margin"] for r in after) / len(after),
    }


@torch.no_grad()
def move_down(
    model: PreTrainedModel,
    layers: Named,
    lens: Lens,
    prompt: Sequence[int],
    token: int,
    limits: dict[str, int],
) -> dict[int, list[int]]:
    """Edit blocks in turn until a token is beyond the margin in each; the columns edited.

    A block is left alone where the stream after it, or (but in the last block) what its MLP
    writes, ranks the token beyond the margin already.
    """
    edited: dict[int, list[int]] = {}
    last, seen = max(layers), observed(model, layers, prompt)
    for layer, (_, down) in sorted(layers.items()):
        one = seen[layer]
        ranks = lens.rank(torch.stack([one.residual, one.written]), token)
        beyond = (ranks >= limits["margin"]).tolist()
        if beyond[0] or (beyond[1] and layer != last):
            continue
        weight = down.weight.detach()
        found = (one.activations, one.written, one.residual)
        columns, values = revs(weight, *found, token, lens, **limits)
        weight[:, columns] = values
        edited[layer] = columns.tolist()
        if layer != last:
            seen = observed(model, layers, prompt)
    return edited


@torch.no_grad()
def rank_of(model: PreTrainedModel, lens: Lens, prompt: Sequence[int], token: int) -> int:
    """How many tokens the model thinks likelier after a prompt."""
    ids = torch.tensor([list(prompt)], device=lens.head.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    return int((logits > logits[token]).sum())


def observed(model: PreTrainedModel, layers: Named, prompt: Sequence[int]) -> dict[int, Seen]:
    """What each block does at the last position of a prompt."""
    found: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    blocks = blocks_of(model)
    hooks = []

    def mlp(layer: int) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            found[layer] |= {"activations": given[0][0, -1], "written": made[0, -1]}

        return hook

    def block(layer: int) -> Any:
        def hook(module: nn.Module, given: Any, made: Any) -> None:
            states = made[0] if isinstance(made, tuple) else made
            found[layer]["residual"] = states[0, -1]

        return hook

    for layer, (_, down) in layers.items():
        hooks.append(down.register_forward_hook(mlp(layer)))
        hooks.append(blocks[layer].register_forward_hook(block(layer)))
    try:
        ids = torch.tensor([list(prompt)], device=model.device)
        model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: Seen(**parts) for layer, parts in found.items()}


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a model whose MLP's output is added to the stream as it is."""
    decoder = model.get_decoder()
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise EditError(f"revs does not know the blocks of {type(model).__name__}")
    if hasattr(blocks[0], "post_feedforward_layernorm"):
        raise EditError(
            f"{type(model).__name__} normalises what its MLPs write before it is added, so revs "
            "cannot edit single value vectors of it"
        )
    return blocks


def lens_to(model: PreTrainedModel) -> Lens:
    """The final norm and the head of a model; a norm that is not RMSNorm is refused."""
    norm = getattr(model.get_decoder(), "norm", None)
    if not isinstance(norm, nn.Module) or not _is_rms_norm(norm):
        raise _no_rms_norm(model)
    gain = norm.get_parameter("weight").detach()
    return lens_of(head_weight(model).detach().float(), gain, _epsilon_of(norm))


@torch.no_grad()
def check_norms(outline: PreTrainedModel, options: Section) -> None:
    """Refuse a model whose blocks or last norm are such that revs cannot edit it."""
    blocks_of(outline)
    norm = getattr(outline.get_decoder(), "norm", None)
    if isinstance(norm, nn.Module):
        norm = copy.deepcopy(norm).to_empty(device="cpu")
        for parameter in norm.parameters():
            parameter.fill_(1.0)
    if not isinstance(norm, nn.Module) or not _is_rms_norm(norm):
        raise _no_rms_norm(outline)


@torch.no_grad()
def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether the module multiplies by its gain, and divides by the root mean square."""
    gain = getattr(norm, "weight", None)
    if gain is None:
        return False
    probe = torch.linspace(-1, 2, len(gain), device=gain.device)
    rms = (probe.square().mean() + _epsilon_of(norm)).sqrt()
    return torch.allclose(norm(probe[None])[0], gain * probe / rms, atol=1e-4)


def _epsilon_of(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) or 0)


def _no_rms_norm(model: PreTrainedModel) -> EditError:
    return EditError(
        f"revs needs a model whose last norm is RMSNorm; {type(model).__name__} is not"
    )
