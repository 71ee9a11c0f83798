"""What a row of a loss table says about its function."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from expunge.scores import Scores


@dataclass(frozen=True)
class Loss:
    """One row: the function, and what it needs.

    The function takes (current, reference) positionally and its hyperparameters by keyword.
    """

    fn: Callable[..., Tensor]
    needs_reference: bool = False
    """Reads the reference's log-probs."""
    needs_kl: bool = False
    """Reads `Scores.token_kl`, so the reference's hidden states are kept."""
    cost: str = "1 C"
    """In units of one forward and backward pass of its half."""
    test: str = "tests/unlearn/test_losses.py"
    """Where it is proven."""
    bounded: bool = True
    """Cannot fall without end."""
    mean_over: Literal["sequences", "tokens", "micro-batch"] = "sequences"
    """What the micro-batch's loss is a mean over. A mean over sequences or tokens can be formed on
    several ranks, each from its share; `micro-batch` reads all of it at once."""

    fidelity: str = "exact"
    """exact · as-released quirk · adapted · inspired · own."""

    def __call__(self, current: Scores, reference: Scores | None, **options: float) -> Tensor:
        """Losses whose mean is the micro-batch's loss: (B,) or (1,)."""
        return self.fn(current, reference, **options)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the hyperparameters."""
        parameters = inspect.signature(self.fn).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
