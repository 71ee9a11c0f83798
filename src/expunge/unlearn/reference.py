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

from expunge import runs
from expunge.data.batches import Scope, TokenSequence, pack, packs_by_length
from expunge.heads import Anchor, anchor_of, token_logps
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
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = _forward(model, sequences, scope, kl=kl, max_tokens=max_tokens)
        with runs.replacing(file) as temporary, runs.safetensors_errors():
            save_file(tensors, temporary)
    with safe_open(file, "pt") as stored:

        def all_of(name: str) -> list[Tensor]:
            return [stored.get_tensor(f"{i}.{name}") for i in range(len(sequences))]

        logps, head = all_of("logps"), output_head(model)
        if not kl:
            return Reference(logps)
        if not head.requires_grad:
            entropies = zip(all_of("rows"), all_of("entropies"), strict=True)
            return Reference(logps, [Anchor(rows, entropy) for rows, entropy in entropies])
        before = head.detach().clone()  # training will move the model's own
        return Reference(logps, [Anchor(states, head=before) for states in all_of("states")])


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
        for group in packs_by_length(sequences, max_tokens=max_tokens):
            batch = pack(group, scope, device)
            hidden, head = hidden_states(model, batch), output_head(model)
            found = {"logps": token_logps(hidden, head, batch.targets)}
            if kl and head.requires_grad:
                found["states"] = hidden
            elif kl:
                anchor = anchor_of(hidden, head)
                assert anchor.entropies is not None
                found |= {"rows": anchor.rows, "entropies": anchor.entropies}
            for number, sequence in enumerate(group):
                mine = batch.sequence == number
                for name, values in found.items():
                    tensors[f"{place[sequence.id]}.{name}"] = values[mine].cpu()
            bar(len(batch.tokens))
    model.train(training)
    return tensors
