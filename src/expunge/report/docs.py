"""The generated documents: docs/methods.md and docs/results.md, written or found stale."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge import runs
from expunge.errors import ExpungeError, RunError
from expunge.report.board import read_rows
from expunge.report.methods_page import method_rows, methods_page
from expunge.report.results_page import results_page


def method_tables() -> dict[str, Mapping[str, Any]]:
    """Every method table of the program by the heading it has in docs/methods.md."""
    return {}


def documents(folder: Path) -> dict[Path, str]:
    """The path and text of each generated document of the docs folder."""
    return {
        folder / "methods.md": methods_page(method_rows(method_tables())),
        folder / "results.md": results_page(read_rows(folder / "results.json")),
    }


def write_documents(folder: Path) -> list[Path]:
    """Write the documents that are stale; returns their paths."""
    stale = stale_documents(folder)
    for path, text in documents(folder).items():
        if path in stale:
            runs.write_text(path, text)
    return stale


def stale_documents(folder: Path) -> list[Path]:
    """The documents that do not say what the code and the measured rows say."""
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}; run this at the root of a checkout")
    return [
        path
        for path, text in documents(folder).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str] | None = None) -> int:
    """Regenerate the documents of ./docs, or with --check only say whether they are stale."""
    parser = argparse.ArgumentParser(prog="python -m expunge.report.docs", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args(arguments).check
    try:
        stale = (stale_documents if check else write_documents)(Path("docs"))
    except ExpungeError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for path in stale:
        sys.stdout.write(f"{path} {'is stale: run make docs' if check else 'written'}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
