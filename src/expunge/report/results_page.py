"""docs/results.md: the measured rows by board, beside the figures of the papers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from expunge.report.commits import joined
from expunge.report.results import story_order
from expunge.report.tables import COLLAPSED, NOT_MEASURED, markdown, number

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PaperRow:
    """A published figure; what the paper does not give is null."""

    source: str
    """Which paper."""

    system: str
    """What the paper calls it."""

    model: str
    """The language model."""

    ours: tuple[str, ...] = ()
    """Names of our systems that stand for the same thing."""

    final: float | None = None
    task_aggregate: float | None = None
    mia_score: float | None = None
    mia_auc: float | None = None
    mmlu: float | None = None


_ZJUKLAB, _CYBER = "ZJUKLAB (SemEval-2025 Task 4)", "Cyber for AI (SemEval-2025 Task 4)"

PAPER_ROWS = (
    PaperRow(_ZJUKLAB, "strong, local", "OLMo-7B", ("strong",), 0.481, 0.968, 0.045, 0.022, 0.431),
    PaperRow(_ZJUKLAB, "weak, local", "OLMo-7B", ("weak",), 0.504, 0.659, 0.364, 0.818, 0.491),
    PaperRow(
        _ZJUKLAB, "TIES, local", "OLMo-7B", ("merged", "ties"), 0.806, 0.939, 0.997, 0.501, 0.480
    ),
    PaperRow(_ZJUKLAB, "TIES, official test", "OLMo-7B", (), 0.487, 0.944, 0.048, None, 0.471),
    PaperRow(_ZJUKLAB, "linear, local", "OLMo-7B", ("linear",), 0.244),
    PaperRow(_ZJUKLAB, "DARE-linear, local", "OLMo-7B", ("dare_linear",), 0.440),
    PaperRow(_ZJUKLAB, "magnitude prune, local", "OLMo-7B", ("magnitude_prune",), 0.558),
    PaperRow(_ZJUKLAB, "DARE-TIES, local", "OLMo-7B", ("dare_ties",), 0.561),
    PaperRow(_CYBER, "official test", "OLMo-7B", (), 0.409, 0.0, 0.999, None, 0.229),
    PaperRow(_CYBER, "official test", "OLMo-1B", (), 0.389, 0.0, 0.914, None, 0.251),
)

_HEAD = """\
<!-- Written by `make docs` from docs/results.json; edit neither by hand. -->
# Results

Each figure is the mean over the seeds ± their standard deviation; behind a task aggregate and an
AUC stands the 95 % [bootstrap interval], the outermost ends over the seeds. MIA score =
1 - 2 |AUC - 0.5|; final = mean of task aggregate, MIA score and MMLU. COLLAPSED stands in place of
the final score of a model that no longer writes language, whatever it scored; a seed on which a
system collapses is in no mean of task aggregate and final score. A partial aggregate is over fewer
than twelve terms. A board's test documents are those that no calibration looked at;
they are not new to whoever designed the branches, who saw figures of all documents on the way.
Two-sided AUC and KS distance are there the worst over the attacks, elsewhere the loss's; the MIA
score is the loss's, and other attacks may do better (lab notes). – means not measured. What was
tried on the way, and what follows from the figures, is in [lab_notes.md](lab_notes.md).
"""

_MEASURES = ("task_aggregate", "mia_score", "mia_auc", "mmlu", "final")
_MEANS = ("forget_sc", "forget_qa", "retain_sc", "retain_qa")


def results_page(rows: Sequence[Row], paper_rows: Iterable[PaperRow] = PAPER_ROWS) -> str:
    """The whole page; every row names its recipe, board, seeds and commit.

    What was not scored has no row.
    """
    papers = list(paper_rows)
    scored = [r for r in rows if any(r.get(m) is not None for m in (*_MEANS, *_MEASURES))]
    boards = list(dict.fromkeys(row["board"] for row in scored))
    parts = [_board(board, [r for r in scored if r["board"] == board], papers) for board in boards]
    return "\n".join([_HEAD, *(parts or ["Nothing measured yet.\n"]), _papers(papers)])


def _board(board: str, rows: list[Row], papers: list[PaperRow]) -> str:
    header = ["system", "seeds", "forget completion ↓", "forget knowledge ↓"]
    header += ["retain completion ↑", "retain knowledge ↑", "task aggregate ↑", "MIA score ↑"]
    header += ["MIA AUC → 0.5"]
    folded = any(row.get("ks") is not None for row in rows)
    header += ["two-sided AUC → 0.5", "KS distance ↓"] if folded else []
    header += ["MMLU ↑", "final ↑", "the paper's final", "recipe", "commit"]
    systems = story_order(dict.fromkeys(row["system"] for row in rows))
    body = [
        _system(name, [r for r in rows if r["system"] == name], papers, folded) for name in systems
    ]
    return f"## Board: {board}\n\n{markdown(header, body)}\n{_differences(rows, systems, papers)}"


def _differences(rows: list[Row], systems: list[str], papers: list[PaperRow]) -> str:
    """Measured beside published, wherever a system of this board stands for one of a paper's."""
    header = ["system", "the paper's", *(f"{m.replace('_', ' ')}: here / paper" for m in _MEASURES)]
    body, finals = [], []
    for name in systems:
        for paper in (paper for paper in papers if name in paper.ours):
            own = [row for row in rows if row["system"] == name]
            mine = {m: _mean(_counted(own, m), m) for m in _MEASURES}
            pairs = [f"{number(mine[m])} / {number(getattr(paper, m))}" for m in _MEASURES]
            body.append([name, f"{paper.system} ({paper.model})", *pairs])
            finals.append((name, mine["final"], paper.final))
    if not body:
        return ""
    parts = ["### Beside the papers\n", markdown(header, body, text_columns=2)]
    ranked = [(name, here, there) for name, here, there in finals if None not in (here, there)]
    for title, place in (("here", 1), ("in the paper", 2)):
        if len(ranked) > 1:
            order = sorted(ranked, key=lambda entry: -entry[place])  # pyright: ignore
            names = " > ".join(f"{e[0]} ({number(e[place])})" for e in order)  # pyright: ignore
            parts.append(f"By final score {title}: {names}.\n")
    return "\n".join(parts)


