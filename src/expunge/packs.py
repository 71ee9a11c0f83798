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

from expunge.affine_heads import as_head_reads, output_head
from expunge.attention import PACKED_ATTENTION, LackingAttention, OwnAttention
from expunge.errors import ModelError
from expunge.products import product

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_LIKE = 0.8
"""The shortest of a bucket against its longest."""

_NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""How far the logits of a pack may be off, as a share of the greatest."""


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
    return _by_token([decoded(model, **call.options) for call in calls], calls, pack)


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
                final.append(decoded(model, **call.options))
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


def beyond_window(model: PreTrainedModel, tokens: int) -> bool:
    """Whether a text is longer than what its last token looks back on, where that is limited."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return bool(window) and tokens > window


@dataclass(frozen=True)
class _Call:
    """One call of the decoder."""

    options: dict[str, Any]
    sequences: list[int] | None = None
    """Whose tokens its rows are; None where one row holds the pack end to end."""


def decoded(model: PreTrainedModel, **options: Any) -> Tensor:
    """Final hidden states of what the decoder is given, as the head reads them: (B, T, d)."""
    # A sharded model's `decode` gathers what lies outside the layers too, the head among it.
    decoder = getattr(model, "decode", None) or model.get_decoder()
    states = decoder(**options).last_hidden_state
    return states if has_logits_of_its_own(model) else as_head_reads(model, states)


def _calls(model: PreTrainedModel, pack: Pack, cache: Cache | None = None) -> list[_Call]:
    """The calls of the decoder that forward a pack."""
    beyond = cache is None and beyond_window(model, max(pack.lengths))
    if beyond or in_buckets(model):
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

    One with layers that mix the sequences of a pack is forwarded in buckets from now on, with
    attention of its own where ours is not what it asks for; one whose logits are more than an
    affine function of its states (a soft cap) is a `ModelError`, and `OwnAttention` one whose
    layers have been given ours and do not read what it is.
    """
    kind, config = type(model).__name__, model.config.get_text_config()
    if getattr(config, "final_logit_softcapping", None):
        raise ModelError(
            f"{kind} caps its logits (final_logit_softcapping), which scoring by its hidden states "
            "leaves out; use a model without"
        )
    vocabulary = len(output_head(model))
    tokens = [[(7 * i + 3 * k) % vocabulary for i in range(4 + k)] for k in range(2)]
    device = next(model.parameters()).device
    flat = torch.tensor([token for row in tokens for token in row], device=device)
    positions = torch.tensor([i for row in tokens for i in range(len(row))], device=device)
    lengths = tuple(len(row) for row in tokens)
    everywhere = torch.arange(len(flat), device=device)
    pack = Pack(flat, positions, lengths, everywhere, flat, flat, ("", ""))
    given = model.config._attn_implementation
    if given == PACKED_ATTENTION:
        model.set_attn_implementation("eager")
        if model.config._attn_implementation == given:
            raise OwnAttention(f"{kind} takes no attention but its own; load it with that")
    alone = [model(input_ids=row[None]).logits[0].float() for row in flat.split(lengths)]
    expected, error = torch.cat(alone), torch.tensor(float("inf"))
    if not expected.isfinite().all():
        raise ModelError(
            f"the logits of this {kind} are not finite; its weights hold NaN or infinity, or are "
            "too large for their type"
        )
    ways = [(True, given)]
    if given == PACKED_ATTENTION:
        stateful = getattr(model, "_is_stateful", False)  # transformers' mark of recurrent layers
        ways = [(False, given), (True, "sdpa"), (True, "eager")][stateful:]
    for buckets, attention in ways:
        model.expunge_in_buckets = buckets  # pyright: ignore[reportArgumentType]
        try:
            if attention != model.config._attn_implementation:
                model.set_attn_implementation(str(attention))
            packed = (hidden_states(model, pack) @ output_head(model).T).float()
        except (LackingAttention, ValueError, TypeError, RuntimeError, IndexError):
            if (buckets, attention) == ways[-1]:
                raise
            continue  # its layers make nothing of this attention, or of the mask of a pack
        error = (packed - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        if error < _NEAR[model.dtype]:
            return
    raise ModelError(
        f"{kind} cannot be scored by its hidden states: its logits differ by {error:.0%} from "
        "those that its output head gives"
    )
