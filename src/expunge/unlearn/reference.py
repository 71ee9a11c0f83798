"""Reference scores: what the model said before unlearning, computed once and kept on disk.

Dimensions: N scored tokens of a sequence, d width, V vocabulary. For full-vocabulary KL d + 1
numbers a token are kept in place of V: the anchor of a frozen head (see heads), or the final hidden
states. Losses on its logits keep these too; losses on hidden states, d numbers a token and block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from expunge import parallel, runs, sharding
from expunge.affine_heads import output_head
from expunge.data.batches import Scope, TokenSequence, pack, packs_by_length
from expunge.disk import readable_errors, safetensors_errors
from expunge.heads import Anchor, logps_and_anchor, token_logps
from expunge.lora import switched_off
from expunge.packs import Pack, block_states, hidden_states
from expunge.progress import progress
from expunge.unlearn.per_token import standardized, token_values
from expunge.unlearn.tensor_files import opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Asked:
    """What is to be known of the reference."""

    logps: bool = False
    """Log-probs of the scored tokens."""
    kl: bool = False
    """What the KL to it needs."""
    states: bool = False
    """Final hidden states, from which its logits follow."""
    hidden: tuple[int, ...] = ()
    """Blocks whose outputs are kept."""
    norms: tuple[int, ...] = ()
    """Blocks of whose outputs the lengths are kept."""
    standardized: bool = False
    """Log-probs as `logits.standardized` has them, beside the log-probs."""

    def __bool__(self) -> bool:
        return any((self.logps, self.kl, self.states, self.hidden, self.norms))

    @property
    def vectors(self) -> int:
        """Numbers kept a token, in units of the width."""
        return self.kl + self.states + len(self.hidden)

    @property
    def of_blocks(self) -> bool:
        """Whether only outputs of blocks are asked for, so that no pass goes beyond them."""
        return not (self.logps or self.kl or self.states)

    def label(self, trains_head: bool) -> str:
        """What of it a cache file is named after."""
        kept = "" if not self.kl else "-states" if trains_head else "-rows"
        kept += "-final" if self.states and not (self.kl and trains_head) else ""
        kept += "-blocks" if self.of_blocks else ""
        return kept + "".join(
            f"-{what}{'.'.join(map(str, layers))}"
            for what, layers in (("hidden", self.hidden), ("norms", self.norms))
            if layers
        )


@dataclass(frozen=True)
class Reference:
    """What is asked for of each sequence, by its place in the set."""

    logps: list[Tensor]  # each (N,) float32; 0 where they are not asked for
    anchors: list[Anchor] | None = None  # each of N tokens
    states: list[Tensor] | None = None  # each (N, d)
    head: Tensor | None = None  # (V, d), where training moves the model's own
    hidden: Mapping[int, list[Tensor]] = field(default_factory=dict)  # by block, each (N, d)
    norms: Mapping[int, list[Tensor]] = field(default_factory=dict)  # by block, each (N,)
    standardized: list[Tensor] | None = None  # each (N,)


def cached_reference(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    scope: Scope,
    *,
    file: Path,
    max_tokens: int,
    kl: bool = False,
    asked: Asked | None = None,
) -> Reference:
    """The reference scores of `sequences`, read from `file` or computed and written there.

    Without `asked` they are the log-probs, and what the KL needs if `kl`. Whoever names `file` puts
    the hash of the model, the data, the scope and `Asked.label` into the name. What another process
    is computing is waited for.
    """
    asked = asked or Asked(logps=True, kl=kl)
    with _to_make(file) as missing:
        if missing:
            with switched_off(model):
                _keep(_forward(model, sequences, scope, asked, max_tokens), file)
    before = None  # the head, which training moves
    if trains_head(model) and (asked.kl or asked.states):
        before = sharding.whole(output_head(model).detach()).clone()
    with opened(file, "delete it, and it is computed again") as stored:

        def all_of(name: str) -> list[Tensor]:
            return [stored.get_tensor(f"{i}.{name}") for i in range(len(sequences))]

        if asked.of_blocks:
            logps = [torch.zeros(len(s.tokens) - s.scored_from(scope)) for s in sequences]
        else:
            logps = all_of("logps")
        states = all_of("states") if asked.states or (asked.kl and before is not None) else None
        anchors = None
        if asked.kl and before is not None and states is not None:
            anchors = [Anchor(rows, head=before) for rows in states]
        elif asked.kl:
            pairs = zip(all_of("rows"), all_of("entropies"), strict=True)
            anchors = [Anchor(rows, entropies) for rows, entropies in pairs]
        return Reference(
            logps,
            anchors,
            states,
            before,
            {layer: all_of(f"hidden{layer}") for layer in asked.hidden},
            {layer: all_of(f"norms{layer}") for layer in asked.norms},
            all_of("standardized") if asked.standardized else None,
        )


def scores_now(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], *, max_tokens: int
) -> Reference:
    """Log-probs, plain and standardised, of whole `sequences` by the model as training has it."""
    asked = Asked(logps=True, standardized=True)
    found = _of_all_ranks(_forward(model, sequences, "document", asked, max_tokens))
    places = range(len(sequences))
    logps, standard = ([found[f"{i}.{n}"] for i in places] for n in ("logps", "standardized"))
    return Reference(logps, standardized=standard)


@contextmanager
def _to_make(file: Path) -> Iterator[bool]:
    """Whether this process is to write `file`; if so, no other does within the block."""
    if parallel.from_main(file.exists()):
        yield False
        return
    runs.make_folder(file.parent)
    lock = file.with_name(f".{file.name}.lock")
    with readable_errors(lock), runs.locked(lock, f"{file}", wait=True):
        missing = not parallel.from_main(file.exists())  # another process may have written it now
        yield missing
        if missing and parallel.is_main():
            lock.unlink(missing_ok=True)


def _of_all_ranks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for part in parallel.gather(tensors) for name, tensor in part.items()}


def _keep(tensors: dict[str, Tensor], file: Path) -> None:
    """Write what all ranks found; then it is there for each of them."""
    found = _of_all_ranks(tensors)
    if parallel.is_main():
        with runs.replacing(file) as temporary, safetensors_errors():
            save_file(found, temporary)
    parallel.barrier()


def trains_head(model: PreTrainedModel) -> bool:
    """Whether training will move the output head, so that KL needs the reference's own."""
    head = model.get_output_embeddings()
    return head is not None and head.weight.requires_grad  # pyright: ignore


