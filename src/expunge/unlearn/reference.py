"""Reference scores: what the model said before unlearning, computed once and kept on disk.

Dimensions: N scored tokens of a sequence, d width. For full-vocabulary KL d + 1 numbers a token are
kept in place of V: the anchor of a frozen head (see scores), or the final hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from expunge import parallel, runs, sharding
from expunge.data.batches import Scope, TokenSequence, pack, packs_by_length
from expunge.heads import Anchor, logps_and_anchor, token_logps
from expunge.lora import switched_off
from expunge.packs import hidden_states, output_head
from expunge.progress import progress


@dataclass(frozen=True)
class Reference:
    """Log-probs, and what KL needs if asked for, of each sequence by its place in the set."""

    logps: list[Tensor]  # each (N,) float32
    anchors: list[Anchor] | None = None  # each of N tokens


def cached_reference(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    scope: Scope,
    *,
    kl: bool,
    file: Path,
    max_tokens: int,
) -> Reference:
    """The reference scores of `sequences`, read from `file` or computed and written there.

    Whoever names `file` puts the hash of the model, the data, the scope and whether the head is
    trained into the name.
    """
    if not parallel.from_main(file.exists()):
        _keep(_forward(model, sequences, scope, kl=kl, max_tokens=max_tokens), file)
    with safe_open(file, "pt") as stored:

        def all_of(name: str) -> list[Tensor]:
            return [stored.get_tensor(f"{i}.{name}") for i in range(len(sequences))]

        logps = all_of("logps")
        if not kl:
            return Reference(logps)
        if not trains_head(model):
            entropies = zip(all_of("rows"), all_of("entropies"), strict=True)
            return Reference(logps, [Anchor(rows, entropy) for rows, entropy in entropies])
        before = sharding.whole(output_head(model).detach()).clone()  # training moves its own
        return Reference(logps, [Anchor(states, head=before) for states in all_of("states")])


def _keep(tensors: dict[str, Tensor], file: Path) -> None:
    """Write what all ranks found; then it is there for each of them."""
    found = {name: tensor for part in parallel.gather(tensors) for name, tensor in part.items()}
    if parallel.is_main():
        file.parent.mkdir(parents=True, exist_ok=True)
        with runs.replacing(file) as temporary, runs.safetensors_errors():
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
    *,
    kl: bool,
    max_tokens: int,
) -> dict[str, Tensor]:
    """One pass with the adapters off."""
    place = {sequence.id: number for number, sequence in enumerate(sequences)}
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    tensors: dict[str, Tensor] = {}
    total = sum(len(sequence.tokens) for sequence in sequences)
    with switched_off(model), progress("reference", total, "tokens") as bar:
        for group in _my_packs(sequences, max_tokens):
            batch = pack(group, scope, device)
            hidden, head = hidden_states(model, batch), output_head(model)
            if kl and not trains_head(model):
                logps, anchor = logps_and_anchor(hidden, head, batch.targets)
                assert anchor.entropies is not None
                found = {"logps": logps, "rows": anchor.rows, "entropies": anchor.entropies}
            else:
                found = {"logps": token_logps(hidden, head, batch.targets)}
                found |= {"states": hidden} if kl else {}
            for number, sequence in enumerate(group):
                mine = batch.sequence == number
                for name, values in found.items():
                    tensors[f"{place[sequence.id]}.{name}"] = values[mine].cpu()
            bar(len(batch.tokens))
    sharding.release(model)
    model.train(training)
    return tensors


def _my_packs(sequences: Sequence[TokenSequence], max_tokens: int) -> list[list[TokenSequence]]:
    """This rank's packs. Every rank has as many: the last is read again where one is missing."""
    sizes = [len(sequence.tokens) for sequence in sequences]
    everyone = [
        list(packs_by_length([sequences[i] for i in hand], max_tokens=max_tokens))
        for hand in parallel.deal(sizes, parallel.world())
    ]
    mine = everyone[parallel.rank()]
    return mine + (max(map(len, everyone)) - len(mine)) * (mine[-1:] or [[sequences[0]]])
