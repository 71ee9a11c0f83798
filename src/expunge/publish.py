"""Put an unlearned model and its card on the Hugging Face Hub: its weights, and no local path."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from expunge import runs
from expunge.adapter_files import CONFIG
from expunge.cards import card_of, check_has_card, hub_id
from expunge.errors import RunError
from expunge.finished import Finished
from expunge.pipeline import Pipeline
from expunge.recipe import kept_recipe

BASE = "base_model_name_or_path"
_LOCAL = ("_name_or_path", "name_or_path")
"""Fields of a model's JSON files that may hold a place on the maker's disk."""


@dataclass(frozen=True)
class Place:
    """Where on the Hub a model goes."""

    repo: str
    private: bool = False
    revision: str | None = None
    """A branch of the repository, made where it is not there; None is its main one."""


def opened(root: Path) -> Pipeline:
    """The stages of a run folder that is only read."""
    return Pipeline(kept_recipe(root), root, Finished(root))


def card(root: Path, name: str, *, seed: int | None = None) -> tuple[str, Path]:
    """The card of a model of a run, with its scores where it has any, and where it belongs."""
    run = opened(root)
    check_has_card(run.recipe, name)
    chosen = _seed(run, seed)
    return run.card(name, chosen), run.weights(name, chosen).folder / runs.CARD


def push(
    root: Path,
    name: str,
    place: Place,
    *,
    seed: int | None = None,
    base: str | None = None,
    anyway: bool = False,
) -> dict[str, str]:
    """Upload a model of a run with its card; returns where it is.

    Refused without a token, and without `anyway` for a model that collapsed or that nothing was
    measured of. An adapter names its `base` on the Hub: the model that the recipe starts from, or
    where the reader finds the tuned target.
    """
    run = opened(root)
    check_has_card(run.recipe, name)
    for repo in (place.repo, *([base] if base else [])):
        _check_repo(repo)
    token = get_token()
    if not token:
        raise RunError("there is no token for the Hub: set HF_TOKEN, or run hf auth login")
    chosen = _seed(run, seed)
    weights, scores = run.weights(name, chosen), run.scored(name, chosen)
    if not anyway:
        _refuse_bad(name, scores)
    facts = run.facts(name, weights, chosen)
    if weights.adapter is not None:
        base = base or _base_on_hub(run, name)
        facts = replace(facts, base=base)
    text = card_of(facts, scores, run.scored("target", chosen), repository=place.repo)
    files = [CommitOperationAdd(runs.CARD, text.encode()), *_files(weights.folder, base)]
    said = runs.read_json(weights.folder.parent / runs.PROVENANCE)
    message = (
        f"{run.recipe.name} {name}, seed {chosen}: expunge {said['expunge']}, "
        f"commit {said['commit']}"
    )
    return {"model": name, "url": _upload(place, files, message, token)}


def _seed(run: Pipeline, seed: int | None) -> int:
    seeds = run.recipe.seeds
    if seed is not None and seed not in seeds:
        raise RunError(f"this run has no seed {seed}. Known: {', '.join(map(str, seeds))}")
    return seeds[0] if seed is None else seed


def _refuse_bad(name: str, scores: dict[str, Any]) -> None:
    if not scores:
        raise RunError(
            f"'{name}' has not been evaluated, so nobody knows what it forgot; expunge evaluate "
            "RECIPE measures it, --anyway uploads it as it is"
        )
    if scores["collapse"]["collapsed"]:
        why = "; ".join(scores["collapse"]["reasons"])
        raise RunError(f"'{name}' has collapsed ({why}); --anyway uploads it all the same")


def _base_on_hub(run: Pipeline, name: str) -> str:
    """The Hub id of an adapter's base; a base that only this run has is an error."""
    found = hub_id(run.recipe.model.path)
    branch = run.recipe.branches.get(name)
    if found is None or run.recipe.tune is not None or (branch and branch.blocks):
        raise RunError(
            f"'{name}' is an adapter on a model that lies only here; upload that too, and name it: "
            "--base OWNER/NAME"
        )
    return found


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RunError(f"'{repo}' is no repository of the Hub: {error}") from None


def _files(folder: Path, base: str | None) -> Iterator[CommitOperationAdd]:
    """The files of a model folder; what its JSON says of local places is replaced or left out."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name in (runs.CARD, runs.PROVENANCE) or path.name.startswith("."):
            continue
        if path.name in (CONFIG, "config.json", "tokenizer_config.json"):
            fields = {k: v for k, v in runs.read_json(path).items() if k not in _LOCAL}
            if path.name == CONFIG:
                fields[BASE] = base
            yield CommitOperationAdd(name, json.dumps(fields, indent=1).encode())
        else:
            yield CommitOperationAdd(name, path)


def _upload(place: Place, files: list[CommitOperationAdd], message: str, token: str) -> str:
    api = HfApi(token=token)
    try:
        api.create_repo(place.repo, private=place.private or None, exist_ok=True)
        if place.revision:
            api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        done = api.create_commit(place.repo, files, commit_message=message, revision=place.revision)
    except (HTTPError, OfflineModeIsEnabled, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"cannot upload to {place.repo}: {reason}") from None
    return str(done.repo_url)
