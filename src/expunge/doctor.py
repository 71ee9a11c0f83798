"""What this machine has, and what of a recipe fits on it."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from expunge import __version__, models
from expunge.errors import ModelError
from expunge.recipe import Recipe
from expunge.unlearn.footprint import count_parameters

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numba", "datasets")


def examine(recipe: Recipe | None = None) -> dict[str, Any]:
    """Versions, cores, memory, disk, accelerator; with a recipe, each stage's memory beside it."""
    memory = psutil.virtual_memory()
    facts: dict[str, Any] = {
        "expunge": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_bfloat16": torch.cpu._is_avx512_bf16_supported(),
        "memory_gb": round(memory.total / 1e9, 1),
        "memory_available_gb": round(memory.available / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "model_cache": str(models.cache_folder()),
    }
    if recipe is not None:
        facts |= _fits(recipe, memory.available)
    return facts


def _fits(recipe: Recipe, available: int) -> dict[str, Any]:
    """The memory that the recipe's largest stage takes, from the size of the model's files."""
    try:
        folder = models.resolve(recipe.model.path, recipe.model.revision)
    except ModelError as error:
        return {"model": str(error)}
    weights = count_parameters(folder)
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[recipe.model.dtype]
    full = recipe.tune is not None or any(
        branch.training == "full" for branch in recipe.branches.values()
    )
    # Full training holds float32 weights, gradients and two moments; LoRA the base alone, nearly.
    need = weights * (16 if full else width * 1.2)
    return {
        "model_parameters": weights,
        "needs_gb": round(need / 1e9 + 1, 1),
        "fits": need + 1e9 < available,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
