"""What lies beside the weights of a model: configs, tokenizer, chat templates, licence."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from expunge import adapter_files, runs

_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
_TEMPLATES = "additional_chat_templates"
_INDEX_ENDING = ".safetensors.index.json"


_TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "*.jinja"),
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_companions(
    base: Path,
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    tokenizer: bool = True,
) -> None:
    """Copy them from `base`, those of the `tokenizer` only if asked for; `changes` are fields of
    config.json that the merge has made untrue."""
    for path in companions_of(base):
        wanted = tokenizer or not any(fnmatch(path.name, pattern) for pattern in _TOKENIZER)
        if wanted and path.name != runs.PROVENANCE and _lasting(path.name):
            to = folder / path.relative_to(base)
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, to)
    if changes:
        config = runs.read_json(base / "config.json")
        runs.write_json(folder / "config.json", {**config, **changes})


def take_ids(folder: Path, chosen: Path) -> None:
    """Let the configs in `folder` begin, end and pad texts as those of the model do whose tokenizer
    it has."""
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            theirs = runs.read_json(chosen / (name if (chosen / name).is_file() else "config.json"))
            own = {k: v for k, v in runs.read_json(folder / name).items() if k not in _IDS}
            ids = {field: theirs[field] for field in _IDS if field in theirs}
            runs.write_json(folder / name, {**own, **ids})


def companions_of(folder: Path) -> list[Path]:
    """The files beside the weights; a link out of the folder is refused."""
    found = [path for pattern in _PATTERNS for path in sorted(folder.glob(pattern))]
    if (folder / _TEMPLATES).is_dir():
        adapter_files.check_link(folder, _TEMPLATES)
        found += sorted((folder / _TEMPLATES).glob("*.jinja"))
    files = [path for path in found if path.is_file()]
    for path in files:
        adapter_files.check_link(folder, str(path.relative_to(folder)))
    return files


def _lasting(name: str) -> bool:
    """Not about the shards or about another adapter."""
    return not name.endswith(_INDEX_ENDING) and not name.startswith("adapter_")
