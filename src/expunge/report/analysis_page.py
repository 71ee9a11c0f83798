"""The part of a report that shows analyses: courses of training, where edits lie, landscapes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from expunge import runs
from expunge.report.charts import BEFORE, OTHERS, by_name, rows_table, whole_numbers
from expunge.report.pieces import Figure, Material

Rows = Sequence[Mapping[str, Any]]


def analysis_figures(material: Material) -> Iterator[Figure]:
    """Every figure that the run folder's `analysis/` has numbers for."""
    for name, make in FIGURES.items():
        analysis, _, table = name.partition("/")
        rows = _rows(material, analysis, table)
        figure = make(rows, material) if rows else None
        if figure is not None:
            yield figure


def epochs(rows: Rows, material: Material) -> Figure:
    """Regurgitation and knowledge of either half over epochs, branch by branch."""
    measures = ("regurgitation", "knowledge", "completion_hits", "question_exact")
    told = _told(rows, measures, lambda row: row["task"] == "all", "half")
    caption = (
        "Regurgitation and knowledge over epochs, the mean of the tasks: generated where snapshots "
        "wrote, else first choices after the true tokens (completion_hits, question_exact)."
    )
    return _lines("trajectory-epochs", "Knowledge and regurgitation over epochs", caption, told)


def objectives(rows: Rows, material: Material) -> Figure:
    """Losses of either half and the distance to the target over epochs."""
    told = _told(rows, ("forget_nll", "retain_nll", "kl"), lambda row: True, None)
    caption = "Forget NLL, retain NLL and KL to the target over epochs, branch by branch."
    return _lines("trajectory-objectives", "Losses and distance over epochs", caption, told)


def places(rows: Rows, material: Material) -> Figure | None:
    """Where in the network each update lies, by block; None where none lies in a block."""
    import altair as alt

    told = [dict(row) for row in rows if row["scope"] == "block"]
    inside = [{**row, "place": int(row["place"])} for row in told if row["place"] != "outside"]
    if not inside:
        return None
    chart = (
        alt.Chart(alt.Data(values=inside), width=520, height=220)
        .mark_line(point=True)
        .encode(
            x=alt.X("place:Q", title="block", axis=whole_numbers(inside, "place")),
            y=alt.Y("norm:Q", title="norm of the update"),
            color=by_name("model"),
            tooltip=["model:N", "place:Q", "norm:Q", "share:Q"],
        )
        .interactive()
    )
    caption = "How much of each model's update lies in each block."
    table = rows_table("weights-blocks", caption, told)
    return Figure("Where the edit lives", caption, chart.to_dict(), table)


def landscape(rows: Rows, material: Material) -> Figure:
    """The screened task aggregate between two branches, and the line on which AUC is 1/2."""
    import altair as alt

    told = [{**row, "dial at": f"{row['dial']} {row['value']:g}"} for row in rows]
    places = sorted({row["t"] for row in rows})
    half = (places[-1] - places[0]) / max(1, len(places) - 1) / 2
    crossed = [
        {**row, "dial at": f"{row['dial']} {row['value']:g}"}
        for row in _rows(material, "landscape", "balance")
        if row["t"] is not None
    ]

    blues = alt.Scale(scheme="blues", domain=[0, 1])

    def of(method: str) -> Any:
        mine = [
            {**row, "from": row["t"] - half, "to": row["t"] + half}
            for row in told
            if row["method"] == method
        ]
        base = alt.Chart(title=method, width=280, height=180).encode(
            y=alt.Y("dial at:N", title=None, sort=None)
        )
        surface = base.mark_rect().encode(
            x=alt.X("from:Q", title="place: 0 the first branch, 1 the second"),
            x2="to:Q",
            color=alt.Color("aggregate:Q", title="task", scale=blues),
            tooltip=["method:N", "dial at:N", "t:Q", "aggregate:Q", "auc:Q", "two_sided:Q"],
        )
        line = base.mark_tick(thickness=3, color=OTHERS[0]).encode(x="t:Q", tooltip=["t:Q"])
        found = [row for row in crossed if row["method"] == method]
        return alt.layer(
            surface.properties(data=alt.Data(values=mine)),
            line.properties(data=alt.Data(values=found)),
        )

    chart = alt.hconcat(*(of(method) for method in dict.fromkeys(row["method"] for row in rows)))
    caption = (
        "The screened task aggregate between two branches; a mark stands where membership is "
        "balanced (AUC 0.5), if it is anywhere on that line."
    )
    table = rows_table("landscape", caption, told)
    return Figure("Merge landscape", caption, chart.to_dict(), table)


def balance(rows: Rows, material: Material) -> Figure:
    """The AUC along every line of a landscape, beside 1/2."""
    import altair as alt

    told = [{**row, "line": f"{row['method']}, {row['dial']} {row['value']:g}"} for row in rows]
    curves = (
        alt.Chart(alt.Data(values=told), width=520, height=240)
        .mark_line(point=True)
        .encode(
            x=alt.X("t:Q", title="place: 0 the first branch, 1 the second"),
            y=alt.Y("auc:Q", title="membership AUC", scale=alt.Scale(domain=[0, 1])),
            color=by_name("line"),
            tooltip=["line:N", "t:Q", "auc:Q", "aggregate:Q"],
        )
    )
    half = alt.Chart(alt.Data(values=[{"auc": 0.5}])).mark_rule(strokeDash=[4, 4], color=BEFORE)
    chart = alt.layer(half.encode(y="auc:Q"), curves)
    caption = "Membership along each line; where it crosses 0.5 (dashed) it is balanced."
    return Figure("Balance line", caption, chart.to_dict(), rows_table("balance", caption, told))


def _lines(name: str, title: str, caption: str, rows: list[dict[str, Any]]) -> Figure:
    import altair as alt

    chart = (
        alt.Chart(alt.Data(values=rows), width=300, height=220)
        .mark_line(point=True)
        .encode(
            x=alt.X("epoch:Q", title="epoch", axis=whole_numbers(rows, "epoch")),
            y=alt.Y("value:Q", title=None),
            color=by_name("measure"),
            tooltip=["branch:N", "epoch:Q", "step:Q", "measure:N", "value:Q"],
        )
        .facet(column=alt.Column("branch:N", header=alt.Header(title=None)))
    )
    return Figure(title, caption, chart.to_dict(), rows_table(name, caption, rows))


def _told(
    rows: Rows, measures: Sequence[str], keep: Any, within: str | None
) -> list[dict[str, Any]]:
    """A row for each number of some measures that was measured."""
    return [
        {
            "branch": row["branch"],
            "epoch": row["epoch"],
            "step": row["step"],
            "measure": measure if within is None else f"{row[within]} {measure}",
            "value": row[measure],
        }
        for row in rows
        if keep(row)
        for measure in measures
        if row.get(measure) is not None
    ]


def _rows(material: Material, analysis: str, table: str) -> list[dict[str, Any]]:
    """A table of an analysis beside the report; none where it was not made."""
    if material.folder is None or not (material.folder / "analysis" / f"{analysis}.json").is_file():
        return []
    found = runs.read_json(material.folder / "analysis" / f"{analysis}.json")
    return found["tables"].get(table, [])


FIGURES = {
    "trajectories/epochs": epochs,
    "trajectories/objectives": objectives,
    "weights/norms": places,
    "landscape/surface": landscape,
    "landscape/balance": balance,
}
