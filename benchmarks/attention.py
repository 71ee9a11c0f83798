"""Attention of a pack, forward and backward: ours against torch's, interleaved, on SmolLM2's heads.

Both get the same queries, keys and values in bfloat16; outputs and gradients must agree within the
rounding of bfloat16 before any time is counted.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from expunge import attention
from expunge.provenance import git_commit, machine

CASES = ((15,) * 10, (60,) * 5, (120,) * 4, (250,) * 4, (500,) * 2)
ROUNDS = 15
GOAL = 1.5


def main() -> None:
    cases = [_case(lengths) for lengths in CASES]
    result = {"machine": machine(), "commit": git_commit(), "cases": cases}
    text = json.dumps(result, indent=1)
    (Path(__file__).parent / "results" / "attention.json").write_text(text + "\n")
    sys.stdout.write(text + "\n")


def _case(lengths: tuple[int, ...]) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), 64) for heads in (9, 3, 3)]
    inputs = [torch.randn(s, generator=generator).bfloat16().requires_grad_() for s in shapes]
    weights = torch.randn(shapes[0], generator=generator).bfloat16()
    ours, torchs = (_pass(inputs, weights, lengths, short) for short in (512, 0))
    pairs = list(zip(ours, torchs, strict=True))
    error = max(float((a - b).float().norm() / b.float().norm()) for a, b in pairs)
    assert error < 0.01, error
    times: dict[int, list[float]] = {512: [], 0: []}
    for _ in range(ROUNDS):
        for short, found in times.items():
            start = time.perf_counter()
            _pass(inputs, weights, lengths, short)
            found.append(1e3 * (time.perf_counter() - start))
    median = {short: statistics.median(found) for short, found in times.items()}
    ratio = median[0] / median[512]
    return {
        "case": f"{len(lengths)} sequences of {lengths[0]} tokens, 9 heads on 3, width 64",
        "ours": round(median[512], 2),
        "peer": round(median[0], 2),
        "unit": "ms",
        "ratio": round(ratio, 2),
        "goal": GOAL,
        "met": ratio >= GOAL,
        "equal": f"outputs and gradients differ by {error:.4f} of their norm",
    }


def _pass(
    inputs: list[Tensor], weights: Tensor, lengths: tuple[int, ...], short: int
) -> list[Tensor]:
    """Output and gradients; with `short` 0 the weights are not kept and torch does the work."""
    attention.SHORT = short
    out = attention.causal_attention(inputs[0], inputs[1], inputs[2], lengths, None)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


if __name__ == "__main__":
    main()
