"""The optimiser of a run: its rate at each step, its restarts, and the weights that it leaves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from expunge.config import Section
from expunge.models import Dtype


class Optimizer(Section):
    """AdamW or plain gradient descent, with a linear schedule."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """`sgd` follows the gradient itself, without momentum."""

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""

    warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps over which the rate rises from 0; it then falls linearly to 0. A phase of
    one step takes it at the peak."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""

    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; null never clips."""

    compute: Dtype = "bfloat16"
    """Type of the matrix products while weights are kept in float32 (autocast)."""

    max_tokens: int = Field(default=2048, ge=1)
    """Tokens forwarded at once; memory grows with it. Results do not change, up to rounding, where
    dropout is 0; with dropout other masks are drawn."""

    checkpointing: bool = False
    """Keep each block's input alone and compute the rest again in the backward pass: a third more
    arithmetic for a fraction of the memory. Results do not change."""

    checkpoint_seconds: float = Field(default=30, ge=0)
    """Write a checkpoint when this long has passed since the last, or longer where writing is
    slow, so that it takes at most a twentieth of the time; 0 writes one every step."""

    def keyed(self) -> dict[str, Any]:
        """All but what costs memory or time alone: a branch goes on where that is changed."""
        free = {"max_tokens", "checkpointing", "checkpoint_seconds"}
        return {name: value for name, value in super().keyed().items() if name not in free}


@dataclass(frozen=True)
class Span:
    """Steps that share moments and one rise and fall of the learning rate."""

    steps: int
    lr: float = 1.0
    """Factor of the recipe's learning rate."""


class Stepper:
    """torch's optimiser, started anew with each span, moving only what a mask allows.

    `masks` holds which weights of a parameter may move, for those that may move in part. The others
    get no gradient, so no moments, and no weight decay: they stay as they are, bit for bit.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        config: Optimizer,
        spans: Sequence[Span],
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.spans = config, spans
        self.masks = {parameters[name]: mask for name, mask in (masks or {}).items()}
        whole = [p for p in parameters.values() if p not in self.masks]
        groups = [{"params": whole}, {"params": list(self.masks), "weight_decay": 0.0}]
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.kind]
        self.torch = kind(
            [group for group in groups if group["params"]],
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @property
    def rate(self) -> float:
        """The learning rate now."""
        return self.torch.param_groups[0]["lr"]

    def resume(self, step: int) -> None:
        """Moments were put back after `step` steps: they count those of their own span."""
        _, start, _ = self._span(step)
        for state in self.torch.state.values():
            if "step" in state:
                state["step"].fill_(float(step - start))

    def begin(self, step: int, steps: int) -> int:
        """Set the rate of this step of `steps`; a span's first step forgets the moments before.

        Returns the span's number.
        """
        number, start, length = self._span(step)
        if step == start:
            self.torch.state.clear()
        total = min(length, steps - start)
        warm = math.ceil(self.config.warmup * total) if total > 1 else 0  # it would not move
        done = step - start
        factor = done / warm if done < warm else (total - done) / max(1, total - warm)
        for group in self.torch.param_groups:
            group["lr"] = self.config.lr * self.spans[number].lr * factor
        return number

    @torch.no_grad()
    def hold(self) -> None:
        """Take the gradient from what the mask holds still."""
        for parameter, mask in self.masks.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def step(self, rate: float | None = None) -> None:
        """Move the weights, by a learning rate of the step's own where it has one."""
        for group in self.torch.param_groups if rate is not None else ():
            group["lr"] = rate
        decay = 1 - self.rate * self.config.weight_decay
        for parameter, mask in self.masks.items():
            if parameter.grad is not None and decay != 1:
                parameter.mul_(mask.to(parameter.dtype).mul_(decay - 1).add_(1))
        self.torch.step()

    def _span(self, step: int) -> tuple[int, int, int]:
        """The span that a step lies in: its number, first step and length."""
        start = 0
        for number, span in enumerate(self.spans):
            if step < start + span.steps or number == len(self.spans) - 1:
                return number, start, span.steps
            start += span.steps
        raise AssertionError("a run has at least one span")
