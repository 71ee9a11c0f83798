"""Cells: pieces of work that wait only for those they name, done one by one or side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Work = TypeVar("Work")


@dataclass(frozen=True)
class Cell(Generic[Work]):
    """One piece of work of a graph."""

    name: str
    """Unique in its graph."""

    needs: tuple[str, ...]
    """Cells that must be done before it; they stand before it in the graph."""

    work: Work
    """What is to be done: a description that can be sent to another machine."""

    gpu: bool = False
    """Whether it is faster on a GPU."""


@dataclass(frozen=True)
class Workers:
    """Where cells are done side by side: a Ray cluster."""

    address: str = "auto"
    """HOST:PORT; `auto` is the cluster that runs here, else one of this machine; `local` always
    starts one of this machine."""

    cpus_per_cell: int | None = None
    """None shares a node's processors among the cells that can be on it at once."""


def do_here(cells: Sequence[Cell[Work]], do: Callable[[Work], object]) -> None:
    """Do every cell in this process, one after another."""
    check_order(cells)
    for cell in cells:
        do(cell.work)


def check_order(cells: Sequence[Cell[Work]]) -> None:
    """Names are unique, and what a cell needs stands before it."""
    seen: set[str] = set()
    for cell in cells:
        assert cell.name not in seen, f"two cells are called {cell.name}"
        assert seen.issuperset(cell.needs), f"{cell.name} needs {cell.needs}, before it are {seen}"
        seen.add(cell.name)


def side_by_side(cells: Sequence[Cell[Work]]) -> dict[str, int]:
    """For each cell, how many of the graph stand as deep as it: those that can run at once."""
    depth: dict[str, int] = {}
    for cell in cells:
        depth[cell.name] = 1 + max((depth[need] for need in cell.needs), default=0)
    count = {level: list(depth.values()).count(level) for level in depth.values()}
    return {name: count[level] for name, level in depth.items()}
