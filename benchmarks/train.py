"""Training: ours against peers, each in a process of its own, a few steps in turn.

    python benchmarks/train.py [--cases npo released full olmo] [--steps 16] [--rounds 4]

- npo: NPO + KL + NLL with LoRA on the board's items, against a best-effort transformers + peft
  loop: micro-batches of items of like length, padded to their longest, the reference the same model
  with its adapter off.
- released: the same against the released settings: one item at a time, padded to 256 tokens, the
  reference a second model.
- full: every weight, items learnt by heart, against the transformers Trainer (grouped by length).
- olmo: the contest in one hour, by train_olmo.py; without --cases, where there is a CUDA device.

Both take the same items in the same steps from the same weights; the losses of every step must
agree, and those of a few steps in float32 closely. Tokens are those of the items, without padding.
Of ours the time to compute the reference is counted, a tenth of it for each epoch: five of each of
the recipe's two branches share it. Memory is the peak of the whole process (resident).
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from train_items import laid_down

from expunge.provenance import git_commit, machine

RESULTS = Path(__file__).parent / "results" / "train.json"
EPOCHS = 2 * 5
"""That share one reference: of two branches."""

GOALS = {"npo": 2.5, "released": 8.0, "full": 1.5}
MEMORY_GOALS = {"npo": 0.5}
"""The peer's peak memory that ours may take, at most."""

EXACT_STEPS = 2


