"""What lies beside the weights of a model: configs, tokenizer, chat templates, licence."""

import shutil
from pathlib import Path
from typing import Any

from expunge import runs

_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
_TEMPLATES = "additional_chat_templates"
_INDEX_ENDING = ".safetensors.index.json"


def copy_companions(base: Path, folder: Path, changes: dict[str, Any] | None = None) -> None:
    """Copy them from `base`; `changes` are fields of config.json that the merge has made untrue."""
    for pattern in _PATTERNS:
        for path in sorted(base.glob(pattern)):
            if path.is_file() and path.name != runs.PROVENANCE and _lasting(path.name):
                shutil.copyfile(path, folder / path.name)
    if (base / _TEMPLATES).is_dir():
        shutil.copytree(base / _TEMPLATES, folder / _TEMPLATES, dirs_exist_ok=True)
    if changes:
        config = runs.read_json(base / "config.json")
        runs.write_json(folder / "config.json", {**config, **changes})


def _lasting(name: str) -> bool:
    """Not about the shards or about another adapter."""
    return not name.endswith(_INDEX_ENDING) and not name.startswith("adapter_")
