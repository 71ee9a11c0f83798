"""The operations of a merge in torch, on any device: what the kernels are checked against.

The same names, arguments and numbers as `fused`, one slice at a time; on a GPU these are what runs.
Dimensions: M models, n numbers of a slice.
"""

import numpy as np
import torch
from torch import Tensor

from expunge.merge import codec
from expunge.merge.codec import BINS, INFINITY, LOW_BITS, WINDOW
from expunge.merge.fused import Election, Rounding, Tally, Trim, Window
from expunge.merge.operands import Slice, decode
from expunge.models import device

_TYPES = {
    codec.FLOAT32: torch.float32,
    codec.BFLOAT16: torch.bfloat16,
    codec.FLOAT16: torch.float16,
}
_GOLDEN, _MIX1, _MIX2 = (
    x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def bins(piece: Slice, shared: bool) -> np.ndarray:
    """How many magnitudes (or variances) have each high half: (rows, BINS) int64."""
    high = _magnitudes(piece, shared) >> LOW_BITS
    return np.stack([torch.bincount(row, minlength=BINS).cpu().numpy() for row in high])


def window(piece: Slice, shared: bool, rows: np.ndarray, lows: np.ndarray) -> Window:
    """Magnitudes of the models `rows` (S,) at and beyond a window that begins at `lows` (S,).

    How many lie beyond it (S,); how many are 0 of the first of them; how many are not finite; where
    the parts of the slice begin (here it is one); how many equal each pattern in each part
    (parts, S, WINDOW).
    """
    magnitudes = _magnitudes(piece, shared)[rows]
    places = magnitudes - torch.tensor(lows, device=device())[:, None]
    nought = int((magnitudes[0] == 0).sum())
    bad = int((places >= torch.tensor(INFINITY - lows, device=device())[:, None]).sum())
    inside = [row[(row >= 0) & (row < WINDOW)] for row in places]
    hists = [torch.bincount(row, minlength=WINDOW).cpu().numpy() for row in inside]
    return (places >= WINDOW).sum(1).cpu().numpy(), nought, bad, [0], np.stack(hists)[None]


def place_of(
    piece: Slice, shared: bool, row: int, wanted: int, number: int, first: int = 0
) -> tuple[int, int]:
    """The place just after the `number`-th one `wanted`, and 0; or the end, and how many lack.

    They are numbered from `first` on, where a part of the slice begins.
    """
    there = (_magnitudes(piece, shared)[row, first:] == wanted).nonzero().flatten()
    if len(there) < number:
        return piece.n, number - len(there)
    return first + int(there[number - 1]) + 1, 0


def measure(piece: Slice, trim: Trim) -> np.ndarray:
    """Σ|δ_i| and Σ|τ_i| of one slice: (M, 2) float64."""
    deltas, kept = _deltas(piece).double(), trimmed(piece, trim).double()
    return torch.stack([deltas.abs().sum(1), kept.abs().sum(1)], 1).cpu().numpy()


def energies(piece: Slice, trim: Trim) -> np.ndarray:
    """Σ τ_i² of one slice: (M,) float64."""
    return trimmed(piece, trim).double().square().sum(1).cpu().numpy()


def elect(
    piece: Slice, trim: Trim, election: Election, rounding: Rounding, tally: Tally
) -> np.ndarray:
    """base + times · elected(τ), stored: (n · itemsize,) uint8."""
    kept = trimmed(piece, trim)  # (M, n)
    weights = election.weights.tolist()
    sign = _summed(
        [w * row if election.weighted else row for w, row in zip(weights, kept, strict=True)]
    )
    sign = torch.where(sign >= 0, 1.0, -1.0)
    terms, shares = [], []
    for weight, row in zip(weights, kept, strict=True):
        ballot = weight * row if election.weighted else row
        part = ballot * sign > 0 if election.elect else torch.ones_like(row, dtype=torch.bool)
        terms.append(torch.where(part, weight * row, 0.0))
        shares.append(torch.where(part, abs(weight) if election.divide == 2 else 1.0, 0.0))
    total, share = _summed(terms), _summed(shares)
    if election.divide:
        total = torch.where(share > 0, total / torch.where(share > 0, share, 1.0), total)
    delta = total * election.times
    base = _numbers(piece.base, piece.base_kind)
    merged = _rounded(base + delta, rounding, piece.start)
    moved = delta != 0
    tally.bad += int((~torch.isfinite(merged.float())).sum())
    tally.moved += int(moved.sum())
    tally.changed += int((moved & (merged != base.to(merged.dtype))).sum())
    return _bytes(merged)


def products(piece: Slice) -> np.ndarray:
    """Inner products of the models' deltas over one slice: (M, M) float64."""
    deltas = _deltas(piece).double()
    return (deltas @ deltas.T).cpu().numpy()


def combine(piece: Slice, weights: np.ndarray, rounding: Rounding, tally: Tally) -> np.ndarray:
    """Σ w_i x_i, stored: (n · itemsize,) uint8."""
    numbers = [
        _numbers(raw, int(kind)) for raw, kind in zip(piece.models, piece.kinds, strict=True)
    ]
    terms = [float(np.float32(w)) * x for w, x in zip(weights, numbers, strict=True)]
    merged = _rounded(_summed(terms), rounding, piece.start)
    tally.bad += int((~torch.isfinite(merged.float())).sum())
    return _bytes(merged)


def uniform(key: int, start: int, n: int) -> Tensor:
    """n float32 in [0, 1): functions of the key and of the places start … start + n alone."""
    signed = key - (1 << 64) if key >= 1 << 63 else key
    pairs = torch.arange(start // 2, (start + n + 1) // 2, device=device())
    z = (pairs + 1) * _GOLDEN + signed
    z = (z ^ _shifted(z, 30)) * _MIX1
    z = (z ^ _shifted(z, 27)) * _MIX2
    z = z ^ _shifted(z, 31)
    halves = torch.stack([z & 0xFFFFFFFF, _shifted(z, 32)], 1).flatten()
    return (halves[start % 2 :][:n] >> 8).float() * 2.0**-24


def _shifted(z: Tensor, by: int) -> Tensor:
    """z >> by as if it had no sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _numbers(raw: np.ndarray, kind: int) -> Tensor:
    return torch.tensor(decode(raw, kind), device=device())


def _deltas(piece: Slice) -> Tensor:
    return torch.tensor(piece.deltas, device=device())


def _magnitudes(piece: Slice, shared: bool) -> Tensor:
    """The bits of |δ_i|, or of the variance over models: (rows, n) int64."""
    deltas = _deltas(piece)
    if shared:
        mean = _summed(list(deltas)) / len(deltas)
        deltas = (_summed([(row - mean) * (row - mean) for row in deltas]) / len(deltas))[None]
    return (deltas.contiguous().view(torch.int32) & 0x7FFFFFFF).long()


def trimmed(piece: Slice, trim: Trim) -> Tensor:
    """τ_i: what stays of each model's delta, rescaled, the rest 0: (M, n) float32."""
    deltas, scores = _deltas(piece), _magnitudes(piece, trim.shared)
    places = torch.arange(piece.start, piece.start + piece.n, device=deltas.device)
    kept = []
    for i, delta in enumerate(deltas):
        score, bounds = scores[0 if trim.shared else i], trim.bounds[0 if trim.shared else i]
        outer, inner = ((score > b) | ((score == b) & (places < c)) for b, c in bounds.tolist())
        scale = float(trim.scales[i])
        tau = torch.where(inner & ~outer, delta * (scale or 1.0), 0.0)
        chance = _chances(delta, trim, i)
        if trim.spread is not None or trim.odds[i] < 1:
            drawn = uniform(int(trim.keys[i]), piece.start, piece.n) < chance
            tau = torch.where(drawn, tau if scale else tau / chance, 0.0)
        kept.append(tau)
    return torch.stack(kept)


def _chances(delta: Tensor, trim: Trim, i: int) -> Tensor:
    """The chance of each number: (n,), or one for all."""
    if trim.spread is None:
        return torch.tensor(trim.odds[i], device=delta.device)
    rows = delta.abs().view(-1, trim.columns)
    order = rows.argsort(dim=1, stable=True)
    steps = torch.arange(trim.columns, device=delta.device).float()
    share = steps / max(1, trim.columns - 1) if trim.columns > 1 else steps + 0.5
    low, span = trim.odds[i] - trim.spread[i], 2 * trim.spread[i]
    ranked = torch.empty_like(rows)
    ranked.scatter_(1, order, (float(low) + share * float(span)).expand_as(rows))
    return ranked.flatten()


def _summed(terms: list[Tensor]) -> Tensor:
    """In order, as the kernels add: floating sums depend on it."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _rounded(merged: Tensor, rounding: Rounding, start: int) -> Tensor:
    if not rounding.stochastic:
        return merged.to(_TYPES[rounding.kind])
    u = uniform(rounding.key, start, len(merged))
    bits = merged.view(torch.int32).long()
    if rounding.kind == codec.BFLOAT16:
        half = ((bits & 0xFFFFFFFF) + (u * 65536).long()) >> 16
        return half.to(torch.int32).to(torch.int16).view(torch.bfloat16)
    if rounding.kind == codec.FLOAT16:
        magnitude, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
        small = torch.floor(merged.abs().double() * 2.0**24 + u).long()
        large = (magnitude + (u * 8192).long() - 0x38000000) >> 13
        code = torch.where(magnitude < 0x38800000, small, large) | sign
        return code.to(torch.int32).to(torch.int16).view(torch.float16)
    return merged


def _bytes(stored: Tensor) -> np.ndarray:
    return stored.contiguous().view(torch.uint8).cpu().numpy()
