"""One table, models across and measures down: for a terminal, for Markdown, and for the page."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from expunge.report.results import TERMS, Interval, ModelResults, Results

NOT_MEASURED = "–"
COLLAPSED = "COLLAPSED"
FAILED = "FAILED"
GAP = 2
"""Between two columns on a terminal."""


@dataclass(frozen=True)
class Line:
    """One measure over all models."""

    label: str
    """What is measured; an arrow says which way is better."""

    cells: tuple[str, ...]
    """One text for each model."""

    section: bool = False
    """The first line of a new block."""


def column_names(results: Results) -> list[str]:
    """The measured models in the order of the story; the target is the state before."""
    return ["before" if name == "target" else name for name in results.measured_models()]


def lines(results: Results, *, intervals: bool = False) -> list[Line]:
    """Every measure that the run knows, as text; what was not measured is a dash.

    A term's label counts its items, where all models were asked as many; with `intervals` its
    values have theirs. None where no model was measured.
    """
    models = list(results.measured_models().values())
    if not models:
        return []
    sample = _common_sample(models)

    def line(label: str, cell: Callable[[ModelResults], str], section: bool = False) -> Line:
        return Line(label, tuple(cell(model) for model in models), section)

    def known(label: str, cell: Callable[[ModelResults], str]) -> list[Line]:
        made = line(label, cell)
        return [] if {*made.cells} == {NOT_MEASURED} else [made]

    return [
        *(
            line(
                f"{term_label(term)}{_asked(models, term)}",
                lambda model, term=term: _term(model, term, intervals),
                number == 0,
            )
            for number, term in enumerate(terms_in(results))
        ),
        line("task aggregate ↑", _aggregate, True),
        *known("task aggregate interval", _aggregate_interval),
        line("MIA AUC → 0.5", lambda model: number(model.semeval.mia and model.semeval.mia.auc)),
        line("MIA AUC interval", _mia_interval),
        *known("MIA two-sided → 0.5", lambda m: number(m.semeval.mia and m.semeval.mia.two_sided)),
        *known(
            "MIA KS distance ↓", lambda model: number(model.semeval.mia and model.semeval.mia.ks)
        ),
        *known("comes back when relearned ↓", lambda m: _relearned(m, "recovered")),
        *known("left when relearned → 0", lambda m: _relearned(m, "left")),
        line("MIA score ↑", lambda model: number(model.semeval.mia and model.semeval.mia.score)),
        line(f"MMLU ↑{f' (n={sample})' if sample else ''}", lambda m: _mmlu(m, sample)),
        *known("MMLU interval", lambda model: _ends(model.semeval.interval("mmlu"))),
        line("final ↑", final_cell),
        *known("final interval", _final_interval),
        *(
            line(label, lambda model, pick=pick: number(pick(model)), position == 0)
            for position, (label, pick) in enumerate(_side_measures(results))
        ),
    ]


def results_tables(results: Results, width: int) -> list[Table]:
    """The table for a terminal of `width` columns: as many side by side as fit, the rest below."""
    names, found = column_names(results), lines(results)
    if not found:
        return []
    widths = [
        max(len(name), *(len(line.cells[place]) for line in found)) + GAP
        for place, name in enumerate(names)
    ]
    groups = packed(widths, width - max(len(line.label) for line in found) - GAP)
    title = f"{results.recipe}, seed {results.seed}"
    return [_table(title, [names[p] for p in group], found, group) for group in groups]


def packed(widths: Sequence[int], room: int) -> list[list[int]]:
    """Places of columns that are so wide: as many side by side as fit, the rest below."""
    groups: list[list[int]] = [[]]
    for place, wide in enumerate(widths):
        if groups[-1] and sum(widths[p] for p in groups[-1]) + wide > room:
            groups.append([])
        groups[-1].append(place)
    return groups


def _table(title: str, names: list[str], found: list[Line], places: list[int]) -> Table:
    table = Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(Text(name), justify="right")
    for line in found:
        if line.section and table.rows:
            table.add_section()
        shown = [line.cells[place] for place in places]
        cells = [Text(c, style="bold red" if c == COLLAPSED else "") for c in shown]
        table.add_row(Text(line.label), *cells)
    return table


def markdown_table(results: Results) -> str:
    """The same table as Markdown; no text where nothing was measured."""
    if not results.measured_models():
        return ""
    body = [
        [line.label, *(f"**{c}**" if c == COLLAPSED else c for c in line.cells)]
        for line in lines(results, intervals=True)
    ]
    return markdown(["", *column_names(results)], body)


def markdown(header: list[str], body: list[list[str]], *, text_columns: int = 1) -> str:
    """A Markdown table: the first `text_columns` to the left, the others to the right."""
    rule = ["---" if place < text_columns else "---:" for place in range(len(header))]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |\n"
        for row in [header, rule, *body]
    )


def number(value: float | None, digits: int = 3) -> str:
    """A number as text, or the dash that stands for not measured."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def final_cell(model: ModelResults) -> str:
    """The final score, or COLLAPSED in its place: a destroyed model has no score."""
    return COLLAPSED if model.collapse.collapsed else number(model.semeval.final)


