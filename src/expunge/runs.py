"""Run folders: content-addressed stages, provenance, atomic writes, resume.

A stage is a folder `stages/NAME-KEY`, where KEY is the hash of its recipe section, of its inputs
and of the code's version. It is built in `NAME-KEY.partial` and renamed when complete, so a
folder without that ending is whole, and a killed stage finds its own checkpoints again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import expunge
from expunge import parallel, provenance
from expunge.config import Section
from expunge.disk import readable_errors
from expunge.errors import RunError
from expunge.memory import forget_peak, release_freed_memory
from expunge.progress import kept_in

PROVENANCE = "stage.json"

CARD = "README.md"
"""What is said of a model, beside its weights: written after it was sealed, so never hashed."""


class Run:
    """The folder of one recipe's results, and the store of its stages."""

    def __init__(
        self, root: Path | str, *, owner: str, store: Path | None = None, wait: bool = False
    ) -> None:
        """Open or create `root` for the recipe called `owner`; another recipe's is refused.

        Runs of one `store` share stages; without one, `root` holds its own. With `wait`, a stage
        that another process is building is waited for; without, it is a `RunError`.
        """
        self.root = Path(root)
        self.store = Path(store or root)
        self.wait = wait
        self._asked: set[str] = set()
        with readable_errors(self.root), parallel.main_first():
            self.root.mkdir(parents=True, exist_ok=True)
            (self.store / "stages").mkdir(parents=True, exist_ok=True)
            mark = self.root / "run.json"
            if mark.exists():
                found = read_mark(self.root).get("recipe")
                if found != owner:
                    raise RunError(
                        f"{self.root} belongs to the recipe '{found}', not to '{owner}'; "
                        "choose another --out"
                    )
            else:
                apart = {} if store is None else {"store": os.path.relpath(store, self.root)}
                write_json(mark, {"recipe": owner, **apart})

    def stage(
        self,
        name: str,
        section: Section,
        inputs: Mapping[str, str],
        build: Callable[[Path], Any],
        *,
        together: bool = False,
    ) -> Path:
        """The finished folder of a stage: found, or built by `build(folder)` and then sealed.

        `inputs` maps a name to the hash (or stage key) of each input. `build` writes into the
        folder it is given; what a killed build left there, it finds again. Where there are several
        ranks all of them build `together`, or the first alone while the others wait.
        """
        key = stage_key(name, section, inputs)
        done = self.store / "stages" / f"{name}-{key}"
        self._asked.add(done.name)
        if parallel.from_main(done.exists()):
            return done
        partial = done.with_name(done.name + ".partial")
        lock = done.with_name(f".{done.name}.lock")
        what = f"the stage '{name}' of {self.root}"
        with readable_errors(partial), locked(lock, what, wait=self.wait):
            if parallel.from_main(done.exists()):  # another process finished it just now
                return done
            if parallel.is_main():
                partial.mkdir(exist_ok=True)
                for leftover in list(partial.rglob(".*.tmp")):  # of a killed process
                    _remove(leftover)
            parallel.barrier()
            start = time.monotonic()
            with kept_in(partial):
                release_freed_memory()  # what the stage before left would count as this one's
                forget_peak()
                _build(build, partial, together)
            made = {"wall_seconds": round(time.monotonic() - start, 2), **provenance.provenance()}
            recipe = {"section": section.model_dump(mode="json"), "inputs": dict(inputs)}
            write_json(partial / PROVENANCE, {"stage": name, "key": key, **recipe, **made})
            if parallel.is_main():
                partial.rename(done)
                sync(done.parent)
                lock.unlink()
            parallel.barrier()
        return done

    def deadline(self, name: str, seed: int | None = None) -> float | None:
        """When the training of a stage must end, on `time.monotonic`; None where time is free."""
        return None

    def provenance(self) -> list[dict[str, Any]]:
        """What every stage that was asked for says of itself, in the order they ended."""
        found = [read_json(self.store / "stages" / name / PROVENANCE) for name in self._asked]
        return sorted(found, key=lambda stage: stage["finished"])


def read_mark(root: Path) -> dict[str, Any]:
    """What run.json says of a run folder."""
    if not (root / "run.json").is_file():
        raise RunError(f"{root} is no run folder: it holds no run.json; expunge run writes it")
    found = read_json(root / "run.json")
    if not isinstance(found, dict):
        raise RunError(f"{root / 'run.json'} must hold named fields, as expunge run writes them")
    return found


def store_of(root: Path) -> Path | None:
    """Where a run folder's stages are, if not in itself."""
    store = read_mark(root).get("store")
    return None if store is None else root / store


def _build(build: Callable[[Path], Any], folder: Path, together: bool) -> None:
    """Build on every rank, or on the first while the others wait; then all are done."""
    if together:
        build(folder)
    elif parallel.is_main():
        with parallel.alone():
            build(folder)
    parallel.barrier()


def stage_key(name: str, section: Section, inputs: Mapping[str, str]) -> str:
    """Twelve hex digits that stand for a stage's recipe, inputs and code version."""
    content = json.dumps(
        [name, section.keyed(), dict(sorted(inputs.items())), expunge.__version__],
        sort_keys=True,
    )
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def check_name(name: str) -> None:
    """Refuse the name of a model that is no name of a folder."""
    if not name or name[0] == "." or not name.isprintable() or {*name} & {*"/\\@"}:
        raise ValueError(f"'{name}' cannot be the name of a model and its folder")


def hash_file(path: Path) -> str:
    """The sha256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path) -> str:
    """One hash over the names and contents of a folder's files, provenance and card left out."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not _is_said(p)):
        digest.update(f"{path.relative_to(folder)}:{hash_file(path)}\n".encode())
    return digest.hexdigest()


def _is_said(path: Path) -> bool:
    """Whether a file only speaks of the others, or is a card that is being written."""
    return path.name in (PROVENANCE, CARD) or path.name.startswith(f".{CARD}.")


def make_folder(folder: Path) -> None:
    """Create a folder and those above it; what the file system refuses is a `RunError`."""
    with readable_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file; a missing or broken one is a `RunError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid JSON: {error}") from None


def read_json_lines(path: Path) -> list[Any]:
    """The records of a file with one a line; a broken one is a `RunError`.

    Lines end at line feeds alone: other line ends of Unicode may stand within a text.
    """
    found = []
    with path.open(encoding="utf-8") as lines:
        try:
            for line in lines:
                found.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            where = f"{path}, line {len(found) + 1}"
            raise RunError(f"{where} is not valid JSON: {error}") from None
    return found


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all; NaN is refused, for no reader could take it."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; of several ranks the first writes it."""
    if not parallel.is_main():
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; on success it is synced and takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with readable_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def locked(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which the system frees when this process ends, however it ends.

    One that another process holds is waited for, or without `wait` is a `RunError`. Of several
    ranks the first holds it for all.
    """
    if not parallel.is_main():
        yield
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RunError(f"{what} is being built by another process; wait for it") from None
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(NotADirectoryError):  # it could not be made there either
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Put a file or the entries of a folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
