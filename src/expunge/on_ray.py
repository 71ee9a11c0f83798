"""Cells on a Ray cluster: each in a worker process, with the threads of the CPUs it is given.

Workers and driver share a file system: what a cell makes, it writes there. A worker that dies takes
nothing with it but the work since the last checkpoint: its cell is taken up again.
"""

import contextlib
import io
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from expunge import parallel
from expunge.cells import Cell, Work, Workers, check_order, side_by_side
from expunge.errors import ExpungeError, RecipeError, RunError
from expunge.progress import progress

TRIES_AGAIN = 3
"""How often a cell whose worker died is taken up again."""

_PASSED_ON = (
    *("EXPUNGE_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
    *("HF_DATASETS_OFFLINE", "HF_ENDPOINT", "TOKENIZERS_PARALLELISM"),
)
_LIBRARY_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def do_on_ray(cells: Sequence[Cell[Work]], do: Callable[[Work], object], workers: Workers) -> None:
    """Do every cell on the cluster; `do` is a function of a module, for workers import it.

    An `ExpungeError` of a cell is raised here, and the cells that are not done are cancelled.
    """
    parallel.refuse_several("--ray")
    check_order(cells)
    with _connected(workers.address) as ray:
        share = _Share(ray, cells, workers.cpus_per_cell)
        task = ray.remote(max_retries=TRIES_AGAIN, retry_exceptions=False)(_do_cell)
        setting = (os.getcwd(), _environment())  # noqa: PTH109 - a text for other machines
        refs: dict[str, Any] = {}
        for cell in cells:
            cpus, gpus = share.of(cell)
            placed = task.options(name=cell.name, num_cpus=cpus, num_gpus=gpus)
            needs = [refs[need] for need in cell.needs]
            packed = [ray.put((do, cell.work))]  # in a list, so that the worker opens it itself
            refs[cell.name] = placed.remote(packed, cpus, setting, *needs)
        _await(ray, {ref: name for name, ref in refs.items()})


class _Share:
    """What each cell asks for: a share of a node's CPUs, and a GPU that is of use to it."""

    def __init__(self, ray: Any, cells: Sequence[Cell[Work]], cpus_per_cell: int | None) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [node for node in nodes if node.get("CPU", 0) >= 1]
        if not nodes:
            raise RunError("the Ray cluster has no node with a CPU for work")
        nodes = [node for node in nodes if node.get("GPU", 0) >= 1] or nodes
        self.gpus = int(min(node.get("GPU", 0) for node in nodes))
        self.cpus = int(min(node["CPU"] for node in nodes))
        self.nodes = len(nodes)
        self.at_once = side_by_side(cells)
        self.cpus_per_cell = cpus_per_cell
        most = int(max(node["CPU"] for node in nodes))
        if cpus_per_cell is not None and cpus_per_cell > most:
            raise RunError(f"no node has {cpus_per_cell} CPUs for a cell; the largest has {most}")

    def of(self, cell: Cell[Work]) -> tuple[int, int]:
        """(CPUs, GPUs) of a cell."""
        on_a_node = -(-self.at_once[cell.name] // self.nodes)
        gpus = min(1, self.gpus) if cell.gpu else 0
        if gpus:
            on_a_node = min(on_a_node, self.gpus)
        return self.cpus_per_cell or max(1, self.cpus // on_a_node), gpus


def _await(ray: Any, names: dict[Any, str]) -> None:
    """Wait for all; the first error cancels the rest."""
    waiting = list(names)
    with progress("cells", len(waiting), "cells") as bar:
        try:
            while waiting:
                (done,), waiting = ray.wait(waiting, num_returns=1)
                said = _result(ray, done, names[done])
                print(said, end="", file=sys.stderr)
                bar(1, names[done])
        finally:
            for ref in waiting:
                ray.cancel(ref, force=True)


def _result(ray: Any, ref: Any, name: str) -> str:
    """What a cell said; its `ExpungeError`, or that its workers die, is raised."""
    dead = (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
    )
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):  # of a cell that this one needs
            cause = cause.cause
        if isinstance(cause, ExpungeError):
            raise cause from None
        raise
    except dead as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"the workers of {name} died, {TRIES_AGAIN + 1} of them: {reason}") from None


def _do_cell(
    packed: list[Any], cpus: int, setting: tuple[str, dict[str, str]], *needed: str
) -> str:
    """Runs in a worker: do the work as the driver would; what it says to the user."""
    import ray

    folder, environment = setting
    os.environ.update(environment)  # before what reads it is imported
    _use_threads(cpus)
    if not Path(folder).is_dir():
        raise RunError(
            f"the worker on {socket.gethostname()} cannot see {folder}; every node must share "
            "the file system that the command is given on"
        )
    os.chdir(folder)
    do, work = ray.get(packed[0])
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        do(work)
    print(said.getvalue(), end="", file=sys.stderr)  # for the worker's own log
    return "".join(f"{line}\n" for line in said.getvalue().splitlines() if "expunge: " in line)


def _use_threads(count: int) -> None:
    """Compute with as many threads as there are CPUs for this cell, and no more."""
    for name in _LIBRARY_THREADS:
        os.environ[name] = str(count)
    import numba
    import torch

    torch.set_num_threads(count)
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # pyright: ignore


def _environment() -> dict[str, str]:
    """What of the driver's environment decides where models and data are found; no secrets."""
    passed = {name: value for name, value in os.environ.items() if name in _PASSED_ON}
    if data := os.environ.get("EXPUNGE_DATA"):
        passed["EXPUNGE_DATA"] = str(Path(data).expanduser().absolute())
    return passed


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected; a connection that was there before stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(TRIES_AGAIN))  # else for ever
    try:
        import ray
    except ImportError:
        raise RunError("Ray is not installed: pip install 'expunge[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    _connect(ray, address)
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    found = _running() if address == "auto" else address
    if found != "local":
        _check_answers(found)
        ray.init(address=found, **quiet)
    else:
        ray.init(address="local", include_dashboard=False, **quiet)


def _running() -> str:
    """The address of the cluster that runs here, as Ray itself would find it; else `local`."""
    given = os.environ.get("RAY_ADDRESS", "auto")
    if given != "auto":
        return given
    temporary = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    noted = Path(temporary, "ray", "ray_current_cluster")
    address = noted.read_text(encoding="utf-8").strip() if noted.is_file() else ""
    return address if address and _answers(address) else "local"


def _check_answers(address: str) -> None:
    """Refuse at once what Ray would wait minutes for."""
    if not re.fullmatch(r"[^/]+:\d+", address):
        raise RecipeError(f"--ray takes auto, local or HOST:PORT, not '{address}'")
    if not _answers(address):
        raise RunError(f"no Ray cluster answers at {address}")


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError):  # nobody answers, or a port beyond 65535
        return False
    return True
