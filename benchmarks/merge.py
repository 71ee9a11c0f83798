"""Merging: ours against mergekit, interleaved, with private memory; and against copying the bytes.

Writes random models shaped like OLMo-1B (1.28 B parameters, bf16): a base and two that look tuned
from it, and two LoRAs on a 191 M model. Each merge runs in a process of its own, timed without its
imports; private memory is the peak of its anonymous pages. Both read the same YAML, and find the
inputs in the page cache, as far as it holds them. Sameness is shown in the same run, on two layers
of the same shapes in float32, and the outputs are compared: differences of bf16 numbers are often
equal, and which of equals stays is each tool's choice. Methods that draw numbers are compared by
their norms.

    python benchmarks/merge.py [--layers 16] [--cases ties,linear] [--rounds 3] [--folder DIR]
    python benchmarks/merge.py --same [--cases ties]      # sameness alone, kept with the times
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from merge_inputs import LAYERS, loras, tuned_models

DRAWN = ("dare_ties", "dare_linear", "della", "della_linear")
CASES = {
    "ties": ({"density": 0.8}, 30.0, 2.0),
    "dare_ties": ({"density": 0.8}, 15.0, None),
    "della": ({"density": 0.8, "epsilon": 0.1}, 15.0, None),
    "breadcrumbs": ({"density": 0.8, "gamma": 0.01}, 15.0, None),
    "sce": ({"select_topk": 0.5}, 15.0, None),
    "linear": ({}, 2.0, 1.5),
    "slerp": ({"t": 0.4}, 2.0, 1.5),
    "task_arithmetic": ({}, 2.0, 1.5),
    "lora_ties": ({"density": 0.8}, 20.0, None),
}
"""Parameters; how many times faster than mergekit, and at most how many times the copy."""

MEMORY_GOAL = 5.0
RESULTS = Path(__file__).parent / "results" / "merge.json"


def main() -> None:
    options = _options()
    if options.worker:
        _work(options.worker, Path(options.config), Path(options.out))
        return
    folder = Path(options.folder or tempfile.mkdtemp(prefix="expunge-merge-"))
    small = tuned_models(folder / "exact", 2, "F32")
    exact = loras(folder / "lora-exact", 2, "float32") if "lora_ties" in options.cases else []
    if options.same:
        _write(
            [{"case": name, "equal": _same(name, small, exact, folder)} for name in options.cases],
            options,
        )
        return
    models = tuned_models(folder / "full", options.layers)
    pair = loras(folder / "lora") if "lora_ties" in options.cases else []
    _warm(small, folder)
    for name in options.cases:  # each is kept as soon as it is measured
        case = _case(name, pair if name == "lora_ties" else models, folder, options.rounds)
        _write([{**case, "equal": _same(name, small, exact, folder)}], options)
    if options.folder is None:
        shutil.rmtree(folder)


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder")
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--worker", choices=["ours", "mergekit"])
    parser.add_argument("config", nargs="?")
    parser.add_argument("out", nargs="?")
    return parser.parse_args()


def _case(name: str, models: list[str], folder: Path, rounds: int) -> dict[str, Any]:
    """One method: the peer once, ours and the copy `rounds` times around it."""
    method = name.removeprefix("lora_")
    parameters, goal, copy_goal = CASES[name]
    config = _config(method, models, parameters, {"dtype": "bfloat16"})
    seconds: dict[str, list[float]] = {"ours": [], "peer": [], "copy": []}
    memory: dict[str, list[int]] = {"ours": [], "peer": []}
    for turn in range(rounds):
        for who in ("ours", "mergekit") if turn == 0 else ("ours",):
            out = folder / f"out-{who}"
            shutil.rmtree(out, ignore_errors=True)
            _cat(models)  # so that neither reads from the disk what the other finds in memory
            took, private = _run(who, config, out, folder)
            mine = "ours" if who == "ours" else "peer"
            seconds[mine].append(took)
            memory[mine].append(private)
        seconds["copy"].append(_copy(models, folder / "out-ours", folder / "copied"))
    median = {who: statistics.median(values) for who, values in seconds.items()}
    ratio, floor = median["peer"] / median["ours"], median["ours"] / median["copy"]
    saved = max(memory["peer"]) / max(memory["ours"])
    return {
        "case": name,
        "parameters": parameters,
        "ours": round(median["ours"], 2),
        "peer": round(median["peer"], 2),
        "unit": "seconds",
        "ratio": round(ratio, 1),
        "goal": goal,
        "met": ratio >= goal and (copy_goal is None or floor <= copy_goal),
        "copy_seconds": round(median["copy"], 2),
        "times_the_copy": round(floor, 2),
        "copy_goal": copy_goal,
        "private_mb": {"ours": max(memory["ours"]) >> 20, "peer": max(memory["peer"]) >> 20},
        "memory_ratio": round(saved, 1),
        "memory_goal_met": saved >= MEMORY_GOAL,
        "all_seconds": {who: [round(v, 2) for v in values] for who, values in seconds.items()},
    }


def _config(
    method: str, models: list[str], parameters: dict[str, Any], types: dict[str, str]
) -> dict[str, Any]:
    base, *tuned = models
    if method == "slerp":
        tuned = tuned[:1]
    given = [{"model": model, "parameters": {"weight": 0.7}} for model in tuned]
    bases = {} if method == "linear" else {"base_model": base}
    return {"merge_method": method, "models": given, **bases, "parameters": parameters, **types}


def _run(who: str, config: dict[str, Any], out: Path, folder: Path) -> tuple[float, int]:
    """Seconds and peak private bytes of one merge in a process of its own."""
    path = folder / f"{who}.yaml"
    path.write_text(yaml.safe_dump(config))
    words = [sys.executable, __file__, "--worker", who, str(path), str(out)]
    os.sync()  # so that nobody waits for what the one before left to be written
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    peak = [0]
    watch = threading.Thread(target=_watch, args=(process, peak))
    watch.start()
    said, _ = process.communicate()
    watch.join()
    if process.returncode:
        raise SystemExit(f"{who} failed on {config['merge_method']}")
    return json.loads(said.splitlines()[-1])["seconds"], peak[0]


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        anonymous = [line for line in lines if line.startswith("RssAnon")]
        if anonymous:
            peak[0] = max(peak[0], int(anonymous[0].split()[1]) * 1024)
        time.sleep(0.02)


def _work(who: str, config: Path, out: Path) -> None:
    """One merge, timed without its imports."""
    if who == "ours":
        from expunge.merge.run import merge_models

        begin = time.perf_counter()
        merge_models(config, out)
    else:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        parsed = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
        cache = out.with_name("lora-cache")
        shutil.rmtree(cache, ignore_errors=True)
        begin = time.perf_counter()
        quick = MergeOptions(quiet=True, lora_merge_cache=str(cache), write_model_card=False)
        run_merge(parsed, str(out), quick)
    print(json.dumps({"seconds": time.perf_counter() - begin}))


def _copy(models: list[str], merged: Path, to: Path) -> float:
    """Seconds to read every input with cat and to copy the output with cp."""
    outputs = [str(path) for path in merged.glob("*.safetensors")]
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    begin = time.perf_counter()
    _cat(models)
    subprocess.run(["cp", "--reflink=never", *outputs, str(to)], check=True)
    return time.perf_counter() - begin


def _cat(models: list[str]) -> None:
    """Read every input once."""
    inputs = [str(p) for m in models for p in Path(m.split("+")[-1]).glob("*.safetensors")]
    subprocess.run(["cat", *inputs], stdout=subprocess.DEVNULL, check=True)


def _same(name: str, small: list[str], pair: list[str], folder: Path) -> str:
    models = pair if name == "lora_ties" else small
    return _sameness(name.removeprefix("lora_"), models, CASES[name][0], folder)


def _sameness(method: str, models: list[str], parameters: dict[str, Any], folder: Path) -> str:
    """Both merge and store in float32; how the outputs compare."""
    config = _config(method, models, parameters, {"dtype": "float32"})
    outputs = []
    for who in ("ours", "mergekit"):
        out = folder / f"same-{who}"
        shutil.rmtree(out, ignore_errors=True)
        _run(who, config, out, folder)
        outputs.append(_tensors(out))
    base = _tensors(Path(models[0]))
    one, two = outputs
    assert one.keys() == two.keys()
    norms = [
        sum(float((out[n] - base[n].float()).square().sum()) for n in base) ** 0.5
        for out in outputs
    ]
    if method in DRAWN:
        return f"norms of the merged deltas {norms[0]:.4f} and {norms[1]:.4f} (other draws)"
    apart = sum(float((one[n] - two[n]).square().sum()) for n in one) ** 0.5
    count = sum(tensor.numel() for tensor in one.values())
    return f"|ours - theirs| / |merged delta| = {apart / norms[1]:.2e} over {count} float32 weights"


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _warm(small: list[str], folder: Path) -> None:
    """Compile the kernels, once a machine."""
    for method in ("ties", "linear", "della", "sce", "slerp"):
        out = folder / "warm"
        shutil.rmtree(out, ignore_errors=True)
        _run("ours", _config(method, small, CASES[method][0], {"dtype": "bfloat16"}), out, folder)


def _write(cases: list[dict[str, Any]], options: Any) -> None:
    from expunge.provenance import git_commit, machine

    command = f"python benchmarks/merge.py --layers {options.layers} --rounds {options.rounds}"
    commit = git_commit()
    measured = {}
    if RESULTS.is_file():  # cases that were not asked for keep what was measured of them
        before = json.loads(RESULTS.read_text())
        kept = {name: before[name] for name in ("commit", "machine", "command")}
        measured = {case["case"]: {**kept, **case} for case in before["cases"]}
    for case in cases:
        times = {} if options.same else {"commit": commit, "machine": machine(), "command": command}
        measured[case["case"]] = {**measured.get(case["case"], {}), **case, **times}
    cases = [measured[name] for name in CASES if name in measured]
    result = {"machine": machine(), "commit": commit, "command": command, "cases": cases}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'case':16} {'ours s':>8} {'peer s':>8} {'ratio':>7} {'x copy':>7} {'MB':>12}  met")
    for case in cases:
        megabytes = f"{case['private_mb']['ours']}/{case['private_mb']['peer']}"
        print(
            f"{case['case']:16} {case['ours']:8.2f} {case['peer']:8.2f} {case['ratio']:7.1f} "
            f"{case['times_the_copy']:7.2f} {megabytes:>12}  {'yes' if case['met'] else 'no'}"
        )


if __name__ == "__main__":
    main()
