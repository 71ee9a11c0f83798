"""Texts as vectors: tf-idf of words or of runs of letters, by scikit-learn."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from expunge.errors import EvaluationError

Unit = Literal["word", "letters"]
_UNITS: dict[Unit, dict[str, Any]] = {
    "word": {"analyzer": "word", "token_pattern": r"(?u)\b\w+\b"},
    "letters": {"analyzer": "char_wb", "ngram_range": (2, 4)},
}


def vectors(texts: Sequence[str], unit: Unit) -> Any:
    """A sparse row of length 1 for each text (0 of a text without any unit): tf · idf,

        tf = 1 + ln count,   idf = 1 + ln((1 + n) / (1 + n_with)),   over the n texts given

    Source: Salton and Buckley 1988, as scikit-learn's TfidfVectorizer smooths it.
    """
    _need()
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, **_UNITS[unit]).fit_transform(texts)


def nearest(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """The cosine of each text to the most similar of the others, in 0..1: (texts,)."""
    if not texts or not others:
        return np.zeros(len(texts))
    rows = vectors([*texts, *others], "word")
    return (rows[: len(texts)] @ rows[len(texts) :].T).max(1).toarray().ravel()


def groups_of(texts: Sequence[str], distance: float) -> list[int]:
    """The number of each text's group: average linkage of cosine distances, cut at `distance`.

    Numbers follow the order in which groups first appear, so the same texts give the same ones.

    Source: Sokal and Michener 1958 (average linkage).
    """
    if len(texts) < 2:
        return [0] * len(texts)
    _need()
    from sklearn.cluster import AgglomerativeClustering

    told: dict[str, Any] = {"n_clusters": None, "distance_threshold": distance}
    how = AgglomerativeClustering(metric="cosine", linkage="average", **told)
    labels = how.fit_predict(vectors(texts, "letters").toarray()).tolist()
    order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [order[label] for label in labels]


def _need() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise EvaluationError(
            "failures are looked at with scikit-learn: pip install 'expunge[analyse]'"
        ) from None
