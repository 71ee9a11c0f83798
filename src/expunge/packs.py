"""Packs: many sequences in one row, each attending to itself alone, without padding.

Dimensions: B sequences, T tokens of a pack, N scored tokens, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.attention import PACKED_ATTENTION
from expunge.errors import ModelError
from expunge.products import product

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_LIKE, _NEAR = 0.8, 0.05
"""The shortest of a bucket against its longest; how far the scores of a pack may be off."""


@dataclass(frozen=True)
class Pack:
    """B sequences laid end to end; each attends to itself alone."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, from 0 in each sequence
    lengths: tuple[int, ...]  # B lengths that sum to T
    scored: Tensor  # (N,) index into the T tokens of the token *before* each scored one
    targets: Tensor  # (N,) the scored tokens
    sequence: Tensor  # (N,) which of the B sequences each belongs to
    ids: tuple[str, ...]


def hidden_states(model: PreTrainedModel, pack: Pack, cache: Cache | None = None) -> Tensor:
    """Final hidden states of the tokens that predict the scored ones: (N, d).

    A `cache` receives the pack's keys and values. What it already holds is a prefix that every
    sequence of the pack continues; positions then count on from the prefix.
    """
    calls = _calls(model, pack, cache)
    return _by_token([_decoder(model)(**c.options).last_hidden_state for c in calls], calls, pack)


def block_states(
    model: PreTrainedModel, pack: Pack, layers: Sequence[int], *, stop: bool = False
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """hidden_states, and the outputs of some blocks (from 0) at the same tokens: each (N, d).

    With `stop` the pass ends behind the deepest of the blocks, and there are no final states.
    """
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int, output: Any) -> None:
        kept[layer].append(output[0] if isinstance(output, tuple) else output)
        if stop and layer == max(kept):
            raise _Enough

    blocks, calls, final = decoder_blocks(model), _calls(model, pack), []
    hooks = [
        blocks[layer].register_forward_hook(
            lambda _, given, output, layer=layer: keep(layer, output)
        )
        for layer in kept
    ]
    try:
        for call in calls:
            try:
                final.append(_decoder(model)(**call.options).last_hidden_state)
            except _Enough:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    states = {layer: _by_token(outputs, calls, pack) for layer, outputs in kept.items()}
    return (None if stop else _by_token(final, calls, pack)), states