def _counted(rows: list[Row], measure: str) -> list[Row]:
    """The rows that a mean is taken of: of an aggregate not those of collapsed models."""
    if measure not in ("task_aggregate", "final"):
        return rows
    return [row for row in rows if not row.get("collapsed")]


def _mean(rows: list[Row], measure: str) -> float | None:
    values = [row[measure] for row in rows if row.get(measure) is not None]
    return fmean(values) if values else None


def _system(name: str, rows: list[Row], papers: list[PaperRow], folded: bool) -> list[str]:
    paper = next((paper.final for paper in papers if name in paper.ours), None)
    return [
        name,
        _listed(rows, "seed"),
        *(_spread(rows, measure) for measure in _MEANS),
        _aggregate(rows),
        _spread(rows, "mia_score"),
        _spread(rows, "mia_auc") + _interval(rows, "mia"),
        *((_spread(rows, "two_sided"), _spread(rows, "ks")) if folded else ()),
        _spread(rows, "mmlu") + _marked(rows, "mmlu_sampled", "sample"),
        _final(rows),
        number(paper),
        _listed(rows, "recipe"),
        joined(str(row["commit"]) for row in rows if row.get("commit")) or NOT_MEASURED,
    ]


def _spread(rows: list[Row], measure: str) -> str:
    """Mean ± standard deviation over the seeds that measured it, and how many if not all did."""
    values = [row[measure] for row in rows if row.get(measure) is not None]
    if not values:
        return NOT_MEASURED
    text = number(fmean(values))
    if len(values) > 1:
        text += f" ± {number(stdev(values))}"
    return text if len(values) == len(rows) else f"{text} ({len(values)} of {len(rows)} seeds)"


def _marked(rows: list[Row], field: str, word: str = "") -> str:
    """A word in brackets where any row has the flag `field`."""
    return f" ({word or field})" if any(row.get(field) for row in rows) else ""


def _interval(rows: list[Row], measure: str) -> str:
    """The bootstrap interval of a measure, its outermost ends over the seeds."""
    low, high = f"{measure}_low", f"{measure}_high"
    ends = [(row[low], row[high]) for row in rows if row.get(low) is not None]
    if not ends:
        return ""
    return f" [{min(low for low, _ in ends):.2f}, {max(high for _, high in ends):.2f}]"


def _aggregate(rows: list[Row]) -> str:
    own = _counted(rows, "task_aggregate")
    return _spread(own, "task_aggregate") + _interval(own, "task") + _marked(own, "partial")


def _final(rows: list[Row]) -> str:
    collapsed = sum(bool(row.get("collapsed")) for row in rows)
    if collapsed == len(rows):
        return f"**{COLLAPSED}**"
    return _spread(_counted(rows, "final"), "final") + (
        f" (**{COLLAPSED}** in {collapsed} of {len(rows)} seeds)" if collapsed else ""
    )


def _listed(rows: list[Row], field: str) -> str:
    """The different values of a field, in order."""
    values = dict.fromkeys(str(row[field]) for row in rows if row.get(field) is not None)
    return ", ".join(values) or NOT_MEASURED


def _papers(papers: list[PaperRow]) -> str:
    header = [
        "source",
        "system",
        "model",
        "task aggregate",
        "MIA score",
        "MIA AUC",
        "MMLU",
        "final",
    ]
    body = [
        [row.source, row.system, row.model, *(number(getattr(row, name)) for name in _MEASURES)]
        for row in papers
    ]
    note = "Taken over from the publications, not measured here; other models than ours.\n\n"
    return f"## What the papers report\n\n{note}{markdown(header, body, text_columns=3)}"
