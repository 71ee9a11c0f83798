"""What a row of a loss table says about its function.

Dimensions: B sequences, N scored tokens, d width, V vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from expunge.needs import LEVELS, UNLEARNT, Needs
from expunge.scores import Scores

_NEEDS = {
    "needs_reference": "reference log-probs",
    "needs_kl": "reference states",
    "needs_reference_states": "reference states",
    "needs_reference_hidden": "reference hidden states",
    "needs_standardized": "logits",
}


@dataclass(frozen=True)
class Hidden:
    """What a hidden-state loss reads of N tokens, at the output of one block; all float32."""

    states: Tensor  # (N, d)
    reference: Tensor | None = None  # (N, d) what they were before the first update
    norm: float = 1.0
    """Mean length of the reference's states, over all items of the half."""


@dataclass(frozen=True)
class Loss:
    """One row: the function, and what it reads and needs.

    Hyperparameters go by keyword. Positionally the function takes, according to `reads`,

        scores   (current, reference) → losses whose mean is the micro-batch's: (B,) or (1,)
        logits   (logits (N, V), targets (N,), the reference's logits or none) → losses (N,)
        hidden   (Hidden) → losses (N,)
    """

    fn: Callable[..., Tensor]
    reads: Literal["scores", "logits", "hidden"] = "scores"
    needs_reference: bool = False
    """Reads the reference's log-probs."""
    needs_kl: bool = False
    """Reads `Scores.token_kl`, so the reference's hidden states are kept."""
    needs_reference_states: bool = False
    """Reads the reference's logits, so its final hidden states are kept."""
    needs_reference_hidden: Literal["", "states", "norms"] = ""
    """Reads the reference's states at the output of the block, or their mean length."""
    needs_standardized: bool = False
    """Reads `Scores.more[STANDARDIZED]`, a function of each token's logits."""
    needs_level: Literal["", "item", "token"] = ""
    """Reads the level of each item or token, which a branch's `levels` give."""
    half: Literal["forget", "retain"] = "forget"
    """The half that it is meant for."""
    cost: str = "1 C"
    """In units of one forward and backward pass of its half."""
    test: str = "tests/unlearn/test_losses.py"
    """Where it is proven."""
    bounded: bool = True
    """Cannot fall without end."""
    mean_over: Literal["sequences", "tokens", "micro-batch"] = "sequences"
    """What the micro-batch's loss is a mean over. A mean over sequences or tokens can be formed on
    several ranks, each from its share; `micro-batch` reads all of it at once."""
    skip_first: int = 0
    """Scored tokens at the start of each sequence that it leaves out, unless the term says so."""

    positive: tuple[str, ...] = ()
    """Hyperparameters that it divides by, or that turn it around, rob it of its bound or leave
    nothing of it at 0."""

    nonnegative: tuple[str, ...] = ()
    """Hyperparameters that do so below 0 alone."""

    fidelity: str = "exact"
    """exact · as-released quirk · adapted · inspired · own."""

    def __call__(self, current: Scores, reference: Scores | None, **options: float) -> Tensor:
        """Losses whose mean is the micro-batch's loss: (B,) or (1,)."""
        assert self.reads == "scores"
        return self.fn(current, reference, **options)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the hyperparameters."""
        parameters = inspect.signature(self.fn).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    @property
    def needs(self) -> Needs:
        """The half, the levels, and what must be read beside log-probs, in words."""
        own = {"logits": ("logits",), "hidden": ("hidden states",)}.get(self.reads, ())
        said = dict.fromkeys(said for flag, said in _NEEDS.items() if getattr(self, flag))
        levels = (LEVELS,) if self.needs_level == "item" else ()
        models = (UNLEARNT,) if self.needs_level == "token" else ()
        return Needs((self.half, *levels), models, besides=(*own, *said))
