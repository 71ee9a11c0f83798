"""Step rules that keep a part of the forget gradient: chosen rows, or all but shared directions."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from expunge.unlearn.objective import Term
from expunge.unlearn.steps.rule import Now, Record, StepOptions, norm
from expunge.unlearn.trainer import Optimizer


class PcguStep(StepOptions):
    """The forget gradient on the weight vectors where it differs most from the retain gradient."""

    rule: Literal["pcgu"] = "pcgu"
    """Its name in STEP_RULES."""

    share: float = Field(default=0.01, gt=0, le=1)
    """k, the share of all weight vectors that moves in a step."""

    vectors: Literal["rows", "columns"] = "rows"
    """A matrix (out, in) is cut into rows, one an output, or columns, one an input; what has one
    dimension is one vector."""

    @property
    def needs_both(self) -> bool:
        """Vectors are chosen by the angle between the two."""
        return True

    def check(self, terms: Sequence[Term], optimizer: Optimizer, rank: int | None) -> None:
        """Moments and weight decay would move what was not chosen."""
        if optimizer.kind != "sgd" or optimizer.weight_decay:
            raise ValueError(
                "the step rule pcgu moves chosen vectors alone: set optimizer.kind: sgd and "
                "optimizer.weight_decay: 0"
            )


class RepselectStep(StepOptions):
    """The forget gradient without its principal directions."""

    rule: Literal["repselect"] = "repselect"
    """Its name in STEP_RULES."""

    components: int = Field(default=1, ge=0)
    """k, how many principal directions of each matrix's gradient are taken away."""

    of: Literal["forget", "retain"] = "forget"
    """Whose gradient's principal directions."""

    @property
    def needs_both(self) -> bool:
        """Directions of the retain gradient are taken out of the forget gradient."""
        return self.of == "retain"

    def check(self, terms: Sequence[Term], optimizer: Optimizer, rank: int | None) -> None:
        """A gradient of rank r has nothing left without r directions."""
        if rank is not None and self.components >= rank:
            raise ValueError(
                f"step.components must be below lora.rank ({rank}), not {self.components}: nothing "
                "would be left of the forget gradient"
            )
        if self.of == "retain" and not any(term.half == "retain" for term in terms):
            raise ValueError("step.of: retain needs a term with half: retain")


def pcgu(now: Now, step: PcguStep) -> Record:
    """Move only the weight vectors in which the two halves are told apart.

        c_i = cos(∇_i M_F, ∇_i M_R) of each row or column i of each matrix
        g_i = ∇_i L_F  for the share of vectors whose c_i is lowest,  0 elsewhere

    ∇M_F, the direction of knowing, is -∇L_F: exactly so for gradient_ascent. The retain terms
    choose and do not train. The optimiser must be plain: moments and weight decay move a
    weight whose gradient is zero.

    Source: Yu et al. 2023, PCGU, Findings of ACL 2023.
    Differs: a share of the vectors, not 10000; halves of the data, not pairs of sentences.
    """
    record, forget = now.gradient("forget")
    kept, retain = now.gradient(*now.rest)
    cosines = [
        torch.zeros(0) if f is None else _cosines(f, r, step.vectors)
        for f, r in zip(forget, retain, strict=True)
    ]
    del retain
    count = sum(map(len, cosines))
    flat = torch.cat([c.cpu() for c in cosines])
    lowest = flat.topk(max(1, round(step.share * count)), largest=False).indices
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[lowest] = True
    for gradient, here in zip(forget, chosen.split([len(c) for c in cosines]), strict=True):
        if gradient is not None:
            gradient.mul_(_along(here.to(gradient.device, gradient.dtype), gradient, step.vectors))
    now.leave((1.0, forget))
    return record | kept | {"vectors": float(len(lowest)), "cosine": float(flat[lowest].max())}


def repselect(now: Now, step: RepselectStep) -> Record:
    """Take the principal directions out of the forget gradient: they are shared with other data.

        g = (I - U_k U_kᵀ) ∇L_F (I - V_k V_kᵀ) + ∇L_R    for each matrix

    U_k, V_k are the first k singular directions of the matrix's forget gradient, or of its retain
    gradient. What they hold is also what a fine-tuning attacker wins back first. What has one
    dimension is left alone.

    Source: RepSelect, arXiv:2606.17168.
    Differs: written from the abstract alone.
    """
    record, forget = now.gradient("forget")
    before = norm(forget)
    kept, retain = now.gradient(*now.rest)
    for f, r in zip(forget, retain, strict=True):
        if f is not None and f.ndim == 2 and step.components:
            basis = f if step.of == "forget" else r
            if basis is not None:
                _collapse(f, *principal(basis, step.components))
    left = norm(now.free(forget)) / before
    now.leave((1.0, forget), (1.0, retain))
    told = {"norm.forget": before, "share": left} if record else {}
    return record | kept | told


def principal(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first singular directions of a matrix (m, n): left (m, k) and right (n, k)."""
    m, n = matrix.shape
    matrix = matrix.float() / matrix.norm().clamp_min(1e-30)
    if m > n:
        right, left = principal(matrix.T, count)
        return left, right
    count = min(count, m)
    left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -count:]
    return left, torch.linalg.qr(matrix.T @ left).Q


def _collapse(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """Take these directions out of a gradient, in place."""
    left, right = left.to(gradient.dtype), right.to(gradient.dtype)
    gradient.sub_(left @ (left.T @ gradient))
    gradient.sub_((gradient @ right) @ right.T)


def _cosines(forget: Tensor, retain: Tensor | None, vectors: str) -> Tensor:
    """cos(-forget, retain) of each vector; 0 where retain is 0, and 1 where forget is."""
    f = _vectors(forget.float(), vectors)
    r = torch.zeros_like(f) if retain is None else _vectors(retain.float(), vectors)
    lengths = (f.norm(dim=1) * r.norm(dim=1)).clamp_min(1e-30)
    return (-(f * r).sum(1) / lengths).where(f.any(1), 1.0)


def _vectors(tensor: Tensor, vectors: str) -> Tensor:
    """The vectors of a tensor as rows."""
    if tensor.ndim != 2:
        return tensor.reshape(1, -1)
    return tensor if vectors == "rows" else tensor.T


def _along(chosen: Tensor, gradient: Tensor, vectors: str) -> Tensor:
    """One number a vector, in a shape that multiplies the gradient."""
    if gradient.ndim != 2:
        return chosen.reshape(())
    return chosen[:, None] if vectors == "rows" else chosen[None]
