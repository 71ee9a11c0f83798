"""Files of tensors that training keeps for itself, opened or refused in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from expunge.errors import TrainingError


@contextmanager
def opened(file: Path, cure: str, framework: str = "pt") -> Iterator[safe_open]:
    """An open file of tensors; one that is damaged is a TrainingError, which says the `cure`."""
    try:
        with safe_open(file, framework) as stored:
            yield stored
    except SafetensorError as error:
        raise TrainingError(f"{file} cannot be read ({error}); {cure}") from None
