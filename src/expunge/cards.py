"""What a run knows of its models, for their cards: read from the recipe and the finished stages."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from expunge import models, runs
from expunge.config import Section, parse_section
from expunge.data.examples import Document, Example
from expunge.data.sets import Data, Sets
from expunge.data.sources import Source
from expunge.edit.task import Weights
from expunge.errors import RunError
from expunge.recipe import Recipe
from expunge.registry import lookup
from expunge.report.card import Facts, SetFacts, model_card
from expunge.report.results import ModelResults

_MAY_LEAK = ("by", "patterns", "file")
"""Fields of a section that may hold words or ids of the forgotten items."""


def has_card(recipe: Recipe, name: str) -> bool:
    """Whether a model of the results has a card: branches, merges, chosen or not, and edits do."""
    made = (recipe.branches, recipe.merges, recipe.calibrate, recipe.edits)
    return any(name in some for some in made)


def check_has_card(recipe: Recipe, name: str) -> None:
    """Refuse a name that is no model, and one whose weights this run did not unlearn."""
    lookup(dict.fromkeys(recipe.models), name, "model of this run")
    if not has_card(recipe, name):
        what = "is a guard, which changes no weights" if name in recipe.guards else "knows it all"
        known = ", ".join(n for n in recipe.models if has_card(recipe, n))
        raise RunError(f"'{name}' {what}; a card is of a branch, a merge or an edit: {known}")


def write_card(facts: Facts, weights: Weights, entry: Any, before: Any = None) -> None:
    """Write the card of a model beside its weights, whole or not at all."""
    runs.write_text(weights.folder / runs.CARD, card_of(facts, entry, before))


def card_of(facts: Facts, entry: Any, before: Any = None, **given: str) -> str:
    """The card of a model; `entry` and `before` are as in results.json, or hold nothing."""
    read = [e and parse_section(e, ModelResults, origin="scores") for e in (entry, before)]
    return model_card(facts, read[0] or None, read[1] or None, **given)


def facts_of(
    recipe: Recipe, name: str, weights: Weights, sets: Sets, hashes: Mapping[str, str], seed: int
) -> Facts:
    """All that a card says of a model before its scores."""
    maker = recipe.maker(name)
    assert maker is not None
    merges = {*recipe.merges, *recipe.calibrate}
    kinds = {"branch": recipe.branches, "merge": merges, "edit": recipe.edits}
    kind = next(kind for kind, made in kinds.items() if name in made)
    base_id = hub_id(recipe.model.path)
    given = base_card(recipe)
    return Facts(
        name=name,
        recipe=recipe.name,
        seed=seed,
        kind=kind,  # pyright: ignore[reportArgumentType]
        made_from=recipe.made_from(name),
        adapter=weights.adapter is not None,
        start=base_id or _called(recipe.model.path),
        base=_place(weights, base_id),
        base_id=base_id,
        tuned=recipe.tune is not None,
        sets=tuple(_set_facts(recipe.data, sets, hashes)),
        section=section_text(maker),
        provenance=_provenance(weights, recipe, seed),
        datasets=tuple(dict.fromkeys(_hub_sets(recipe.data))),
        license=given.get("license"),
        language=given.get("language", ()),
    )


def hub_id(path: str) -> str | None:
    """The Hub id that a recipe's model path is; None of a folder, a file or the embedded model."""
    return path if models.is_hub_id(path) else None


def base_card(recipe: Recipe) -> dict[str, Any]:
    """The license and languages that the card of the model at the start names."""
    file = models.resolve(recipe.model.path, recipe.model.revision) / runs.CARD
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        said = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):  # a card that cannot be read names nothing
        return {}
    license, language = said.get("license"), said.get("language")
    spoken = [language] if isinstance(language, str) else language or []
    return {
        "license": license if isinstance(license, str) else None,
        "language": tuple(word for word in spoken if isinstance(word, str)),
    }


def section_text(section: Section) -> str:
    """A section as YAML, as it was given, without what may name the forgotten items."""
    fields = section.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(_discreet(fields), sort_keys=False)


def _discreet(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "(left out)" if k in _MAY_LEAK else _discreet(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_discreet(v) for v in value]
    return "(a local path)" if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    """Whether a text names a place on a disk; a Hub id does not."""
    return text.startswith((".", "~")) or "\\" in text or ("/" in text and hub_id(text) is None)


def _called(path: str) -> str:
    """What a local model is called: no card says where on a disk it lay."""
    return path if path == models.EMBEDDED else f"a local model ({Path(path).name})"


def _place(weights: Weights, base_id: str | None) -> str:
    """Where the base of an adapter is to be found: in the run folder, else where it came from."""
    base = weights.base
    stages = next((p for p in base.parents if p.name == "stages"), None)
    if stages is not None:
        return base.relative_to(stages.parent).as_posix()
    return base_id or base.name


def _set_facts(data: Data, sets: Sets, hashes: Mapping[str, str]) -> Iterator[SetFacts]:
    for name in ("forget", "retain", "members", "nonmembers"):
        items: Sequence[Example | Document] = getattr(sets, name)
        if items:
            ids = [one.document if isinstance(one, Example) else one.id for one in items]
            origin = _origin(data, getattr(data, name), hashes.get(name))
            yield SetFacts(name, len(items), len(set(ids)), origin)


def _origin(data: Data, source: Source | None, digest: str | None) -> str:
    if data.synthetic is not None:
        return f"invented, seed {data.synthetic.seed}"
    assert source is not None
    if source.path.startswith("hub:"):
        parts = (source.path.removeprefix("hub:"), source.subset, source.split, source.revision)
        return " ".join(part for part in parts if part)
    return f"a file of its maker ({(digest or '')[:12]})"


def _hub_sets(data: Data) -> Iterator[str]:
    for source in (data.forget, data.retain):
        if source is not None and source.path.startswith("hub:"):
            yield source.path.removeprefix("hub:")


def _provenance(weights: Weights, recipe: Recipe, seed: int) -> dict[str, str]:
    """What made the model, and with which seeds; no path and no machine's name."""
    said = runs.read_json(weights.folder.parent / runs.PROVENANCE)
    kept = ("stage", "key", "expunge", "commit", "torch", "transformers", "ranks", "accelerator")
    found = {name: str(said[name]) for name in (*kept, "finished") if said.get(name) is not None}
    seeds = {"seed": str(seed)}
    if recipe.tune is not None:
        seeds["seed of the tuning"] = str(recipe.tune.seed)
    return {**seeds, **found}
