"""A guard of a model and of data files, outside a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from expunge import models
from expunge.config import Section, parse_section, read_options
from expunge.data.examples import check_disjoint
from expunge.data.sources import Source, read_examples
from expunge.errors import ModelError, RecipeError
from expunge.guard.helpers import HelperSource
from expunge.guard.made import Made
from expunge.guard.make import make_guard, making_of
from expunge.guard.methods import GUARDS
from expunge.guard.section import GuardSection
from expunge.registry import lookup


class OneGuard(Section):
    """A guard by itself."""

    guard: GuardSection
    """The guard."""


def guard_of_files(
    kind: str,
    model: str,
    out: Path,
    *,
    options: Sequence[str] = (),
    forget: Path | None = None,
    retain: Path | None = None,
    adapter: Path | None = None,
    dtype: str = "float32",
    separator: str = " ",
) -> Made:
    """Write a guard of a model (id, folder or GGUF) into `out`; options are `field=value`."""
    lookup(GUARDS, kind, "guard")
    if out.is_dir() and any(out.iterdir()):
        raise RecipeError(f"{out} exists and is not empty; choose another folder")
    if dtype not in models.DTYPES:
        raise RecipeError(f"dtype {dtype!r} is none of {', '.join(models.DTYPES)}")
    fields = {"kind": kind} | read_options(options, "--option")
    section = parse_section({"guard": fields}, OneGuard, origin="guard").guard
    if "of" in section.model_fields_set:
        raise RecipeError("of belongs to a recipe; here the model is MODEL")
    given = {"forget": forget, "retain": retain}
    sets = {
        half: read_examples(Source(path=str(path))) if path is not None else []
        for half, path in given.items()
    }
    check_disjoint(sets["forget"], sets["retain"])
    base = models.resolve(model)
    helpers = {role: source_of(Path(place), base) for role, place in section.helpers.items()}
    making = making_of(
        base,
        adapter,
        dtype=cast(models.Dtype, dtype),
        separator=separator,
        helpers=helpers,
        **sets,
    )
    return make_guard(section, making, out)


def source_of(path: Path, base: Path) -> HelperSource:
    """The helper that a folder holds: an adapter on the guarded model, or a model."""
    if (path / "adapter_config.json").is_file():
        return HelperSource(base, path)
    if (path / "config.json").is_file():
        return HelperSource(path)
    raise ModelError(f"{path} holds neither an adapter nor a model; name a helper's folder")
