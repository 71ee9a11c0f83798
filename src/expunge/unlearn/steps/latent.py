"""Latent adversarial unlearning: forget although a perturbation within the model recalls.

Dimensions: T tokens of a pack, t tokens of one sequence, d width.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from expunge import parallel
from expunge.errors import RecipeError
from expunge.packs import decoder_blocks, in_buckets
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.steps.rule import Forwarded, Now, Record, StepOptions
from expunge.unlearn.trainer import Optimizer

Item = tuple[str, int]
"""A half, and an index into it."""


class LatentStep(StepOptions):
    """The forget loss under a perturbation of the residual stream that recalls the answers."""

    rule: Literal["latent_adversarial"] = "latent_adversarial"
    """Its name in STEP_RULES."""

    layer: int = Field(default=4, ge=0)
    """ℓ, the block behind which the perturbation is added, from 0; shallow ones are best."""

    radius: float = Field(default=1.0, gt=0)
    """ε, the largest 2-norm of the perturbation of one sequence, over all its tokens."""

    relative: bool = True
    """Whether `radius` is in units of the sequence's median token norm there, or a norm itself."""

    inner_steps: int = Field(default=6, ge=1)
    """Steps of the attacker, each of length ε / inner_steps."""

    def check(self, terms: Sequence[Term], optimizer: Optimizer, rank: int | None) -> None:
        """The perturbation must be on forget items, and reach a loss; what is computed again in the
        backward pass would lack its gradient."""
        if all(term.half != "forget" for term in terms):
            raise ValueError(
                "the step rule latent_adversarial perturbs items of forget, and no term reads "
                "forget; add one with half: forget, or use the rule joint"
            )
        deepest = Objective(tuple(t for t in terms if t.half == "forget")).deepest
        if deepest is not None and self.layer >= deepest:
            raise ValueError(
                f"the step rule latent_adversarial adds its perturbation behind block {self.layer},"
                f" and the terms on forget read no block behind {deepest}; set step.layer below "
                f"{deepest}"
            )
        if optimizer.checkpointing:
            raise ValueError(
                "the step rule latent_adversarial does not go with optimizer.checkpointing: true; "
                "a smaller optimizer.max_tokens saves memory too"
            )

    @property
    def recomputes(self) -> bool:
        """A block that is computed again would be perturbed again."""
        return False

    def check_model(self, model: nn.Module) -> None:
        """The block must be there, and a pack's tokens in one row."""
        count = len(decoder_blocks(model))  # pyright: ignore[reportArgumentType]
        if self.layer >= count:
            raise RecipeError(
                f"step.layer: there is no block {self.layer}; the model has {count}, 0 to "
                f"{count - 1}"
            )
        if in_buckets(model):  # pyright: ignore[reportArgumentType]
            raise RecipeError(
                f"the step rule latent_adversarial cannot train {type(model).__name__}, whose "
                "sequences are not forwarded in packs"
            )


def latent_adversarial(now: Now, step: LatentStep) -> Record:
    """Forget under the perturbation of a block's output that recalls the answer best.

        inner:  δ ← Π(δ - (ε/K) ∇_δ M_F / ‖∇_δ M_F‖),    K times from a random δ, ‖δ‖ ≤ ε
        outer:  g = ∇L_F(θ; h_ℓ + δ) + ∇L_R(θ)

    δ (t, d) belongs to a sequence, and so do its norm and its ε, however sequences are packed. The
    attacker moves no weight and meets no dropout. L_F may be any loss of forget items that reads
    what lies behind block ℓ; terms on companion sets are not perturbed.

    Source: Yuan et al. 2024, arXiv:2408.10682 (AdvGA, AdvNPO).
    Differs: ε scales with the activations unless `relative` is false; δ is not clamped to the range
        of activations that was seen.
    """
    attack = Attack(step, now.forwarding, now.seed)
    trained = [parameter for parameter in now.parameters if parameter.requires_grad]
    found = []
    with attack.on(now.model):
        with now.without_dropout(), _frozen(trained):
            for _ in range(step.inner_steps):
                found.append(now.recall())
                attack.advance()
        attack.fixed = True
        record = now.backward("forget")
    record |= now.backward(*now.rest)
    parallel.sum_gradients(now.parameters)
    told = {"recall.first": found[0]["nll"], "recall.last": found[-1]["nll"]} if found[0] else {}
    return record | told


@dataclass
class Attack:
    """The perturbations of a step's forget items, and the hook that adds them."""

    step: LatentStep
    forwarding: Sequence[Forwarded]
    seed: str
    fixed: bool = False
    """Once true, items that it has not met are left as they are."""
    deltas: dict[Item, Tensor] = field(default_factory=dict)
    radii: dict[Item, Tensor] = field(default_factory=dict)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block the perturbations are added to what the block ℓ gives."""
        blocks = decoder_blocks(model)  # pyright: ignore[reportArgumentType]
        handle = blocks[self.step.layer].register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def advance(self) -> None:
        """One step of the attacker on each perturbation: down its gradient, back into the ball."""
        for item, delta in self.deltas.items():
            radius = self.radii[item]
            if delta.grad is not None:
                length = delta.grad.norm().clamp_min(1e-30)
                delta -= radius / self.step.inner_steps * delta.grad / length
                delta *= (radius / delta.norm().clamp_min(1e-30)).clamp(max=1.0)
                delta.grad = None

    def _add(self, block: nn.Module, given: Any, output: Any) -> Any:
        """The block's output with the perturbations of the pack's sequences: (1, T, d)."""
        states = output[0] if isinstance(output, tuple) else output
        lengths = [tokens for _, _, tokens in self.forwarding]
        added = []
        parts = states.detach()[0].float().split(lengths)
        for (half, index, _), part in zip(self.forwarding, parts, strict=True):
            item = (half, index)
            if item not in self.deltas and not self.fixed:
                self._begin(item, part)
            delta = self.deltas.get(item, torch.zeros_like(part))
            added.append(delta.detach() if self.fixed else delta)
        moved = states + torch.cat(added)[None].to(states.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    def _begin(self, item: Item, states: Tensor) -> None:
        """A random perturbation from within the ball around states (t, d), the same anywhere."""
        radius = torch.as_tensor(self.step.radius, device=states.device)
        if self.step.relative:
            radius = radius * states.norm(dim=1).median()
        seed = random.Random(f"{self.seed}:{item}").getrandbits(63)
        rng = torch.Generator().manual_seed(seed)
        delta = torch.randn(states.shape, generator=rng).to(states.device)
        share = torch.rand((), generator=rng).item() ** (1 / delta.numel())
        self.radii[item] = radius
        self.deltas[item] = (delta * (share * radius / delta.norm())).requires_grad_(True)


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block no gradient reaches the weights."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
