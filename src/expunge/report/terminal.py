"""A finished run on the terminal: its verdict and its table."""

from pathlib import Path

from rich.console import Console

from expunge.errors import RunError
from expunge.report.results import read_results
from expunge.report.tables import results_table
from expunge.report.verdict import verdict


def console() -> Console:
    """Standard output; names and numbers in it are not coloured by guess."""
    return Console(highlight=False)


def result_folders(run: Path) -> list[Path]:
    """The folders of a run that hold results: its own, or one for each seed."""
    found = [path.parent for path in (run / "results.json", *sorted(run.glob("*/results.json")))]
    folders = [folder for folder in found if (folder / "results.json").is_file()]
    if not folders:
        raise RunError(f"there are no results in {run}; expunge run makes them")
    return folders


def print_results(folder: Path, out: Console | None = None) -> None:
    """Print the table of one results.json, and under it the verdict and where the page lies."""
    out = out or console()
    results = read_results(folder / "results.json")
    out.print(results_table(results))
    for sentence in verdict(results):
        out.print(sentence, markup=False)
    out.print(f"{folder / 'report.html'} shows what each model says.", markup=False)
