"""LoRA training on SmolLM2: our packed pass against transformers + peft, interleaved.

Both take the same ten sequences, with the same factors, bf16 base weights and float32 adapters;
peft gets them as a padded batch. The losses must agree before any time is counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model

from expunge import models
from expunge.data.batches import TokenSequence, pack
from expunge.lora import Lora, adapters_of, add_adapter
from expunge.provenance import git_commit, machine
from expunge.scores import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (250, 180, 60, 60, 40, 30, 30, 25, 20, 15)
ROUNDS = 7
GOAL = 2.0


def main() -> None:
    torch.manual_seed(0)
    folder = models.resolve(models.EMBEDDED)
    ours, peer = _ours(folder), _peer(folder)
    vocabulary = ours.config.vocab_size
    rows = [torch.randint(5, vocabulary, (n,)).tolist() for n in LENGTHS]
    _share_factors(ours, peer)
    losses = float(_loss_ours(ours, rows).detach()), float(_loss_peer(peer, rows).detach())
    assert abs(losses[0] - losses[1]) < 0.01 * losses[1], losses
    times = {"ours": [], "peer": []}
    for _ in range(ROUNDS):
        times["ours"].append(_seconds(ours, lambda: _loss_ours(ours, rows)))
        times["peer"].append(_seconds(peer, lambda: _loss_peer(peer, rows)))
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = median["peer"] / median["ours"]
    case = {
        "case": f"LoRA r 32, forward and backward, {sum(LENGTHS)} tokens in {len(LENGTHS)} rows",
        "ours": round(sum(LENGTHS) / median["ours"]),
        "peer": round(sum(LENGTHS) / median["peer"]),
        "unit": "useful tokens/s",
        "ratio": round(ratio, 2),
        "goal": GOAL,
        "met": ratio >= GOAL,
        "equal": f"losses {losses[0]:.4f} and {losses[1]:.4f} on the same factors",
    }
    result = {"machine": machine(), "commit": git_commit(), "cases": [case]}
    text = json.dumps(result, indent=1)
    (Path(__file__).parent / "results" / "lora.json").write_text(text + "\n")
    sys.stdout.write(text + "\n")


def _ours(folder: Path) -> PreTrainedModel:
    model = models.load_model(folder, dtype="bfloat16")
    add_adapter(model, Lora(dropout=0), seed=0)
    return model.train()


def _peer(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = LoraConfig(r=32, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(base, config).train()


def _share_factors(ours: PreTrainedModel, peer: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, layer in adapters_of(ours).items():
        torch.nn.init.normal_(layer.lora_B, std=0.01, generator=generator)
        other = peer.get_submodule(f"base_model.model.{name}")
        other.lora_A["default"].weight.data.copy_(layer.lora_A.data)
        other.lora_B["default"].weight.data.copy_(layer.lora_B.data)


def _loss_ours(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    sequences = [TokenSequence(str(i), tuple(row), 0) for i, row in enumerate(rows)]
    return -score(model, pack(sequences, "document", "cpu")).token_logps.mean()


def _loss_peer(model: Any, rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = labels[number, : len(row)] = torch.tensor(row)
    mask = (labels >= 0).long()
    return model(input_ids=tokens, attention_mask=mask, labels=labels).loss


def _seconds(model: torch.nn.Module, loss) -> float:
    model.zero_grad()
    start = time.perf_counter()
    loss().backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
