"""The contest in one hour: two branches, merge and official evaluation of a 7 B model on one GPU.

    python benchmarks/train_olmo.py --work DIR [--shape 7b|tiny] [--model NAME] [--items N]

The weights are random, in the shape of OLMo-7B, made here; the tokenizer is that of --model. The
recipe is recipes/zjuklab.yaml on the full LUME training split (--items: only so many documents of
each task, to try the script). There is no peer on the machine: the contest allowed an hour on eight
A100, and the goal is fifteen minutes on one H100 or H200. Random weights never end their answers,
so generation takes its longest. Writes the case `olmo` of results/train.json.

Model-FLOP utilisation counts 4 N a token of LoRA training (2 N forward, 2 N back to the inputs; the
frozen weights' own gradients are not needed) and 2 N a token of the reference, against the device's
dense bfloat16 peak.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from train import write_case

from expunge import models, provenance
from expunge.data.batches import encode
from expunge.pipeline import Pipeline
from expunge.recipe import load_recipe
from expunge.runner import run_pipelines

ROOT = Path(__file__).parents[1]
GOAL_SECONDS = 900
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 4},
}


def main() -> None:
    """Make the model, run the recipe, say where the time went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--items", type=int)
    options = parser.parse_args()
    if options.shape == "7b" and not torch.cuda.is_available():
        sys.exit("the shape 7b needs a CUDA device; --shape tiny tries the script")
    folder = options.work / "model"
    if not folder.exists():
        _random_model(folder, SHAPES[options.shape], models.resolve(options.model))
    recipe = _recipe(folder, options)
    begin = time.perf_counter()
    pipeline = Pipeline(recipe, options.work / "run")
    run_pipelines([pipeline])
    seconds = time.perf_counter() - begin
    case = _case(pipeline, folder, seconds, options)
    sys.stdout.write(json.dumps(case, indent=1) + "\n")
    if options.shape == "7b" and options.items is None:
        write_case(case)


def _recipe(folder: Path, options: Any) -> Any:
    recipe = load_recipe(ROOT / "recipes" / "zjuklab.yaml")
    fields = recipe.model_dump(mode="json")
    fields["model"]["path"] = str(folder)
    fields["unscored"] = ["target", "strong", "weak"]
    if options.items is not None:
        documents = dict.fromkeys(("Task1", "Task2", "Task3"), options.items)
        fields["data"]["forget"] |= {"documents": documents, "first": "data:lume/members.jsonl"}
        fields["data"]["retain"] |= {"documents": documents}
        fields["evaluate"]["max_new_tokens"] = 16
        fields["evaluate"]["mmlu"] = None
    return load_recipe(fields)


def _random_model(folder: Path, shape: dict[str, int], tokenizer: Path) -> None:
    from transformers import OlmoConfig, OlmoForCausalLM

    made: Any = models.load_tokenizer(tokenizer)
    config = OlmoConfig(
        vocab_size=max(50304, len(made)) if shape["hidden_size"] > 1000 else len(made),
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=4096,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id or made.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(models.device()):
        model = OlmoForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    models.save_model(model, made, folder)  # pyright: ignore[reportArgumentType]


def _case(pipeline: Pipeline, folder: Path, seconds: float, options: Any) -> dict[str, Any]:
    stages = {found["stage"]: found["wall_seconds"] for found in pipeline.folder.provenance()}
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2
    tokenizer = models.load_tokenizer(folder)
    how = pipeline.recipe.model.model_dump(include={"max_length", "prompt_tail", "separator"})
    sets = pipeline.sets
    tokens = {
        half: sum(len(encode(e, tokenizer, **how).tokens) for e in examples)
        for half, examples in (("forget", sets.forget), ("retain", sets.retain))
    }
    trained = 0.0
    for branch in pipeline.recipe.branches.values():  # each forget item beside one retain item
        share = len(sets.forget) / len(sets.retain)
        trained += branch.schedule.epochs * (tokens["forget"] + share * tokens["retain"])
    training = sum(stages[name] for name in pipeline.recipe.branches)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    flops = 4 * weights * trained + 2 * weights * sum(tokens.values())
    return {
        "case": "olmo",
        "ours": round(seconds, 1),
        "peer": None,
        "unit": "seconds",
        "ratio": round(GOAL_SECONDS / seconds, 2),
        "goal": GOAL_SECONDS,
        "met": seconds <= GOAL_SECONDS,
        "stages": stages,
        "tokens_trained": round(trained),
        "tokens_per_second": round(trained / training, 1),
        "parameters": int(weights),
        "model_flop_utilisation": None if peak is None else round(flops / training / peak, 3),
        "peak_mb": [round(torch.cuda.max_memory_allocated() / 1e6)],
        "device": device,
        "seed": pipeline.recipe.seeds[0],
        "equal": "no peer in the run: the loss curve's equality is shown by the cases npo and full",
        "commit": provenance.git_commit(),
    }


if __name__ == "__main__":
    main()
