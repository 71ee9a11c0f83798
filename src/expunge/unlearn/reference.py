"""Reference scores: what the model said before unlearning, computed once and kept on disk.

Dimensions: N scored tokens of a sequence, d width. For full-vocabulary KL the final hidden states
are kept, d numbers a token in place of V; the frozen head turns them into logits when needed.
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
from expunge.lora import switched_off
from expunge.packs import hidden_states, output_head
from expunge.progress import progress
from expunge.scores import token_logps


@dataclass(frozen=True)
class Reference:
    """Log-probs, and hidden states if asked for, of each sequence by its place in the set."""

    logps: list[Tensor]  # each (N,) float32
    states: list[Tensor] | None  # each (N, d)
    head: Tensor | None = None  # (V, d), a copy, where training moves the model's own


def cached_reference(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    scope: Scope,
    *,
    states: bool,
    file: Path,
    max_tokens: int,
) -> Reference:
    """The reference scores of `sequences`, read from `file` or computed and written there.

    Whoever names `file` puts the hash of the model, the data and the scope into the name.
    """
    if not parallel.from_main(file.exists()):
        tensors = _forward(model, sequences, scope, states=states, max_tokens=max_tokens)
        _keep(tensors, file)
    head = output_head(model)
    # A head that training will move is copied; under LoRA it stays what it is.
    moves = states and head.requires_grad
    kept_head = sharding.whole(head.detach()).clone() if moves else None
    with safe_open(file, "pt") as stored:
        logps = [stored.get_tensor(f"{i}.logps") for i in range(len(sequences))]
        kept = [stored.get_tensor(f"{i}.states") for i in range(len(sequences))] if states else None
    return Reference(logps, kept, kept_head)


def _keep(tensors: dict[str, Tensor], file: Path) -> None:
    """Write what all ranks found; then it is there for each of them."""
    found = {name: tensor for part in parallel.gather(tensors) for name, tensor in part.items()}
    if parallel.is_main():
        file.parent.mkdir(parents=True, exist_ok=True)
        with runs.replacing(file) as temporary, runs.safetensors_errors():
            save_file(found, temporary)
    parallel.barrier()


@torch.no_grad()
def _forward(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    scope: Scope,
    *,
    states: bool,
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
            hidden = hidden_states(model, batch)
            logps = token_logps(hidden, output_head(model), batch.targets)
            for number, sequence in enumerate(group):
                mine = batch.sequence == number
                name = place[sequence.id]
                tensors[f"{name}.logps"] = logps[mine].cpu()
                if states:
                    tensors[f"{name}.states"] = hidden[mine].cpu()
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
