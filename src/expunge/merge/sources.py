"""The models of a merge: checkpoints, adapters on them, each opened once.

Dimensions: M models.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from expunge import models
from expunge.errors import MergeError, ModelError
from expunge.merge.absent import ABSENT, Absent, is_adapter
from expunge.merge.checkpoint import Checkpoint, map_file, read_header
from expunge.merge.companions import companions_of
from expunge.merge.compat import MergeFile
from expunge.merge.operands import KINDS, Part, Update, Whole, added, decode
from expunge.merge.updates import Adapter

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
HEAD = "lm_head.weight"


@dataclass(frozen=True, eq=False)
class Source:
    """One model of a merge: a checkpoint, perhaps an adapter on it, or an adapter alone."""

    name: str
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    def find(self, name: str) -> str | None:
        """The name under which it holds a tensor: its own, or the embeddings' for a tied head."""
        if name in self.checkpoint:
            return name
        if name.endswith(HEAD) and self.checkpoint.config.get("tie_word_embeddings"):
            tied = [n for n in self.checkpoint if n.endswith("embed_tokens.weight")]
            return tied[0] if tied else None
        return None

    def part(self, name: str, base: "Source | None") -> Part:
        """A tensor of it; the update alone where it is an adapter on the base itself."""
        stored = self.checkpoint[name]
        whole = Whole(self.checkpoint.raw(name), stored.dtype, str(stored.file))
        changed = self.adapter.part(name, self.checkpoint) if self.adapter else None
        if not isinstance(changed, Update) or changed.whole:
            return changed or whole
        if base and not base.adapter and base.checkpoint.folder == self.checkpoint.folder:
            return changed
        return added(whole, changed, stored.shape[-1])

    @property
    def alone(self) -> bool:
        """Whether it is an adapter, or the base of those, of which no weights are at hand."""
        return isinstance(self.checkpoint, Absent)

    @cached_property
    def layers(self) -> int:
        """How many layers it has."""
        numbers = [int(found[1]) for n in self.checkpoint if (found := LAYER.search(n))]
        return max(numbers, default=-1) + 1

    def fingerprint(self) -> list[Any]:
        """What changes when its files do."""
        files = [*self.checkpoint.files, *companions_of(self.checkpoint.folder)]
        if self.adapter:
            files += sorted(self.adapter.folder.glob("adapter_*"))
        return marks(files)


def marks(files: Iterable[Path]) -> list[Any]:
    """What changes when files do, without reading them."""
    found = [(str(f.resolve()), f.stat()) for f in files]
    return [(path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found]


class Statistics:
    """A safetensors file of matrices by tensor name."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelError(f"there are no statistics at {path}")
        self._tensors, self._raw = read_header(path), map_file(path)

    def get(self, name: str) -> torch.Tensor | None:
        """The matrix of a tensor, in float32."""
        stored = self._tensors.get(name)
        if stored is None:
            return None
        if stored.dtype not in KINDS:
            raise ModelError(f"{stored.file}: {name} is {stored.dtype}, not a float")
        raw = self._raw[stored.offset : stored.offset + stored.nbytes]
        return torch.tensor(decode(raw, KINDS[stored.dtype])).view(stored.shape)


class Opened:
    """Models by their names, each checkpoint and adapter opened and checked once."""

    def __init__(self, find: Callable[..., Path] = models.resolve) -> None:
        self._find = find
        self._sources: dict[str, Source] = {}
        self._checkpoints: dict[Path, Checkpoint] = {}
        self._statistics: dict[str, Statistics] = {}
        self._absent = Absent()
        self._sources[ABSENT] = Source(ABSENT, self._absent)

    def source(self, given: str | dict[str, Any]) -> Source:
        """A model by its name, or by `model+lora`; `owner/name@revision` for either on the Hub."""
        model, lora = _named(given)
        key = f"{model}+{lora}" if lora else f"{model}"
        if key not in self._sources:
            here = Path(model.path).expanduser()
            if not lora and is_adapter(here):
                alone = Adapter(here)
                self._absent.take(alone)
                alone.check(self._absent)
                self._sources[key] = Source(key, self._absent, alone)
                return self._sources[key]
            folder = self._find(*model.told)
            if folder not in self._checkpoints:
                self._checkpoints[folder] = Checkpoint(folder)
            checkpoint = self._checkpoints[folder]
            loaded = Adapter(_adapter_folder(lora)) if lora else None
            if loaded:
                loaded.check(checkpoint)
            self._sources[key] = Source(key, checkpoint, loaded)
        return self._sources[key]

    def base(self, file: MergeFile) -> Source | None:
        """The base_model of a merge file; of adapters alone the one that none has at hand."""
        named = [given.model for given in file.models or ()]
        named += [given.model for one in file.slices or () for given in one.sources]
        if file.base_model is not None:
            named.append(file.base_model)
        found = [self.source(name) for name in named]
        alone = [source for source in found if source.alone]
        if alone and (len(alone) < len(found) or file.base_model or file.output != "adapter"):
            raise MergeError(
                f"{alone[0].name} is an adapter: write MODEL+{alone[0].name} to put it on a model, "
                "or give adapters alone, without base_model, and say output: adapter"
            )
        if alone:
            return self._sources[ABSENT]
        return None if file.base_model is None else self.source(file.base_model)

    def matrix(self, path: str | None, name: str) -> torch.Tensor | None:
        """The matrix of a tensor in the statistics of a model; None where it has none."""
        if path is None:
            raise MergeError("the method needs statistics of each model")
        if path not in self._statistics:
            self._statistics[path] = Statistics(Path(path).expanduser())
        return self._statistics[path].get(name)


@dataclass(frozen=True)
class Named:
    """A folder or Hub repository as a merge file names it."""

    path: str
    revision: str | None = None

    @property
    def told(self) -> tuple[str, ...]:
        """What finds it: the path, and the revision where there is one."""
        return (self.path,) if self.revision is None else (self.path, self.revision)

    def __str__(self) -> str:
        return "@".join(self.told)


def _named(given: str | dict[str, Any]) -> tuple[Named, Named | None]:
    """Model and adapter of `model`, `model+lora` or {model: …, lora: …}."""
    if isinstance(given, str):
        name, _, adapter = given.partition("+")
        return _one(name), _one(adapter) if adapter else None
    unknown = sorted(map(str, given.keys() - {"model", "lora"}))
    if unknown or not given.get("model"):
        raise MergeError(f"a model is a name or {{model: …, lora: …}}, not {given}")
    lora = given.get("lora")
    return _one(given["model"]), _one(lora) if lora else None


def _one(given: Any) -> Named:
    """`path`, `owner/name@revision` or {path: …, revision: …}."""
    if isinstance(given, str):
        path, mark, revision = given.partition("@")
        if not mark or path.count("/") != 1 or Path(given).expanduser().is_dir():
            return Named(given)
        given = {"path": path, "revision": revision}
    if isinstance(given, dict) and given.keys() <= {"path", "revision"} and given.get("path"):
        path, revision = given["path"], given.get("revision")
        if isinstance(path, str) and (revision is None or (isinstance(revision, str) and revision)):
            found = Named(path, revision)
            if revision and Path(path).expanduser().exists():
                raise MergeError(f"{path} is here and has no revision: leave out {revision}")
            return found
    raise MergeError(f"a model is a path or {{path: …, revision: …}}, not {given}")


def _adapter_folder(named: Named) -> Path:
    name = named.path
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if models.is_hub_id(name):
        return models.fetch(name, named.revision)
    raise ModelError(f"there is no adapter at {name}")
