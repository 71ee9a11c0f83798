"""The part of a report that shows a calibration: the front, the balance, both sides, how sure."""

from collections.abc import Iterator, Mapping
from typing import Any

from expunge import runs
from expunge.report.calibration import calibration_rows, calibration_sentences, front_table
from expunge.report.charts import AFTER, BEFORE, OTHERS, by_name, rows_table
from expunge.report.pieces import Figure, Material, Section

_FILE = "calibration.json"
_ROLES = {"target": BEFORE, "end": OTHERS[0], "baseline": OTHERS[2], "trial": AFTER}


def calibration(material: Material) -> Section | None:
    """The calibrations of a run: those that are a stage of it, and those asked for afterwards."""
    text: list[str] = []
    figures, tables = [], []
    for number, found in enumerate(_found(material)):
        name = f"calibration-{number}"
        text += [f"{found['name']}:", *calibration_sentences(found)]
        figures += [_front(name, found), _line(name, found)]
        caption = "Each candidate on the calibration fold and, behind a slash, on the test fold."
        tables.append(rows_table(f"{name}-points", caption, calibration_rows(found, every=True)))
    if not tables:
        return None
    return Section("calibration", "Calibration", tuple(text), tuple(figures), tuple(tables))


def _found(material: Material) -> Iterator[Mapping[str, Any]]:
    shown = set()
    for stage in material.results.stages:
        folder = material.stage_folder(stage)
        if folder is not None and (folder / _FILE).is_file():
            shown.add(folder.name)
            yield runs.read_json(folder / _FILE)
    if material.run is not None:
        kept = sorted((material.run / "calibration").glob(f"*-seed-{material.results.seed}.json"))
        asked = (runs.read_json(path) for path in kept)
        yield from (found for found in asked if found["stage"] not in shown)


def _front(name: str, found: Mapping[str, Any]) -> Figure:
    """Forgetting against keeping, the greater a point the better balanced."""
    import altair as alt

    rows = [
        {
            "point": point["point"],
            "merge": point["label"],
            "role": point["role"],
            "front": "on the front" if point["front"] else "beaten",
            **{key: point["calibration"][key] for key in ("forgetting", "retention", "balance")},
        }
        for point in found["points"]
    ]
    roles = alt.Scale(domain=list(_ROLES), range=list(_ROLES.values()))
    share = alt.Scale(domain=[0, 1], padding=10)
    shown = alt.Scale(domain=["on the front", "beaten"], range=[1, 0.35])
    chart = (
        alt.Chart(alt.Data(values=rows), width=420, height=320)
        .mark_point(filled=True)
        .encode(
            x=alt.X("forgetting:Q", title="1 - mean forget term (screened)", scale=share),
            y=alt.Y("retention:Q", title="mean retain term (screened)", scale=share),
            size=alt.Size("balance:Q", title="balance", scale=alt.Scale(range=[30, 300])),
            color=alt.Color("role:N", title=None, scale=roles),
            opacity=alt.Opacity("front:N", title=None, scale=shown),
            tooltip=["point:Q", "merge:N", "forgetting:Q", "retention:Q", "balance:Q"],
        )
        .interactive()
    )
    caption = (
        "The Pareto front on the calibration fold: what no other candidate beats in forgetting, "
        "retention and membership balance at once. expunge pick writes any point of it."
    )
    table = rows_table(f"{name}-front", caption, front_table(found))
    return Figure("Pareto front", caption, chart.to_dict(), table)


def _line(name: str, found: Mapping[str, Any]) -> Figure:
    """Membership along the line of the chosen candidate, on all documents."""
    import altair as alt

    rows = [
        {"t": place["t"], "measure": measure, "value": place[key]}
        for place in found["line"]
        for key, measure in (("auc", "AUC"), ("two_sided", "two-sided AUC"), ("ks", "KS distance"))
    ]
    lines = (
        alt.Chart(alt.Data(values=rows), width=420, height=240)
        .mark_line(point=True)
        .encode(
            x=alt.X("t:Q", title="place on the line: 0 forgets too much, 1 too little"),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(domain=[0, 1])),
            color=by_name("measure"),
            tooltip=["t:Q", "measure:N", "value:Q"],
        )
    )
    half = alt.Chart(alt.Data(values=[{"value": 0.5}])).mark_rule(strokeDash=[4, 4], color=BEFORE)
    chart = alt.layer(half.encode(y="value:Q"), lines)
    caption = "Membership about the chosen place, all documents: at 0.5 (dashed) it is balanced."
    table = rows_table(f"{name}-line", caption, list(found["line"]))
    return Figure("Membership along the line", caption, chart.to_dict(), table)