def decoder_blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The blocks of the decoder, in order."""
    count = model.config.get_text_config().num_hidden_layers
    for child in model.get_decoder().children():
        if isinstance(child, torch.nn.ModuleList) and len(child) == count:
            return child
    raise ModelError(f"{type(model).__name__} does not hold its {count} blocks in one list")


class _Enough(Exception):
    """Ends a forward pass behind the last block that is read."""


def hidden_states_after(model: PreTrainedModel, pack: Pack, prefix: Cache) -> Tensor:
    """hidden_states of a pack whose sequences all continue `prefix`, which is left as it was."""
    states = hidden_states(model, pack, prefix)
    for layer in prefix.layers:
        layer.crop(-len(pack.tokens))  # pyright: ignore[reportAttributeAccessIssue]
    return states


def output_head(model: PreTrainedModel) -> Tensor:
    """The weight of the output head: (V, d)."""
    if hasattr(model, "gathered_head"):  # its weight is sliced
        return model.gathered_head()  # pyright: ignore
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError("this model's output head has a bias, which packed scoring lacks")
    return head.weight  # pyright: ignore[reportReturnType, reportOptionalMemberAccess]


def token_logits(model: PreTrainedModel, states: Tensor, *, choosing: bool = False) -> Tensor:
    """Logits of final hidden states: (N, d) to (N, V).

    What stands in for a model may have logits of its own, and others where a token is chosen.
    """
    if has_logits_of_its_own(model):
        return model.logits_of(states, choosing=choosing)  # pyright: ignore
    return product(states, output_head(model).to(states.dtype))


def has_logits_of_its_own(model: PreTrainedModel) -> bool:
    """Whether logits are more than a product of states with the head (see guard.standin)."""
    return hasattr(model, "logits_of")


def in_buckets(model: PreTrainedModel) -> bool:
    """Whether the sequences of a pack are forwarded in padded batches of like length instead.

    So are models with layers that would mix the sequences of a pack (recurrent state).
    """
    return getattr(model, "expunge_in_buckets", False)


@dataclass(frozen=True)
class _Call:
    """One call of the decoder."""

    options: dict[str, Any]
    sequences: list[int] | None = None
    """Whose tokens its rows are; None where one row holds the pack end to end."""


def _decoder(model: PreTrainedModel) -> Callable[..., Any]:
    # A sharded model's `decode` gathers what lies outside the layers too, the head among it.
    return getattr(model, "decode", None) or model.get_decoder()


def _calls(model: PreTrainedModel, pack: Pack, cache: Cache | None = None) -> list[_Call]:
    """The calls of the decoder that forward a pack."""
    if in_buckets(model):
        if cache is not None:
            raise ModelError(
                f"{type(model).__name__} keeps a state from token to token, so its texts cannot "
                "share what was read of a prefix; leave out the measure that needs it"
            )
        return _buckets(pack)
    if model.config._attn_implementation != PACKED_ATTENTION:
        raise ModelError("the model was not loaded for packed scoring (models.load_model does)")
    options = {
        "input_ids": pack.tokens[None],
        "position_ids": pack.positions[None],
        # A four-dimensional mask is passed through untouched; packed attention reads `lengths`.
        "attention_mask": torch.empty(1, 1, 1, 1, device=pack.tokens.device),
        "past_key_values": cache,
        "use_cache": cache is not None,
        "lengths": pack.lengths,
    }
    return [_Call(options)]


def _buckets(pack: Pack) -> list[_Call]:
    """Sequences of like length at once, padded on the right to the longest of them."""
    rows = pack.tokens.split(pack.lengths)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    calls = []
    while order:
        longest = len(rows[order[0]])
        bucket = [i for i in order if len(rows[i]) >= _LIKE * longest]
        tokens = torch.nn.utils.rnn.pad_sequence([rows[i] for i in bucket], batch_first=True)
        lengths = torch.tensor([len(rows[i]) for i in bucket], device=tokens.device)
        mask = (torch.arange(longest, device=tokens.device) < lengths[:, None]).long()
        options = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        calls.append(_Call(options, bucket))
        order = order[len(bucket) :]
    return calls


def _by_token(outputs: Sequence[Tensor], calls: Sequence[_Call], pack: Pack) -> Tensor:
    """What the calls gave at the tokens that predict the scored ones: (N, d)."""
    if calls[0].sequences is None:
        return outputs[0][0][pack.scored]
    found: dict[int, Tensor] = {}
    for call, states in zip(calls, outputs, strict=True):
        assert call.sequences is not None
        found |= {i: row[: pack.lengths[i]] for i, row in zip(call.sequences, states, strict=True)}
    return torch.cat([found[i] for i in range(len(pack.lengths))])[pack.scored]


@contextmanager
def given_to(
    layers: Mapping[str, torch.nn.Module], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within this block `take` is handed each layer's name and input: (..., in)."""
    hooks = [
        layer.register_forward_pre_hook(partial(_pass_on, take, name))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pass_on(
    take: Callable[[str, Tensor], None],
    name: str,
    layer: torch.nn.Module,
    given: tuple[Tensor, ...],
) -> None:
    take(name, given[0])


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model whose packed scores differ from its own logits, one sequence at a time.

    One with layers that mix the sequences of a pack is forwarded in buckets from now on; one with a
    head that is more than a matrix (soft caps, scales) is a `ModelError`.
    """
    vocabulary = len(output_head(model))
    tokens = [[(7 * i + 3 * k) % vocabulary for i in range(4 + k)] for k in range(2)]
    device = next(model.parameters()).device
    flat = torch.tensor([token for row in tokens for token in row], device=device)
    positions = torch.tensor([i for row in tokens for i in range(len(row))], device=device)
    lengths = tuple(len(row) for row in tokens)
    everywhere = torch.arange(len(flat), device=device)
    pack = Pack(flat, positions, lengths, everywhere, flat, flat, ("", ""))
    alone = [model(input_ids=row[None]).logits[0].float() for row in flat.split(lengths)]
    expected, error = torch.cat(alone), torch.tensor(float("inf"))
    if not expected.isfinite().all():
        raise ModelError(
            f"the logits of this {type(model).__name__} are not finite; its weights hold NaN or "
            "infinity, or are too large for their type"
        )
    stateful = getattr(model, "_is_stateful", False)  # transformers' mark of recurrent layers
    packable = model.config._attn_implementation == PACKED_ATTENTION and not stateful
    for buckets in (False, True) if packable else (True,):
        model.expunge_in_buckets = buckets  # pyright: ignore[reportArgumentType]
        packed = (hidden_states(model, pack) @ output_head(model).T).float()
        error = (packed - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if error < _NEAR:
            return
    raise ModelError(
        f"{type(model).__name__} cannot be scored by its hidden states: its logits differ by "
        f"{error:.0%} from those that its output head gives"
    )
