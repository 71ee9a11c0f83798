"""LoRA on a base in bfloat16 and in four bits: bytes of the weights, peak memory, tokens a second.

    python benchmarks/quantized.py [--steps 6]

Each in a process of its own, the same steps of NPO + KL + NLL on the board's items; the first step
is not timed. A loss is that of the last step. Needs bitsandbytes: pip install 'expunge[qlora]'.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from expunge import models, quantized
from expunge.data.batches import encode_all
from expunge.data.sets import read_sets
from expunge.memory import peak_bytes
from expunge.plan.work import step_tokens
from expunge.provenance import git_commit
from expunge.recipe import load_recipe
from expunge.unlearn.halves import Halves
from expunge.unlearn.preparing import prepared
from expunge.unlearn.section import Branch
from expunge.unlearn.trainer import train

RECIPE = Path(__file__).parents[1] / "recipes" / "board.yaml"
ITEMS = 8
TERMS = [
    {"half": "forget", "loss": "npo", "weight": 0.4},
    {"half": "retain", "loss": "kl", "weight": 0.4, "scope": "document"},
    {"half": "retain", "loss": "nll", "weight": 0.2},
]


def main() -> None:
    """Run every case in turn and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(_case(options.case, options.steps)))
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        print(quantized.INSTALL)
        return
    print(f"commit {git_commit()}")
    for case in ("bfloat16", "nf4", "fp4"):
        words = [sys.executable, __file__, "--case", case, "--steps", str(options.steps)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout.splitlines()[-1])


def _case(case: str, count: int) -> dict[str, object]:
    recipe = load_recipe(RECIPE)
    place = models.resolve(recipe.model.path, recipe.model.revision)
    tokenizer, sets = models.load_tokenizer(place), read_sets(recipe.data)
    how = recipe.model.model_dump(include={"max_length", "prompt_tail", "separator"})
    forget, retain = (encode_all(s[:ITEMS], tokenizer, **how) for s in (sets.forget, sets.retain))
    kind = None if case == "bfloat16" else case
    model = models.load_model(place, dtype="bfloat16", quantize=kind)  # pyright: ignore
    states = [s for p in model.parameters() if (s := getattr(p, "quant_state", None)) is not None]
    held = sum(p.nbytes for p in model.parameters())
    held += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    config = Branch.model_validate(
        {
            "terms": TERMS,
            "lora": {"dropout": 0},
            "schedule": {"epochs": 8, "micro_batch": 4, "accumulation": 2},
            "optimizer": {"max_tokens": 1024, "checkpoint_seconds": 1e9},
        }
    )
    begins: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        halves = Halves(forget, retain, Path(work) / "cache", "key")
        phases, halves = halves.planned(config.schedule, seed=0)
        steps = [step for phase in phases for step in phase.steps][: count + 1]
        phases = [replace(phases[0], steps=steps)]
        made = prepared(model, halves, config, seed=0, made=phases)
        tokens = step_tokens(config, halves, phases)

        def noted(number: int) -> dict[str, float]:
            begins.append(time.monotonic())
            return made.gradient(number)

        model.train()
        given = {"steps": len(steps), "config": config.optimizer, "seed": 0, "label": case}
        log = train(made.parameters, noted, folder=Path(work), **given)
    begins.append(time.monotonic())
    speeds = [n / (end - begin) for (begin, end), n in zip(pairwise(begins), tokens, strict=True)]
    return {
        "base": case,
        "weights_mb": round(held / 1e6, 1),
        "peak_mb": round(peak_bytes() / 1e6),
        "tokens_per_second": round(median(speeds[1:])),
        "loss": round(log[-1]["forget"] + log[-1]["retain"], 4),
        "norm": round(log[-1]["norm"], 4),
    }


if __name__ == "__main__":
    main()
