"""Methods that look at each weight and at a few sums over its tensor.

Dimensions: M models, n weights of a slice; base (n,), deltas (M, n), float32. Each method is a
pair: `prepare` sees the whole operand slice by slice and returns what merging one slice needs.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.merge.operands import Operand, decode
from expunge.merge.trim import Settings
from expunge.models import device

Apply = Callable[[Tensor, Tensor, Settings, Any, int], Tensor]
"""(base, deltas, settings, prepared, columns) → the merged weights of one slice, (n,)."""


def tensors(piece: Any) -> tuple[Tensor, Tensor]:
    """Base and deltas of one slice, where models live."""
    base = torch.tensor(decode(piece.base, piece.base_kind), device=device())
    return base, torch.tensor(piece.deltas, device=device())


def nothing(operand: Operand, settings: Settings) -> None:
    """For methods that need no sums."""


def nearswap(base: Tensor, deltas: Tensor, settings: Settings, _: Any, columns: int) -> Tensor:
    """Take the model where it is near the base, lean to it by t/|δ| elsewhere.

        base + clamp(t/|δ|, 0, 1) δ

    Source: mergekit.
    """
    (delta,) = deltas
    lean = (settings.options["t"] / delta.abs().clamp_min(1e-6)).clamp(0, 1)
    return base + lean * delta


def count_unique(operand: Operand, settings: Settings) -> Tensor:
    """For each model: how many of its changes it shares, and how many it makes alone: (2, M)."""
    total = torch.zeros(2, len(operand.models), dtype=torch.float64)
    for piece in operand:
        active = tensors(piece)[1].abs() > settings.options["epsilon"]
        alone = active.sum(0) == 1
        total += torch.stack([(active & ~alone).sum(1), (active & alone).sum(1)]).cpu()
    return total


def ram(base: Tensor, deltas: Tensor, settings: Settings, counts: Any, columns: int) -> Tensor:
    """Keep a change that one model makes alone; average those that several make.

        a_i = [|δ_i| > ε],   base + Σ a_i δ_i / max(1, Σ_j a_j)

    Source: arXiv:2601.13572.
    """
    active = deltas.abs() > settings.options["epsilon"]
    share = active.sum(0).clamp_min(1)
    return base + (deltas * active / share).sum(0)


def ram_plus(base: Tensor, deltas: Tensor, settings: Settings, counts: Any, columns: int) -> Tensor:
    """As ram, but a model's own changes are strengthened the more of its changes are shared.

        λ_i = 1 + r min(ρ_i, α),   ρ_i = shared_i / alone_i over the tensor

    Source: arXiv:2601.13572.
    """
    options = settings.options
    active = deltas.abs() > options["epsilon"]
    users = active.sum(0)
    rho = counts[0] / counts[1].clamp_min(options["epsilon"])
    strength = (1 + options["r"] * rho.clamp(0, options["alpha"])).float().to(base.device)
    factor = torch.where(users == 1, strength[:, None], 1 / users.clamp_min(1))
    return base + (deltas * active * factor).sum(0)


def fusion_threshold(operand: Operand, settings: Settings) -> float:
    """median + 1.5 (q3 - q1) of the importance over the tensor."""

    def scores() -> Iterator[Tensor]:
        return (_importance(*tensors(piece), operand.columns) for piece in operand)

    places = [int(share * (operand.size - 1)) for share in (0.25, 0.5, 0.75)]
    low, middle, high = (order_statistic(scores, place) for place in places)
    return middle + 1.5 * (high - low)


def arcee_fusion(
    base: Tensor, deltas: Tensor, settings: Settings, threshold: Any, columns: int
) -> Tensor:
    """Take only the model's important changes.

        importance = |δ| · KL(softmax(row of the model) ‖ softmax(row of the base))
        kept where it is at least median + 1.5 · (third - first quartile)

    Source: mergekit.
    Differs: exact quartiles; mergekit samples tensors of more than a million.
    """
    chosen = _importance(base, deltas, columns) >= threshold
    return base + deltas[0] * chosen


def _importance(base: Tensor, deltas: Tensor, columns: int) -> Tensor:
    """(n,) float32."""
    before = base.view(-1, columns)
    after = before + deltas[0].view(-1, columns)
    p, q = after.softmax(-1) + 1e-8, before.softmax(-1) + 1e-8
    divergence = (p * (p / q).log()).sum(-1, keepdim=True)
    return (deltas[0].view(-1, columns).abs() * divergence).flatten()


def consensus(base: Tensor, deltas: Tensor, settings: Settings, _: Any, columns: int) -> Tensor:
    """Drop what serves fewer than `agree` models.

        τ = Σ w_i δ_i,   m_i = [|δ_i| ≥ mask_scale · |τ - δ_i|],   base + λ τ [Σ m_i ≥ agree]

    Source: TALL masks and consensus merging, arXiv:2405.07813.
    """
    options = settings.options
    weights = torch.tensor(settings.weights, device=base.device)[:, None]
    total = (weights * deltas).sum(0)
    serves = deltas.abs() >= options["mask_scale"] * (total - deltas).abs()
    return base + options["lambda"] * total * (serves.sum(0) >= options["agree"])


@dataclass(frozen=True)
class Balance:
    """Sums that PCB needs: the greatest |δ| of each model, and bounds of its scores."""

    greatest: Tensor
    least: Tensor
    bound: Tensor
    top: Tensor


def balance(operand: Operand, settings: Settings) -> Balance:
    """The range of |δ_i| and the bound that `density` of each model's scores reach."""
    ranges = [torch.stack(tensors(piece)[1].abs().aminmax(dim=1)) for piece in operand]
    least = torch.stack(ranges)[:, 0].amin(0)
    greatest = torch.stack(ranges)[:, 1].amax(0)
    found = Balance(greatest, least, greatest, greatest)
    bounds, tops = [], []
    for row, density in enumerate(settings.options["density"]):

        def scores(row: int = row) -> Iterator[Tensor]:
            return (_competition(tensors(piece)[1], found)[row] for piece in operand)

        place = min(operand.size - 1, int((1 - density) * operand.size))
        bounds.append(order_statistic(scores, place))
        tops.append(max(float(score.max()) for score in scores()))
    return Balance(greatest, least, torch.tensor(bounds), torch.tensor(tops))


