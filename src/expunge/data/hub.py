"""Data sets of the Hugging Face Hub."""

from expunge.data.rows import Row, numbered
from expunge.errors import DataError


def hub_rows(path: str, subset: str | None, split: str | None, revision: str | None) -> list[Row]:
    """The records of the data set that a path `hub:ID` names: of its subset, its split (`train`)
    and its commit, where these are given."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"reading {path} needs the 'datasets' package: pip install 'expunge[hub]'"
        ) from None
    try:
        table = datasets.load_dataset(
            path.removeprefix("hub:"),
            name=subset,
            split=split or "train",
            revision=revision,
        )
        rows = numbered(table, path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # pyright: ignore
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"cannot load {path} from the Hub: {reason}") from None
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows
