"""The report: what was forgotten and what was kept, as tables, one HTML page and docs."""

from expunge.report.board import add_rows, rows
from expunge.report.page import write_report
from expunge.report.results import FORMAT, Results, read_results
from expunge.report.tables import markdown_table, results_table

__all__ = [
    "FORMAT",
    "Results",
    "add_rows",
    "markdown_table",
    "read_results",
    "results_table",
    "rows",
    "write_report",
]
