"""The errors a user can cause: what was wrong, where, and what would be right.

ExpungeError
├── RecipeError      a recipe or an option says something that cannot be
├── DataError        a data file or an example is missing, malformed or unusable
├── ModelError       a model, tokenizer or adapter is missing, malformed or unusable
├── MergeError       the given models cannot be merged as asked
├── EditError        the given model cannot be edited as asked
├── TrainingError    a loss became NaN or infinite, or nothing moved
├── EvaluationError  a metric cannot be computed: an item it cannot place, a score that is NaN
├── CalibrationError nothing lies between the branches, or no candidate meets the floors
├── GateError        a measured number is beyond a limit that --fail-if names
└── RunError         a run folder cannot be used: another recipe's, read-only, disk full
    └── UnfinishedError  a stage that is asked for is not finished, and must not be built now
"""

from pathlib import Path


class ExpungeError(Exception):
    """Something the user can put right. The command line prints it on one line and exits with 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        """What a hostile file put into the message cannot break the line or command a terminal."""
        shown = (c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__("".join(shown))


class RecipeError(ExpungeError):
    """A recipe or an option says something that cannot be."""


class DataError(ExpungeError):
    """A data file or an example is missing, malformed or unusable."""


class ModelError(ExpungeError):
    """A model, tokenizer or adapter is missing, malformed or unusable."""


class LeftOutError(ModelError, AttributeError):
    """The weight of an adapted layer is read, by what does not know of the adapter."""


class MergeError(ExpungeError):
    """The given models cannot be merged as asked."""


class EditError(ExpungeError):
    """The given model cannot be edited as asked."""


class TrainingError(ExpungeError):
    """Training cannot go on: a loss became NaN or infinite, or an adapter did not move."""


class DivergedError(TrainingError):
    """Training came to a loss that is not finite."""


class EvaluationError(ExpungeError):
    """A metric cannot be computed: an item it cannot place, a score that is NaN."""


class CalibrationError(ExpungeError):
    """The branches do not bracket the balance, or nothing that was tried meets the floors."""


class GateError(ExpungeError):
    """A measured number is beyond a limit that --fail-if names; exit code 3."""

    exit_code = 3


class RunError(ExpungeError):
    """A run folder cannot be used: another recipe's, read-only, or the disk is full."""


class UnfinishedError(RunError):
    """A stage that is asked for is not finished, and must not be built now."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder
        """Where the stage would lie."""


_FULL = ("not enough memory", "allocate memory", "out of memory", "bad_alloc")


def says_full(error: BaseException) -> bool:
    """Whether an error says that memory has run out, of this machine or of its accelerator."""
    if isinstance(error, MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in said for words in _FULL)
