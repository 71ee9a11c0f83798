"""Merging real adapters: ours beside mergekit, method by method, in float32.

mergekit first writes each adapter into a model, as float32, and takes the difference back; we form
the update from its factors. So both are compared twice: on the adapters, and on the models that
mergekit wrote of them. Where the second agrees to rounding, the first is what that storing costs:
an entry near the bound of a trim is kept by one and dropped by the other.

    python benchmarks/adapters_peers.py BASE ADAPTER ADAPTER [--methods ties,sce] [--out FILE]
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from expunge.merge.run import merge_models
from expunge.provenance import git_commit, machine

PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "sce": {"select_topk": 0.5},
    "ram": {"epsilon": 5e-5},
    "ramplus_tl": {"epsilon": 5e-5},
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "nearswap": {"t": 1e-4},
    "arcee_fusion": {},
}
"""Methods that draw no numbers."""

ALONE = ("slerp", "nearswap", "arcee_fusion")
WEIGHTS = (0.6, 1.3)
APART = 1e-3
"""Entries count as chosen otherwise when they differ by this share of the update's mean entry."""

ROUNDING = 1e-6
"""A tensor that moves by less, beside its norm, has no adapter."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("adapters", nargs=2)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(PARAMETERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="expunge-adapters-"))
    base = _tensors(Path(options.base))
    rows = []
    for method in options.methods:
        fused = [f"{options.base}+{adapter}" for adapter in options.adapters]
        theirs = _merge(method, options.base, fused, folder / "mergekit", mergekit=True)
        ours = _merge(method, options.base, fused, folder / "ours")
        stored = _stored(folder / "cache", fused)
        again = _merge(method, options.base, stored, folder / "again")
        row = {"case": method, "parameters": PARAMETERS[method]}
        row |= {"adapters": _apart(base, ours, theirs), "models": _apart(base, again, theirs)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        result = {"machine": machine(), "commit": git_commit(), "cases": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder)


def _merge(
    method: str, base: str, models: list[str], out: Path, mergekit: bool = False
) -> dict[str, torch.Tensor]:
    given = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(models, WEIGHTS, strict=True)
    ]
    config = {
        "merge_method": method,
        "models": given[:1] if method in ALONE else given,
        **({} if method in ("linear", "karcher") else {"base_model": base}),
        "parameters": PARAMETERS[method],
        "dtype": "float32",
    }
    shutil.rmtree(out, ignore_errors=True)
    if mergekit:
        quick = MergeOptions(
            quiet=True,
            lora_merge_cache=str(out.with_name("cache")),
            lora_merge_dtype="float32",
            write_model_card=False,
        )
        run_merge(MergeConfiguration.model_validate(config), str(out), quick)
    else:
        path = out.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config))
        merge_models(path, out)
    return _tensors(out)


def _stored(cache: Path, fused: list[str]) -> list[str]:
    """The models that mergekit wrote of the adapters."""
    found = [ModelReference.parse(name).merged(cache_dir=str(cache)) for name in fused]
    return [str(reference.local_path()) for reference in found]


def _apart(
    base: dict[str, torch.Tensor], one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]
) -> dict[str, float]:
    """How far two merges are apart, by the norm of the second's update."""
    assert one.keys() == two.keys()
    apart = norm = 0.0
    chosen = count = 0
    for name, weight in base.items():
        update = two[name].double() - weight.double()
        difference = (one[name].double() - two[name].double()).abs()
        apart += float(difference.square().sum())
        norm += float(update.square().sum())
        if float(update.norm()) > ROUNDING * float(weight.double().norm()):
            chosen += int((difference > APART * update.abs().mean()).sum())
        count += weight.numel()
    return {"relative": (apart / norm) ** 0.5, "chosen_otherwise": chosen, "entries": count}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


if __name__ == "__main__":
    main()
