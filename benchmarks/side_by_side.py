"""Two commands on the same cores: threads that soon give way (GOMP_SPINCOUNT), against as they are.

    python benchmarks/side_by_side.py [--steps 8] [--rounds 3]

Each process trains a LoRA of the embedded model for some steps on all cores, alone or beside
another of its kind, with what docs/running.md advises to set and without it, in turn. The losses
must be the same to the last bit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from expunge.provenance import git_commit, machine

RESULTS = Path(__file__).parent / "results" / "side_by_side.json"
GOALS = {1: 0.9, 2: 2.0}
"""Times faster, by the number of processes: alone nothing to speak of may be lost."""

SPINS = "2000"
"""Turns that a thread waits for others before it gives its core away."""

_WORDS = "seven wizards quietly juggle bright glass orbs near harbours".split()  # noqa: SIM905


def main() -> None:
    """Run both cases, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options.steps)
    cases = [_case(count, options) for count in GOALS]
    result = {"machine": machine(), "commit": git_commit(), "cases": cases}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for case in cases:
        print({name: case[name] for name in ("case", "ours", "peer", "ratio", "goal", "met")})
    return None


def _case(count: int, options: Any) -> dict[str, Any]:
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    plain["OMP_NUM_THREADS"] = str(os.cpu_count())
    sharing = {**plain, "GOMP_SPINCOUNT": SPINS}
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    losses = set()
    for _ in range(options.rounds):
        for who, environment in (("ours", sharing), ("peer", plain)):
            command = [sys.executable, __file__, "--worker", "--steps", str(options.steps)]
            started = [
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
                for _ in range(count)
            ]
            for process in started:
                found = json.loads(process.communicate()[0].splitlines()[-1])
                seconds[who].append(found["seconds"])
                losses.add(tuple(found["losses"]))
    assert len(losses) == 1, losses
    ours, peer = (statistics.median(seconds[who]) for who in ("ours", "peer"))
    return {
        "case": "one process" if count == 1 else f"{count} processes at once",
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "unit": "seconds a step, the median of a process, and of these the median",
        "ratio": round(peer / ours, 2),
        "goal": GOALS[count],
        "met": peer / ours >= GOALS[count],
        "all_seconds": {who: [round(s, 3) for s in found] for who, found in seconds.items()},
        "equal": f"losses of {options.steps} steps the same to the last bit",
    }


def _work(steps: int) -> None:
    """Train, and say how long a step took and what the losses were."""
    from expunge import lora, models
    from expunge.data.batches import encode
    from expunge.data.examples import Example
    from expunge.unlearn.objective import Objective, Term
    from expunge.unlearn.passes import HalfData, Passes

    folder = models.resolve(models.EMBEDDED)
    model, tokenizer = models.load_model(folder, dtype="bfloat16"), models.load_tokenizer(folder)
    lora.add_adapter(model, lora.Lora(dropout=0), seed=0)
    texts = [" ".join(_WORDS[(3 * i + k) % len(_WORDS)] for k in range(30)) for i in range(8)]
    items = [
        encode(Example(str(i), text[:60], text[60:]), tokenizer, max_length=256)
        for i, text in enumerate(texts)
    ]
    objective = Objective((Term(half="retain", loss="nll", scope="document"),))
    passes, times, losses = Passes(model, {"retain": HalfData(items)}, objective, 1024), [], []
    model.train()
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(passes.backward([{"retain": tuple(range(8))}])["retain.nll"])
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(times[2:]), "losses": losses}))


if __name__ == "__main__":
    main()
