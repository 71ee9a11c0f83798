"""The model that a metric compares with: its saved results, or the model itself, read here."""

from pathlib import Path
from typing import Any

from expunge import models
from expunge.config import Section
from expunge.errors import EvaluationError
from expunge.evaluate.reader import Reader, open_reader


def saved_items(
    path: str, suite: str, section: Section, same: tuple[str, ...]
) -> list[dict[str, Any]] | None:
    """The items of `suite` in the folder of an earlier evaluation; None where it is no such folder.

    Items that were measured otherwise cannot be compared: an `EvaluationError` names the first
    setting of `same` that differs.
    """
    from expunge.evaluate.run import RESULTS, read_run  # here, for run imports every suite

    folder = Path(path).expanduser()
    if not (folder / RESULTS).is_file():
        return None
    results, items = read_run(folder)
    if suite not in results["suites"]:
        raise EvaluationError(f"{path} has no results of the suite {suite}")
    theirs, ours = results["suites"][suite]["settings"], section.model_dump(mode="json")
    for name in same:
        if theirs.get(name) != ours[name]:
            raise EvaluationError(
                f"{path} was measured with {suite}.{name}={theirs.get(name)}, "
                f"not {ours[name]}, so the two cannot be compared"
            )
    return [item for item in items if item["suite"] == suite]


def reference_reader(path: str, reader: Reader) -> Reader:
    """A reader of another model, in the same type and beside the same tables."""
    return open_reader(models.resolve(path), None, dtype=reader.dtype, folder=reader.folder)
