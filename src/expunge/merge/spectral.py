"""Methods that need the whole matrix: shared bases by SVD, and closed forms from statistics.

Dimensions: M models, deltas (M, out, in) float32, r rank. Vectors and tensors of other shapes are
averaged with the weights. These hold one whole tensor of every model in memory.
"""

import torch
from torch import Tensor

from expunge.errors import MergeError
from expunge.merge.trim import Settings

Factors = list[tuple[Tensor, Tensor]] | None
"""(A, B) of each model where all of them are B A."""


def knots(deltas: Tensor, settings: Settings, factors: Factors) -> Tensor:
    """Merge by TIES in the basis that the models share, then go back.

        [δ_1 … δ_M] = U S [V_1 … V_M],   result = λ U · ties(S V_1, …, S V_M)

    Of LoRAs only the span of their B's is decomposed.

    Source: KnOTS, arXiv:2410.19735.
    Differs: trims each S V_i to `density`, elects by the sum, and takes the mean of those agreeing.
    """
    models, out, columns = deltas.shape
    side = deltas.permute(1, 0, 2).reshape(out, models * columns)
    span = torch.eye(out)
    if factors is not None:
        span = torch.linalg.qr(torch.cat([b for _, b in factors], 1)).Q  # (out, Σr)
    core = span.T @ side
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    strong = s > 1e-6 * s[0]  # directions of no strength would count as entries to trim
    u, s, vh = u[:, strong], s[strong], vh[strong]
    parts = (s[:, None] * vh).reshape(-1, models, columns).permute(1, 0, 2)  # (M, k, in)
    kept = torch.stack(
        [_largest(part, d) for part, d in zip(parts, settings.options["density"], strict=True)]
    )
    weighted = kept * torch.tensor(settings.weights).view(-1, 1, 1)
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agrees = kept * sign > 0
    merged = (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    return settings.options["lambda"] * (span @ (u @ merged))


def tsv(deltas: Tensor, settings: Settings, factors: Factors) -> Tensor:
    """Keep each model's first singular directions and make those of all models orthogonal.

        δ_i ≈ U_i S_i V_iᵀ at rank r = min(out, in)/M,   U, V = [U_i], [V_i] made orthonormal
        result = λ U · diag(w_i S_i) · Vᵀ

    Source: TSV-Merge, arXiv:2412.00081.
    """
    models, out, columns = deltas.shape
    rank = max(1, min(out, columns) // models)
    us, ss, vs = [], [], []
    for number, weight in enumerate(settings.weights):
        u, s, vh = _svd(deltas[number], factors[number] if factors else None)
        kept = slice(0, min(rank, int((s > 1e-6 * s[0]).sum())))  # no direction of no strength
        us.append(u[:, kept])
        ss.append(weight * s[kept])
        vs.append(vh[kept])
    u, v = _orthonormal(torch.cat(us, 1)), _orthonormal(torch.cat(vs).T)
    return settings.options["lambda"] * (u * torch.cat(ss)) @ v.T


def regmean(deltas: Tensor, settings: Settings, statistics: list[Tensor]) -> Tensor:
    """The linear map nearest to every model's on that model's own inputs; EUL's fusion.

        result = (Σ w_i δ_i G_i) (Σ w_i G_i)⁻¹,   G_i = X_iᵀX_i (in, in), shrunk off its diagonal

    Source: RegMean, arXiv:2212.09849; EUL, arXiv:2310.20150.
    """
    columns = deltas.shape[-1]
    total, mixed = torch.zeros(columns, columns), torch.zeros_like(deltas[0])
    for delta, weight, gram in zip(deltas, settings.weights, statistics, strict=True):
        if gram.shape != (columns, columns):
            raise MergeError(
                f"{settings.name}: its Gram matrix is {tuple(gram.shape)}, not {columns} square"
            )
        kept = settings.options["shrink"]
        gram = kept * gram + (1 - kept) * torch.diag(torch.diag(gram))
        total += weight * gram
        mixed += weight * delta @ gram
    ridge = 1e-6 * float(torch.diag(total).mean()) + 1e-12
    return torch.linalg.solve(total + ridge * torch.eye(columns), mixed.T).T


def fisher(deltas: Tensor, settings: Settings, statistics: list[Tensor]) -> Tensor:
    """Mean of the weights, each as sure as its model is of it.

        result = Σ w_i F_i δ_i / Σ w_i F_i

    Where no model knows anything (every F_i is 0), as if all were equally sure.

    Source: Fisher-weighted averaging, arXiv:2111.09832.
    """
    for found in statistics:
        if found.shape != deltas.shape[1:]:
            raise MergeError(f"{settings.name}: its Fisher information is {tuple(found.shape)}")
    weights = torch.tensor(settings.weights).view(-1, *[1] * (deltas.dim() - 1))
    sure = weights * torch.stack(statistics)
    sure = torch.where(sure.sum(0) == 0, weights, sure)
    total = sure.sum(0)
    if (total == 0).any():
        raise MergeError(f"{settings.name}: the weights sum to 0, so no mean can be taken")
    return (sure * deltas).sum(0) / total


def mean(deltas: Tensor, settings: Settings) -> Tensor:
    """What is not a matrix: 1/M Σ w_i δ_i."""
    weights = torch.tensor(settings.weights).view(-1, *[1] * (deltas.dim() - 1))
    return (weights * deltas).mean(0)


def truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product B A of the given rank (Frobenius): A (r, in), B (out, r).

    The eigenvectors of the smaller Gram matrix span what an SVD would keep, at a small part of
    its cost; in float64, so that squaring costs no accuracy that float32 could show.

    Source: Eckart and Young 1936.
    """
    if delta.shape[0] > delta.shape[1]:
        b, a = truncated(delta.T, rank)
        return a.T, b.T
    wide = delta.double()
    u = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]  # (out, r)
    return (u.T @ wide).to(delta.dtype), u.to(delta.dtype)


def truncated_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As `truncated`, of B A given by its factors, without forming it: A (k, in), B (out, k).

    B = Q_b R_b, Aᵀ = Q_a R_a; the SVD of the small R_b R_aᵀ is that of B A between the Q's.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s[:rank].sqrt()
    return ((root[:, None] * vh[:rank]) @ qa.T).to(a.dtype), ((qb @ u[:, :rank]) * root).to(b.dtype)


def _svd(delta: Tensor, factors: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of a delta, or of its factors' product without forming it."""
    if factors is None:
        return torch.linalg.svd(delta, full_matrices=False)
    a, b = factors
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return qb @ u, s, vh @ qa.T


def _largest(values: Tensor, density: float) -> Tensor:
    """The density · n entries of greatest magnitude."""
    keep = max(1, int(density * values.numel()))
    if keep >= values.numel():
        return values
    bound = values.abs().flatten().kthvalue(values.numel() - keep + 1).values
    return torch.where(values.abs() >= bound, values, 0.0)


def _orthonormal(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (Procrustes)."""
    u, _, vh = torch.linalg.svd(columns, full_matrices=False)
    return u @ vh
