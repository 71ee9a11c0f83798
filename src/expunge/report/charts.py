"""The charts of a report, as Vega-Lite: the same for the page, which draws them, and for files."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from expunge.evaluate.compare import Comparison
from expunge.evaluate.leaks import document_of
from expunge.report.pieces import Cell, Figure, Material, Table
from expunge.report.results import HALVES, ModelResults
from expunge.report.story import mean_term, models_compared
from expunge.report.tables import term_words

DOCUMENTS_DRAWN = 300
"""Documents of each half and model in a chart of losses, evenly spread; the table has all."""

BEFORE, AFTER = "#8a8f98", "#3b74e6"
OTHERS = ("#c9822b", "#4f9d69", "#a667b5", "#b5524a", "#3aa0ab", "#8d7a3f", "#5c6bc0", "#c2628f")
"""Colours that keep their contrast on white and on near-black."""

Rows = Sequence[dict[str, Any]]

_SHARE, _FEW = {"domain": [0, 1], "padding": 10}, {"tickCount": 5}


def figures(material: Material) -> list[Figure]:
    """Every chart that the results have numbers for."""
    made = (_terms(material), _halves(material), _membership(material), _losses(material))
    return [figure for figure in made if figure is not None]


def by_name(field: str) -> Any:
    """A colour for each name of a field, the key below the chart, where no width cuts it."""
    import altair as alt

    scale = alt.Scale(range=[AFTER, *OTHERS])
    return alt.Color(f"{field}:N", scale=scale, legend=alt.Legend(title=None, orient="bottom"))


def whole_numbers(rows: Rows, field: str) -> Any:
    """An axis of what is counted (steps, epochs, blocks): at most ten ticks, all whole."""
    import altair as alt

    last = max((int(row[field]) for row in rows), default=0)
    step = next(s for k in range(12) for s in (10**k, 2 * 10**k, 5 * 10**k) if last < 10 * s)
    return alt.Axis(values=list(range(0, last + 1, step)), format="d")


def steps_figure(name: str, title: str, caption: str, rows: Rows) -> Figure:
    """Lines over training steps, one for each measure: rows of step, measure, value."""
    import altair as alt

    chart = (
        alt.Chart(_data(rows), width=520, height=240)
        .mark_line(point=True)
        .encode(
            x=alt.X("step:Q", title="step", axis=whole_numbers(rows, "step")),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=by_name("measure"),
            tooltip=_tooltip("measure:N", "step:Q", "value:Q"),
        )
        .interactive()
    )
    return Figure(title, caption, chart.to_dict(), rows_table(name, caption, rows))


def differences_figure(name: str, found: Comparison) -> Figure | None:
    """Each difference with its interval beside 0; those that are only noise are pale."""
    import altair as alt

    rows = [
        {
            "number": one.name,
            "difference": one.difference,
            "low": one.low,
            "high": one.high,
            "says": "noise" if one.within_noise else "differs",
        }
        for one in found.differences
        if one.within_noise is not None
    ]
    if not rows:
        return None
    base = alt.Chart().encode(
        y=alt.Y("number:N", title=None, sort=None),
        color=alt.Color(
            "says:N",
            scale=alt.Scale(domain=["differs", "noise"], range=[AFTER, BEFORE]),
            legend=alt.Legend(title=None, orient="bottom"),
        ),
        tooltip=_tooltip("number:N", "difference:Q", "low:Q", "high:Q", "says:N"),
    )
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeDash=[4, 4], color=BEFORE)
    value = alt.X("difference:Q", title="B - A")
    chart = alt.layer(
        zero.encode(x="zero:Q"),
        base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q"),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=value),
        data=_data(rows),
    ).properties(width=460, height=alt.Step(18))
    caption = "B - A of each number, with its 95 % interval."
    return Figure("Differences", caption, chart.to_dict(), rows_table(name, caption, rows))


def _terms(material: Material) -> Figure | None:
    """The twelve terms of every model, with their intervals."""
    import altair as alt

    rows = [
        {
            "model": name,
            "half": term.partition("/")[0],
            "term": term_words(term),
            "value": value,
            "low": None if interval is None else interval.low,
            "high": None if interval is None else interval.high,
            "items": model.semeval.counts.get(term),
        }
        for name, model in material.results.ordered_models().items()
        for term, value in model.semeval.terms.items()
        if value is not None
        for interval in (model.semeval.intervals.get(term),)
    ]
    if not rows:
        return None
    chosen = alt.selection_point(fields=["model"], bind="legend")
    base = alt.Chart().encode(
        y=alt.Y("term:N", title=None),
        yOffset=alt.YOffset("model:N", sort=_names(material)),
        color=_by_model(material),
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.12)),
        tooltip=_tooltip("model:N", "term:N", "value:Q", "low:Q", "high:Q", "items:Q"),
    )
    share = alt.X("value:Q", title="mean score", scale=_SHARE, axis=_FEW)
    rules = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    points = base.mark_point(filled=True, size=60).encode(x=share).add_params(chosen)
    sides = alt.Header(title=None, labelFontSize=13, labelFontWeight="bold")
    chart = (
        alt.layer(rules, points, data=_data(rows))
        .properties(width=310, height=360)
        .facet(column=alt.Column("half:N", header=sides))
    )
    caption = (
        "Mean score of each term, with its 95 % interval: low is forgotten, high is kept. "
        "A click on a model in the key brings it out."
    )
    return Figure(
        "Terms by model", caption, chart.to_dict(), rows_table("terms-by-model", caption, rows)
    )


def _halves(material: Material) -> Figure | None:
    """What is left of the forget half against what is left of the retain half."""
    import altair as alt

    rows = [
        {"model": name, "forget": forget, "retain": retain}
        for name, model in material.results.ordered_models().items()
        for forget, retain in [(_half(model, "forget"), _half(model, "retain"))]
        if forget is not None and retain is not None
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(_data(rows), width=400, height=320)
        .mark_point(filled=True, size=160, opacity=1)
        .encode(
            x=alt.X("forget:Q", title="forget half: still said", scale=_SHARE, axis=_FEW),
            y=alt.Y("retain:Q", title="retain half: still said", scale=_SHARE, axis=_FEW),
            color=_by_model(material),
            shape=alt.Shape("model:N", sort=_names(material), legend=None),
            tooltip=_tooltip("model:N", "forget:Q", "retain:Q"),
        )
        .interactive()
    )
    caption = "Mean of the terms of each half. Top left is the aim: forgotten, and kept."
    return Figure(
        "Forgetting against keeping", caption, chart.to_dict(), rows_table("halves", "", rows)
    )


def _membership(material: Material) -> Figure | None:
    """The AUC of each model beside 0.5."""
    import altair as alt

    rows = [
        {"model": name, "AUC": mia.auc, "low": mia.low, "high": mia.high, "documents": mia.n}
        for name, model in material.results.ordered_models().items()
        if (mia := model.semeval.mia) is not None and mia.auc is not None
    ]
    if not rows:
        return None
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("model:N", title=None, sort=_names(material)),
        color=_by_model(material, legend=False),
        tooltip=_tooltip("model:N", "AUC:Q", "low:Q", "high:Q", "documents:Q"),
    )
    guess = alt.Chart(alt.Data(values=[{"AUC": 0.5}])).mark_rule(strokeDash=[4, 4], color=BEFORE)
    chart = alt.layer(
        guess.encode(x="AUC:Q"),
        base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q"),
        base.mark_point(filled=True, size=90).encode(
            x=alt.X("AUC:Q", title="AUC of the membership attack", scale=_SHARE, axis=_FEW)
        ),
    ).properties(width=400, height=alt.Step(34))
    caption = (
        "Can an outsider tell the forgotten documents by their loss? 0.5 (dashed) is guessing; "
        "towards 1 they are remembered, towards 0 they were pushed too far."
    )
    return Figure("Membership", caption, chart.to_dict(), rows_table("membership", caption, rows))


def _losses(material: Material) -> Figure | None:
    """The loss of every document under the models before and after."""
    import altair as alt

    names = models_compared(material.results) or ()
    found: dict[tuple[str, str, str], list[float]] = {}
    for model in names:
        for row in material.items.get(model, ()):
            if row.get("nll") is not None:
                found.setdefault((model, row["half"], document_of(row)), []).append(row["nll"])
    rows = [
        {"model": model, "half": half, "document": document, "NLL": fmean(values)}
        for (model, half, document), values in found.items()
    ]
    if not rows:
        return None
    sides = [[r for r in rows if (r["model"], r["half"]) == s] for s in _pairs(names)]
    drawn = [row for side in sides for row in side[:: -(-len(side) // DOCUMENTS_DRAWN) or 1]]
    chart = (
        alt.Chart(_data(drawn), width=520, height=alt.Step(40))
        .mark_tick(thickness=2, opacity=0.6)
        .encode(
            x=alt.X("NLL:Q", title="mean NLL, nats a token"),
            y=alt.Y("model:N", title=None, sort=_names(material)),
            row=alt.Row("half:N", title=None, header=alt.Header(orient="left", labelAngle=0)),
            color=_by_model(material, legend=False),
            tooltip=_tooltip("document:N", "half:N", "model:N", "NLL:Q"),
        )
    )
    caption = "One line for each document: how unlikely its answers are, before and after."
    if len(drawn) < len(rows):
        caption += f" {len(drawn)} of {len(rows)} are drawn, evenly spread; the table has all."
    return Figure(
        "Losses by document", caption, chart.to_dict(), rows_table("losses", caption, rows)
    )


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, half) for name in names for half in HALVES]


def _half(model: ModelResults, half: str) -> float | None:
    means = [mean_term(model.semeval, half, kind) for kind in ("sc", "qa")]
    known = [mean for mean in means if mean is not None]
    return fmean(known) if known else None


def _names(material: Material) -> list[str]:
    """The models that were scored; a colour for each, the same in every chart."""
    models = material.results.ordered_models()
    return [name for name, model in models.items() if model.semeval.terms]


def _by_model(material: Material, *, legend: bool = True) -> Any:
    """One colour for a model in every chart: grey before, the accent for the one judged."""
    import altair as alt

    names = _names(material)
    judged = (models_compared(material.results) or ("", ""))[1]
    rest = iter(OTHERS * len(names))
    colours = {"original": "#b3b7bd", "target": BEFORE, judged: AFTER}
    scale = alt.Scale(domain=names, range=[colours.get(name) or next(rest) for name in names])
    shown = alt.Legend(title=None, orient="bottom", symbolOpacity=1) if legend else None
    return alt.Color("model:N", scale=scale, sort=names, legend=shown)


def _tooltip(*fields: str) -> list[Any]:
    import altair as alt

    return [alt.Tooltip(f, format=".3~f") if f.endswith(":Q") else alt.Tooltip(f) for f in fields]


def _data(rows: Rows) -> Any:
    import altair as alt

    return alt.Data(values=list(rows))


def rows_table(name: str, caption: str, rows: Rows) -> Table:
    """Rows of like fields as a table."""
    header = tuple(rows[0])
    cells: list[tuple[Cell, ...]] = [tuple(row.values()) for row in rows]
    return Table(name, caption, header, cells)