@torch.no_grad()
def _forward(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    scope: Scope,
    asked: Asked,
    max_tokens: int,
) -> dict[str, Tensor]:
    """One pass over the sequences; of several ranks each reads its own."""
    place = {sequence.id: number for number, sequence in enumerate(sequences)}
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    tensors: dict[str, Tensor] = {}
    total = sum(len(sequence.tokens) for sequence in sequences)
    with progress("reference", total, "tokens") as bar:
        for group in my_packs(sequences, max_tokens):
            batch = pack(group, scope, device)
            found = _found(model, batch, asked)
            for number, sequence in enumerate(group):
                mine = batch.sequence == number
                for name, values in found.items():
                    tensors[f"{place[sequence.id]}.{name}"] = values[mine].cpu()
            bar(len(batch.tokens))
    sharding.release(model)
    model.train(training)
    return tensors


def _found(model: PreTrainedModel, batch: Pack, asked: Asked) -> dict[str, Tensor]:
    """What is asked for of the scored tokens of a pack."""
    layers = sorted({*asked.hidden, *asked.norms})
    if not layers:
        final, blocks = hidden_states(model, batch), {}
    else:
        stop = asked.of_blocks and not sharding.is_sharded(model)
        final, blocks = block_states(model, batch, layers, stop=stop)
    found = {f"hidden{layer}": blocks[layer] for layer in asked.hidden}
    found |= {f"norms{layer}": blocks[layer].float().norm(dim=-1) for layer in asked.norms}
    if asked.of_blocks or final is None:
        return found
    head, moves = output_head(model), trains_head(model)
    if asked.standardized:
        found["standardized"] = token_values(final, head, batch.targets, standardized)
    if asked.states or (asked.kl and moves):
        found["states"] = final
    if asked.kl and not moves:
        logps, anchor = logps_and_anchor(final, head, batch.targets)
        assert anchor.entropies is not None
        return found | {"logps": logps, "rows": anchor.rows, "entropies": anchor.entropies}
    return found | {"logps": token_logps(final, head, batch.targets)}


def my_packs(sequences: Sequence[TokenSequence], max_tokens: int) -> list[list[TokenSequence]]:
    """This rank's packs. Every rank has as many: the last is read again where one is missing."""
    sizes = [len(sequence.tokens) for sequence in sequences]
    everyone = [
        list(packs_by_length([sequences[i] for i in hand], max_tokens=max_tokens))
        for hand in parallel.deal(sizes, parallel.world())
    ]
    mine = everyone[parallel.rank()]
    return mine + (max(map(len, everyone)) - len(mine)) * (mine[-1:] or [[sequences[0]]])
