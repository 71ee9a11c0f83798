"""The generated documents of docs/: written, or found stale."""

from collections.abc import Iterable
from pathlib import Path

from expunge import runs
from expunge.errors import RunError
from expunge.report.board import read_rows
from expunge.report.leaderboard import leaderboard_page
from expunge.report.methods_guide import methods_guide
from expunge.report.methods_page import MethodRow, methods_page
from expunge.report.metrics_page import SuiteRow, metrics_page
from expunge.report.results_page import results_page
from expunge.report.standings import read_standings


def documents(
    methods: Iterable[MethodRow], suites: Iterable[SuiteRow], folder: Path
) -> dict[Path, str]:
    """The path and text of each generated document of the docs folder.

    Methods of one kind stand together; metrics have a page of their own, with the suites.
    """
    rows = list(methods)
    metrics = [row for row in rows if row.kind in ("metric", "attack")]
    others = [row for row in rows if row.kind not in ("metric", "attack")]
    return {
        folder / "methods.md": methods_page(others, methods_guide(others)),
        folder / "metrics.md": metrics_page(suites, metrics),
        folder / "results.md": results_page(read_rows(folder / "results.json")),
        folder / "leaderboard.md": leaderboard_page(read_standings(folder / "leaderboard.json")),
    }


def write_docs(
    methods: Iterable[MethodRow],
    suites: Iterable[SuiteRow] = (),
    *,
    check: bool = False,
    folder: Path = Path("docs"),
) -> list[Path]:
    """Write the documents that are stale and return them; with `check`, stale is a `RunError`."""
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}; run this at the root of a checkout")
    texts = documents(methods, suites, folder)
    stale = [p for p, text in texts.items() if not p.is_file() or p.read_text("utf-8") != text]
    if check and stale:
        raise RunError(f"stale: {', '.join(map(str, stale))}; run make docs")
    for path in stale:
        runs.write_text(path, texts[path])
    return stale