def term_label(term: str) -> str:
    """`forget/Task1/sc` in words, with the arrow that says which way is better."""
    half = term.partition("/")[0]
    return f"{half} {term_words(term)} {'↓' if half == 'forget' else '↑'}"


def term_words(term: str) -> str:
    """The same without its half: `Task1 completion`."""
    _, task, kind = [*term.split("/"), "", ""][:3]
    return f"{task} {({'sc': 'completion', 'qa': 'knowledge'}).get(kind, kind)}"


def terms_in(results: Results) -> list[str]:
    """The twelve official terms, or those of the sets' own tasks where no model has any of these;
    then any other."""
    found = dict.fromkeys(t for model in results.models.values() for t in model.semeval.terms)
    official = () if found and not found.keys() & set(TERMS) else TERMS
    return [*official, *sorted(found.keys() - set(TERMS))]


def _term(model: ModelResults, term: str, intervals: bool = False) -> str:
    text, interval = number(model.semeval.terms.get(term)), model.semeval.intervals.get(term)
    return f"{text} ({_ends(interval)})" if intervals and interval is not None else text


def _asked(models: Sequence[ModelResults], term: str) -> str:
    counts = {model.semeval.counts.get(term) for model in models}
    count = counts.pop() if len(counts) == 1 else None
    return f" (n={count})" if count else ""


def _aggregate(model: ModelResults) -> str:
    if model.collapse.collapsed:
        return COLLAPSED
    text = number(model.semeval.task_aggregate)
    return f"{text} (partial)" if model.semeval.partial and text != NOT_MEASURED else text


def _mia_interval(model: ModelResults) -> str:
    mia = model.semeval.mia
    if mia is None or mia.low is None or mia.high is None:
        return NOT_MEASURED
    return f"{mia.low:.2f}–{mia.high:.2f}"


def _relearned(model: ModelResults, name: str) -> str:
    value, interval = (getattr(model.relearn, n, None) for n in (name, f"{name}_interval"))
    return number(value) + (f" ({interval.low:.2f} to {interval.high:.2f})" if interval else "")


def _aggregate_interval(model: ModelResults) -> str:
    if model.collapse.collapsed:
        return NOT_MEASURED
    return _ends(model.semeval.intervals.get("task_aggregate"))


def _final_interval(model: ModelResults) -> str:
    return NOT_MEASURED if model.collapse.collapsed else _ends(model.semeval.interval("final"))


def _ends(interval: Interval | None) -> str:
    return NOT_MEASURED if interval is None else f"{interval.low:.2f}–{interval.high:.2f}"


def _common_sample(models: list[ModelResults]) -> int | None:
    """How many questions every model was asked, where that is one sample."""
    found = [m.semeval.mmlu for m in models if m.semeval.mmlu is not None]
    counts = {mmlu.n if mmlu.sampled else None for mmlu in found}
    return counts.pop() if len(counts) == 1 else None


def _mmlu(model: ModelResults, sample: int | None) -> str:
    mmlu = model.semeval.mmlu
    if mmlu is None or mmlu.accuracy is None:
        return NOT_MEASURED
    own = mmlu.sampled and mmlu.n != sample
    return number(mmlu.accuracy) + (f" (n={mmlu.n})" if own else "")


def _side_measures(
    results: Results,
) -> Iterator[tuple[str, Callable[[ModelResults], float | None]]]:
    """The likelihoods, then whatever numbers the collapse verdict rests on."""
    models = results.models.values()
    for name in ("members", "nonmembers", "neutral", "forget", "retain"):
        if any(getattr(model.nll, name) is not None for model in models):
            yield f"NLL {name}", lambda model, name=name: getattr(model.nll, name)
    measures = {
        name: None
        for model in models
        for name, value in (model.collapse.model_extra or {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    for name in measures:
        yield name.replace("_", " "), lambda model, name=name: _measure(model, name)


def _measure(model: ModelResults, name: str) -> float | None:
    value = (model.collapse.model_extra or {}).get(name)
    return value if isinstance(value, int | float) else None
