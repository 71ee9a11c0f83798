"""The settings of a recipe that this machine is best run with, and the recipe that has them.

Only what leaves the result as it is, up to rounding: tokens forwarded at once (with dropout they
draw other masks), checkpoints of activations, and the type of the products.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from expunge import runs
from expunge.plan.rates import Rates
from expunge.recipe import Recipe
from expunge.unlearn.fit import changes_of, fits, fitting, room_bytes
from expunge.unlearn.footprint import Demand, Shape, memory_of


@dataclass(frozen=True)
class Settings:
    """What a training stage should be changed to; nothing where the recipe's settings fit and no
    others are predicted to be clearly faster."""

    stage: str
    fits: bool
    """Whether the recipe's own settings fit."""
    needs_bytes: int
    room_bytes: int
    change: dict[str, Any] | None
    """Fields of its optimizer, with better values; None where no setting fits."""
    change_needs_bytes: int | None
    float32_needs_bytes: int | None = None
    """Where the base is held in a narrow type that this machine emulates, and float32 fits."""
    dropout: bool = False
    """Whether other packs draw other masks."""

    @property
    def sentence(self) -> str:
        """One line for the terminal."""
        needs, room = f"{self.needs_bytes / 1e9:.1f}", f"{self.room_bytes / 1e9:.1f}"
        said = f"{self.stage}: {'fits' if self.fits else 'does not fit'} ({needs} of {room} GB)"
        if self.change is None:
            return f"{said}; no setting of its optimizer fits"
        if self.change:
            fields = ", ".join(f"optimizer.{k}: {str(v).lower()}" for k, v in self.change.items())
            said += f"; {fields} needs {(self.change_needs_bytes or 0) / 1e9:.1f} GB"
            if self.dropout and "max_tokens" in self.change:
                said += " and draws other dropout masks"
        else:
            said += " as it is"
        if self.float32_needs_bytes is not None:
            said += (
                "; this machine emulates narrow products: model.dtype: float32 is faster and needs "
                f"{self.float32_needs_bytes / 1e9:.1f} GB"
            )
        return said


def settings_of(demands: dict[str, Demand], rates: Rates) -> list[Settings]:
    """The settings of every training stage that this machine is best run with."""
    room, found = room_bytes(), []
    for stage, demand in demands.items():
        scale = rates.scale.get(stage, 1.0)
        need = memory_of(rates.shape, demand, scale=scale)
        typed = demand.at(compute=product_type()) if demand.weights == "float32" else demand
        better = fitting(rates.shape, typed, room, scale=scale)
        change = None if better is None else changes_of(demand.optimizer, better.optimizer)
        needs = None if better is None else memory_of(rates.shape, better, scale=scale)
        wide = None if better is None else _wide_bytes(rates.shape, better, room, scale)
        given = stage, fits(need, room), need, room, change, needs, wide, demand.dropout
        found.append(Settings(*given))
    return found


def _wide_bytes(shape: Shape, demand: Demand, room: int, scale: float) -> int | None:
    """What a stage needs with its base in float32, where that fits and is faster: where the machine
    has no products of the type that it is held in."""
    if demand.weights == "float32" or demand.quantized or product_type() != "float32":
        return None
    wide = replace(demand, weights="float32").at(compute="float32")
    needs = memory_of(shape, wide, scale=scale)
    return needs if fits(needs, room) else None


def product_type() -> str:
    """The type of products that this machine multiplies fastest without losing the range."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    narrow = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if narrow else "float32"


def machine() -> dict[str, Any]:
    """What this machine has for a run."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "others": _others(),
        "memory_bytes": psutil.virtual_memory().total,
        "room_bytes": room_bytes(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compute": product_type(),
    }


def _others() -> float:
    """Cores in use over a moment in which this process sleeps."""
    return round(psutil.cpu_percent(interval=0.3) / 100 * (psutil.cpu_count() or 1), 2)


def with_settings(recipe: Recipe, settings: list[Settings]) -> Recipe:
    """The recipe with the settings picked for its stages."""
    changes = {one.stage: one.change for one in settings if one.change}
    fields: dict[str, Any] = {}
    if recipe.tune is not None and "target" in changes:
        made = recipe.tune.optimizer.model_copy(update=changes["target"])
        fields["tune"] = recipe.tune.model_copy(update={"optimizer": made})
    branches = dict(recipe.branches)
    for name, branch in recipe.branches.items():
        if name in changes:
            made = branch.optimizer.model_copy(update=changes[name])
            branches[name] = branch.model_copy(update={"optimizer": made})
    return recipe.model_copy(update={**fields, "branches": branches})


def write_recipe(recipe: Recipe, settings: list[Settings], path: Path) -> None:
    """Write the recipe with the picked settings as YAML."""
    fields = with_settings(recipe, settings).model_dump(mode="json", exclude_unset=True)
    fields = {"name": recipe.name, **fields}
    runs.write_text(path, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
