"""Charts drawn without a browser, the library that draws them on the page, tables as files."""

import csv
import io
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from expunge import runs
from expunge.report.pieces import Cell, Figure, Table
from expunge.report.tables import NOT_MEASURED, markdown

VEGA_LITE = "6.4"
"""The version of the grammar that charts are written in."""

PIXELS_PER_INCH = 144.0


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, so that a page needs no network."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)


def write_figures(figures: Iterable[Figure], folder: Path) -> None:
    """Write each chart as SVG and PNG."""
    import vl_convert

    for figure in figures:
        name = figure.table.name
        drawn = vl_convert.vegalite_to_svg(figure.chart, vl_version=VEGA_LITE)
        runs.write_text(folder / f"{name}.svg", drawn)
        with runs.replacing(folder / f"{name}.png") as temporary:
            temporary.write_bytes(vl_convert.svg_to_png(drawn, ppi=PIXELS_PER_INCH, scale=1))


def write_tables(tables: Iterable[Table], folder: Path) -> None:
    """Write each table as CSV, whole, and as Markdown, rounded."""
    for table in tables:
        runs.write_text(folder / f"{table.name}.csv", csv_text(table))
        body = [[shown(cell) for cell in row] for row in table.rows]
        runs.write_text(folder / f"{table.name}.md", markdown(list(table.header), body))


def csv_text(table: Table) -> str:
    """A table as CSV, numbers with all their digits; what was not measured is empty.

    A text that a spreadsheet would take for a formula is given an apostrophe before it.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows([[_harmless(cell) for cell in row] for row in table.rows])
    return out.getvalue()


def shown(cell: Cell) -> str:
    """A cell as a reader sees it: three decimals, yes and no, a dash for what was not measured."""
    if cell is None:
        return NOT_MEASURED
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _harmless(cell: Cell) -> Cell:
    dangerous = isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{cell}" if dangerous else cell
