"""The story that results tell: which two models are compared, and how a half fared."""

from statistics import fmean

from expunge.report.results import Results, Semeval


def mean_term(semeval: Semeval, half: str, kind: str) -> float | None:
    """Mean of the measured terms of one half and kind over the tasks; null if there is none."""
    values = [
        value
        for term, value in semeval.terms.items()
        if value is not None and term.startswith(f"{half}/") and term.endswith(f"/{kind}")
    ]
    return fmean(values) if values else None


def models_compared(results: Results) -> tuple[str, str] | None:
    """The model before and the one after (calibrated, merged, or last), if there are both."""
    before = next((name for name in ("target", "original") if name in results.models), None)
    later = [name for name in results.measured_models() if name not in ("original", "target")]
    best = [name for name in ("calibrated", "merged") if name in later] or later[-1:]
    return (before, best[0]) if before and best else None