def pcb(base: Tensor, deltas: Tensor, settings: Settings, found: Any, columns: int) -> Tensor:
    """Weigh each entry by how it competes within its model and with the others.

        s_i = exp(M norm(|δ_i|)²) · tanh(δ_i Σ_j δ_j),   β_i = the top `density` of s_i, to [0, 1]
        base + λ Σ w_i β_i δ_i / Σ β_i

    Source: PCB-Merging, arXiv:2410.02396.
    Differs: does not clip outliers before weighing.
    """
    found = Balance(*(t.to(base.device) for t in found.__dict__.values()))
    scores = _competition(deltas, found)
    bound, span = found.bound[:, None], (found.top - found.bound)[:, None]
    beta = ((scores - bound) / span.clamp_min(1e-12)).clamp(0, 1)
    weights = torch.tensor(settings.weights, device=base.device)[:, None]
    merged = (weights * beta * deltas).sum(0) / beta.sum(0).clamp_min(1e-12)
    return base + settings.options["lambda"] * merged


def _competition(deltas: Tensor, found: Balance) -> Tensor:
    low, high = found.least[:, None], found.greatest[:, None]
    within = ((deltas.abs() - low) / (high - low).clamp_min(1e-12)) ** 2
    return (len(deltas) * within).exp() * (deltas * deltas.sum(0)).tanh()


def order_statistic(scores: Callable[[], Iterator[Tensor]], place: int) -> float:
    """The score at `place` in ascending order, 0 the least, without holding or sorting them all."""
    prefix = 0
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for score in scores():
            keys = _ordered(score)
            keys = keys if shift else keys[keys >> 16 == prefix]
            counts += torch.bincount((keys >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, place, right=True))
        place -= int(below[digit - 1]) if digit else 0
        prefix = (prefix << 16) | digit
    bits = prefix ^ (0x80000000 if prefix & 0x80000000 else 0xFFFFFFFF)
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _ordered(score: Tensor) -> Tensor:
    """Whole numbers in the order of float32 numbers: 32 bits in int64."""
    bits = score.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >> 31 > 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
