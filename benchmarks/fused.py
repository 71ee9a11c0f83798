"""A training step whose blocks are one function each against the same step by modules, interleaved.

    python benchmarks/fused.py [--rounds 12]

SmolLM2-135M, forward and backward of one pack; losses of both are compared. Attention and head are
the same in both.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from expunge import lora, models
from expunge.data.batches import TokenSequence, pack
from expunge.fused.modules import FusedBlock
from expunge.provenance import git_commit, machine
from expunge.scores import score
from expunge.unlearn.trainer import autocast

CASES = {
    "LoRA of rank 32, 8 sequences of 72 to 174 tokens": ("lora", (87, 174, 160, 72) * 2),
    "LoRA of rank 32, 16 sequences of 22 to 174 tokens": (
        "lora",
        (22, 29, 87, 43, 174, 36, 58, 29) * 2,
    ),
    "LoRA of rank 32, 4 sequences of 21 tokens": ("lora", (21,) * 4),
    "every weight, 8 sequences of 85 tokens": ("full", (85,) * 8),
}


def main() -> None:
    """Run every case, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    cases = [_case(name, kind, lengths, rounds) for name, (kind, lengths) in CASES.items()]
    result = {"machine": machine(), "commit": git_commit(), "cases": cases}
    text = json.dumps(result, indent=1)
    (Path(__file__).parent / "results" / "fused.json").write_text(text + "\n")
    sys.stdout.write(text + "\n")


def _case(name: str, kind: str, lengths: tuple[int, ...], rounds: int) -> dict[str, Any]:
    model = _model(kind)
    draw = random.Random(0)
    rows = [tuple(draw.randrange(5, model.config.vocab_size) for _ in range(n)) for n in lengths]
    batch = pack([TokenSequence(str(i), row, 1) for i, row in enumerate(rows)], "document", "cpu")
    step = _step(model, batch)
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    fused = type(blocks[0])
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    losses: dict[str, float] = {}
    for turn in range(rounds + 1):
        for who, type_of_block in (("ours", fused), ("peer", fused.__mro__[2])):
            for module in blocks:
                module.__class__ = type_of_block
            begin = time.perf_counter()
            losses[who] = step()
            if turn:  # the first sets up products
                seconds[who].append(time.perf_counter() - begin)
    assert abs(losses["ours"] / losses["peer"] - 1) < 0.01, losses
    median = {who: statistics.median(found) for who, found in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True)]
    return {
        "case": name,
        "ours": round(sum(lengths) / median["ours"]),
        "peer": round(sum(lengths) / median["peer"]),
        "unit": "tokens/s",
        "ratio": round(statistics.median(ratios), 2),
        "equal": f"losses {losses['ours']:.4f} and {losses['peer']:.4f}",
    }


def _model(kind: str) -> Any:
    folder = models.resolve(models.EMBEDDED)
    model = models.load_model(folder, dtype="bfloat16" if kind == "lora" else "float32")
    if kind == "lora":
        lora.add_adapter(model, lora.Lora(dropout=0), seed=0)
    else:
        model.requires_grad_(True)
    return model.train()


def _step(model: Any, batch: Any) -> Callable[[], float]:
    def step() -> float:
        for parameter in model.parameters():
            parameter.grad = None
        with autocast(model.dtype, "bfloat16", "cpu"):
            loss = score(model, batch).nll.mean()
        loss.backward()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
