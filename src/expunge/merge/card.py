"""The model card of a merge: what was merged, how, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from expunge import models
from expunge.merge.compat import MergeFile


def merge_card(file: MergeFile, name: str) -> str:
    """README.md of the folder `name` that a merge file was merged to, as the Hub reads it.

    Its front matter names the models that are Hub ids; folders of the maker's disk are not told
    there.
    """
    fields = file.model_dump(mode="json", exclude_defaults=True)
    named = list(dict.fromkeys(_models(fields)))
    hub = [one for one in named if models.is_hub_id(one)]
    adapter = file.output == "adapter"
    front: dict[str, Any] = {}
    if hub:
        front = {"base_model": hub, "base_model_relation": "adapter" if adapter else "merge"}
    front |= {"library_name": "peft" if adapter else "transformers", "tags": ["merge", "expunge"]}
    what = "LoRA adapters, merged into one" if adapter else "A merge"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        f"# {name}",
        "",
        f"{what} by `{file.name}`, made with expunge from:",
        "",
        *(f"- {one}" for one in named),
        "",
        "Nothing was measured of it. The file that was merged (`expunge merge FILE OUT`):",
        "",
        "```yaml",
        yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _models(fields: dict[str, Any]) -> Iterable[str]:
    """Every model and adapter that a merge file names, without revisions."""
    given = [one["model"] for one in fields.get("models") or ()]
    given += [one["model"] for part in fields.get("slices") or () for one in part["sources"]]
    given += [fields["base_model"]] if fields.get("base_model") else []
    for one in given:
        parts = [one.get("model"), one.get("lora")] if isinstance(one, dict) else one.split("+")
        for part in parts:
            path = part.get("path") if isinstance(part, dict) else part
            if path:
                yield path.partition("@")[0] if path.count("/") == 1 else path