def main() -> None:
    """Run the cases asked for, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=[*GOALS, "olmo"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--worker", nargs=2, metavar=("WHO", "SPEC"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(*options.worker)
    for name in options.cases or [*GOALS, *["olmo"] * torch.cuda.is_available()]:
        if name == "olmo":
            _olmo()
        else:
            write_case(_case(name, options))
    return None


def _olmo() -> None:
    with tempfile.TemporaryDirectory() as work:
        script = Path(__file__).with_name("train_olmo.py")
        if code := subprocess.call([sys.executable, str(script), "--work", work]):
            sys.exit(code)


def _case(name: str, options: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        exact = laid_down(name, EXACT_STEPS, Path(work) / "exact", exact=True)
        (_, one, _, _), (_, two, _, _) = _turns(exact, 1)
        apart_exact = _apart(one, two)
        spec = laid_down(name, options.steps, Path(work) / "timed", exact=False)
        ours, peer = _turns(spec, options.rounds)
    apart = _apart(ours[1], peer[1])
    assert apart_exact < 1e-3, (one, two)
    assert apart < 0.05, (ours[1], peer[1])
    speeds = [spec["tokens"] / sum(who[0]) for who in (ours, peer)]
    whole = spec["tokens"] / options.steps  # a step
    shared = ours[3] / (EPOCHS * spec["reference_tokens"]) if name != "full" else 0.0
    per_token = [1 / speeds[0] + shared, 1 / speeds[1]]
    ratio, memory_ratio = per_token[1] / per_token[0], ours[2] / peer[2]
    return {
        "case": name,
        "ours": round(1 / per_token[0], 1),
        "peer": round(1 / per_token[1], 1),
        "unit": "useful tokens/s",
        "ratio": round(ratio, 2),
        "goal": GOALS[name],
        "met": is_met(name, ratio, memory_ratio),
        "ratio_by_round": [round(b / a, 2) for a, b in zip(ours[0], peer[0], strict=True)],
        "tokens_a_step": round(whole),
        "steps": options.steps,
        "reference_seconds": round(ours[3], 2),
        "peak_mb": [round(who[2] / 1e6) for who in (ours, peer)],
        "memory_ratio": round(memory_ratio, 2),
        "memory_goal": MEMORY_GOALS.get(name),
        "equal": f"losses of {options.steps} steps within {apart:.1e} of each other in bfloat16, "
        f"of {EXACT_STEPS} in float32 within {apart_exact:.1e}",
    }


def is_met(name: str, ratio: float, memory_ratio: float) -> bool:
    """Whether ours is as fast as the goal of a case, and as small where it has one of memory."""
    return ratio >= GOALS[name] and memory_ratio <= MEMORY_GOALS.get(name, math.inf)


Turn = tuple[list[float], list[float], int, float]


def _turns(spec: dict[str, Any], rounds: int) -> tuple[Turn, Turn]:
    """Seconds by round, losses, peak memory and seconds of the reference: ours, peer."""
    path = Path(spec["folder"]) / "spec.json"
    path.write_text(json.dumps(spec))
    workers = [_Worker(who, path) for who in ("ours", "peer")]
    for worker in workers:
        worker.ready()  # one at a time: two that load would slow each other
    steps = len(spec["steps"])
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds):
        last = (turn + 1) * steps // rounds
        for number, worker in enumerate(workers):
            seconds[number].append(worker.go(last))
    ends = [worker.end() for worker in workers]
    made = [
        (took, end["losses"], end["peak"], end["reference"])
        for took, end in zip(seconds, ends, strict=True)
    ]
    return made[0], made[1]


class _Worker:
    """A process that trains up to a step, says so, and waits."""

    def __init__(self, who: str, spec: Path) -> None:
        self.who = who
        words = [sys.executable, __file__, "--worker", who, str(spec)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ready(self) -> None:
        """Wait until it has loaded and is about to take its first step."""
        self._tell("start")
        self._heard()

    def go(self, last: int) -> float:
        """Train up to a step; the seconds that took."""
        begin = time.perf_counter()
        self._tell(str(last))
        self._heard()
        return time.perf_counter() - begin

    def end(self) -> dict[str, Any]:
        """What it found."""
        found = self._heard()
        self.process.wait()
        return found

    def _tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def _heard(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):  # the Trainer prints records of its own
                return json.loads(line)
        raise SystemExit(f"{self.who} failed")


class _Pace:
    """In a worker: goes on when told, and says when it has come as far as it may."""

    def __init__(self, total: int) -> None:
        self.total, self.last = total, 0
        assert sys.stdin.readline().strip() == "start"

    def wait(self, step: int) -> None:
        """Before each step."""
        if step >= self.last:
            self.say({"step": step})
            self.last = int(sys.stdin.readline())

    def say(self, found: dict[str, Any]) -> None:
        """A line for the one who waits."""
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


def _work(who: str, path: str) -> None:
    spec = json.loads(Path(path).read_text())
    pace = _Pace(len(spec["steps"]))
    reference = 0.0
    if who == "ours":
        losses, reference = _ours(spec, pace.wait)
    else:
        from train_peers import peft_loop, trainer

        if spec["case"] == "full":
            losses = trainer(spec, pace.wait, Path(spec["folder"]) / "trainer")
        else:
            losses = peft_loop(spec, pace.wait, released=spec["case"] == "released")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pace.say({"step": len(spec["steps"])})
    pace.say({"losses": losses, "peak": peak, "reference": reference})


def _ours(spec: dict[str, Any], wait: Callable[[int], None]) -> tuple[list[float], float]:
    """Our trainer on the steps of `spec`: losses, and seconds of the reference."""
    from train_ours import full, unlearn

    return full(spec, wait) if spec["case"] == "full" else unlearn(spec, wait)


def _apart(one: list[float], two: list[float]) -> float:
    """The greatest difference of two curves, against the greatest loss of them."""
    scale = max(max(map(abs, two)), 1e-9)
    return max(abs(a - b) for a, b in zip(one, two, strict=True)) / scale


def write_case(case: dict[str, Any]) -> None:
    known = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else []
    row = {**case, "commit": git_commit(), "machine": machine()}
    cases = [*(one for one in known if one["case"] != case["case"]), row]
    result = {"machine": machine(), "commit": git_commit(), "cases": cases}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(
        f"{case['case']:10} {case['ours']:8} {case['peer']:8} {case['ratio']:6} "
        f"(goal {case['goal']})  peak MB {case['peak_mb']}  {case['equal']}\n"
    )


if __name__ == "__main__":
    main()
