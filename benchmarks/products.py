"""Float32 on a CPU: our products against torch's, interleaved, alone and in a whole model.

Products have the shapes of SmolLM2-135M's layers and head. The model is SmolLM2 as it is loaded
here and as transformers loads it.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from evaluate_peers import plain_model

from expunge import models
from expunge.products import product
from expunge.provenance import git_commit, machine

RESULTS = Path(__file__).parent / "results" / "products.json"
SHAPES = ((576, 1536), (1536, 576), (576, 49152))  # (in, out)
ROWS = (1, 16, 64, 512)
ROUNDS = 9
GOAL = 1.5


def main() -> None:
    """Run all cases, print them and write the results."""
    cases = [_product(rows, *shape) for rows in ROWS for shape in SHAPES]
    cases += [_training(512, *SHAPES[0]), _reading()]
    result = {"machine": machine(), "commit": git_commit(), "seed": 0, "cases": cases}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for case in cases:
        print(f"{case['case']:44} {case['ours']:9.2f} {case['peer']:9.2f} {case['ratio']:6.2f}")


def _product(rows: int, width: int, out: int) -> dict[str, Any]:
    x, weight = _given(rows, width, out)
    with torch.inference_mode():
        return _case(
            f"{rows} x {width} by {width} x {out}",
            lambda: product(x, weight),
            lambda: torch.nn.functional.linear(x, weight),
        )


def _training(rows: int, width: int, out: int) -> dict[str, Any]:
    x, weight = _given(rows, width, out)
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def both(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        y = function(*leaves)
        return torch.cat([g.flatten() for g in torch.autograd.grad(y.sum(), leaves)])

    name = f"{rows} x {width} by {width} x {out}, backward too"
    return _case(name, lambda: both(product), lambda: both(torch.nn.functional.linear))


def _reading() -> dict[str, Any]:
    folder = models.resolve(models.EMBEDDED)
    ours, plain = models.load_model(folder), plain_model(folder)
    tokens = torch.randint(0, 40_000, (16, 160), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return _case(
            "SmolLM2-135M, 16 texts of 160 tokens, logits",
            lambda: ours(input_ids=tokens).logits,
            lambda: plain(input_ids=tokens).logits,
            rounds=3,
        )


def _case(
    name: str,
    ours: Callable[[], torch.Tensor],
    peer: Callable[[], torch.Tensor],
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    found, expected = ours(), peer()
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-5, error
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, taken in zip((ours, peer), times, strict=True):
            begin = time.perf_counter()
            function()
            taken.append(1e3 * (time.perf_counter() - begin))
    mine, theirs = map(statistics.median, times)
    return {
        "case": name,
        "ours": round(mine, 3),
        "peer": round(theirs, 3),
        "unit": "ms",
        "ratio": round(theirs / mine, 2),
        "goal": GOAL,
        "met": theirs / mine >= GOAL,
        "equal": f"apart by {error:.1e} of the norm",
    }


def _given(rows: int, width: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator), torch.randn(
        out, width, generator=generator
    )


if __name__ == "__main__":
    main()
