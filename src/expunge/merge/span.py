"""Methods whose result lies in the span of the models: coefficients from inner products alone.

Dimensions: M vectors x_i (weights, or deltas from the base), G (M, M) their inner products,
c (M,) the coefficients of the result Σ c_i x_i. One pass over the weights makes G, one applies c.
nuslerp and model_stock also take G (…, M, M), for rows or columns each by itself.
"""

import math
from itertools import combinations

import numpy as np

from expunge.errors import MergeError
from expunge.merge.trim import Settings


def linear(gram: np.ndarray, settings: Settings) -> np.ndarray:
    """Weighted sum, or mean.

        c_i = w_i,   or w_i / Σ_j w_j with `normalize`

    Source: model soups, arXiv:2203.05482.
    """
    weights = np.array(settings.weights)
    if not settings.options["normalize"]:
        return weights
    total = weights.sum()
    if abs(total) < 1e-8:
        raise MergeError(f"{settings.name}: the weights sum to 0, so no mean can be taken")
    return weights / total


def passthrough(gram: np.ndarray, settings: Settings) -> np.ndarray:
    """One model's tensor, times `scale`.

        c = scale

    Source: mergekit.
    """
    (scale,) = settings.options["scale"]
    return np.array([1.0 if scale is None else scale])


def slerp(gram: np.ndarray, settings: Settings) -> np.ndarray:
    """Along the arc from the base to the model, by the share t of its angle.

        c = (sin((1-t)θ), sin(tθ)) / sin θ,   cos θ = x_0·x_1 / |x_0||x_1|

    Straight where the two are nearly parallel (|cos θ| > 0.9995).

    Source: Shoemake 1985; threshold as mergekit's.
    """
    t = settings.options["t"]
    return _arc(gram, t, straight=0.9995)


def nuslerp(gram: np.ndarray, settings: Settings) -> np.ndarray:
    """Along the arc between two models, or between their deltas where a base is given.

        c as in slerp, t = w_1 / (w_0 + w_1)

    Source: mergekit.
    Differs: cosines in float64.
    """
    total = sum(settings.weights)
    t = 0.5 if abs(total) < 1e-6 else settings.weights[1] / total
    return _arc(gram, t, straight=math.sqrt(1 - 1e-14))


def multislerp(gram: np.ndarray, settings: Settings) -> np.ndarray:
    """Barycentre on the sphere: a step from the mean direction within its tangent plane.

        u_i = x_i/|x_i|,  m = Σ w u / |Σ w u|,  v = Σ w_i (u_i - (u_i·m) m)
        result = (Σ w_i |x_i|) (m cos|v| + v sin|v| / |v|)

    v is zero up to rounding, since Σ w u is parallel to m: the result is the mean direction at the
    mean length.

    Source: mergekit.
    """
    weights = np.array(settings.weights)
    if len(weights) == 1:
        return np.ones(1)
    if settings.options["normalize_weights"]:
        weights = weights / weights.sum()
    eps = settings.options["eps"]
    lengths = _lengths(gram)
    units = gram / np.outer(lengths + eps, lengths + eps)
    length = math.sqrt(max(0.0, weights @ units @ weights))
    if length < eps:
        if len(weights) == 2 or not lengths.any():
            return weights
        raise MergeError(f"{settings.name}: the weighted directions cancel; change the weights")
    mean = weights / length  # in terms of the u_i, as all below
    tangent = weights - (weights @ units @ mean) * mean
    step = math.sqrt(max(0.0, tangent @ units @ tangent)) + eps
    moved = math.cos(step) * mean + math.sin(step) / step * tangent
    return moved * (lengths @ weights) / (lengths + eps)


def karcher(gram: np.ndarray, settings: Settings) -> np.ndarray:
    """The point of the sphere with the least sum of squared angles to the models.

        m ← exp_m( 1/M Σ log_m(u_i) )   until the step is below `tol`;   times the mean length

    Source: Karcher 1977; mergekit, arXiv:2603.04972.
    Differs: iterates on inner products in float64; mergekit on the tensors in float32.
    """
    lengths = _lengths(gram)
    tol = settings.options["tol"]
    if len(lengths) == 1:
        return np.ones(1)
    valid = lengths > tol
    if not valid.any():
        return np.zeros_like(lengths)
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=valid)
    units = gram * np.outer(inverse, inverse)
    share = valid / valid.sum()
    mean = share / math.sqrt(max(share @ units @ share, 1e-300))
    if share @ units @ share < tol * tol:
        mean = np.eye(len(lengths))[np.argmax(valid)]
    for _ in range(int(settings.options["max_iter"])):
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        far = valid & (angles >= tol)
        pull = np.divide(angles, np.sin(angles), out=np.zeros_like(angles), where=far) * share
        tangent = pull - (pull @ cosines) * mean
        step = math.sqrt(max(0.0, tangent @ units @ tangent))
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / math.sqrt(mean @ units @ mean)
    return mean * inverse * lengths.mean()


def model_stock(gram: np.ndarray, settings: Settings) -> np.ndarray:
    """From the base toward the models' mean, the further the more they agree.

        c_i = t/M,   t = M cos θ / (1 + (M-1) cos θ),   cos θ the mean cosine of two deltas

    Source: arXiv:2403.19522.
    """
    lengths = _lengths(gram)  # (…, M)
    count = gram.shape[-1]
    cosines = [
        np.clip(gram[..., i, j] / np.maximum(lengths[..., i] * lengths[..., j], 1e-6), -1, 1)
        for i, j in combinations(range(count), 2)
    ]
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    safe = np.where(abs(divisor) < 1e-6, 1, divisor)
    t = np.where(abs(divisor) < 1e-6, 0, count * cosine / safe)
    return np.stack([t / count] * count, -1)


def _arc(gram: np.ndarray, t: float, *, straight: float) -> np.ndarray:
    """Coefficients along the arc between two vectors: (…, 2)."""
    lengths = _lengths(gram)
    lengths = np.where(lengths > 1e-8, lengths, 1)
    cosine = np.clip(gram[..., 0, 1] / (lengths[..., 0] * lengths[..., 1]), -1, 1)
    angle = np.arccos(np.where(abs(cosine) > straight, 0, cosine))
    arc = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)], -1) / np.sin(angle)[..., None]
    return np.where((abs(cosine) > straight)[..., None], np.array([1 - t, t]), arc)


def _lengths(gram: np.ndarray) -> np.ndarray:
    return np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
