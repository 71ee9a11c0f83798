"""The report: what was forgotten and what was kept, as tables, one HTML page and docs."""

from expunge.report.board import add_rows, rows
from expunge.report.docs import write_docs
from expunge.report.page import write_report
from expunge.report.results import FORMAT, Results, read_results
from expunge.report.tables import markdown_table, results_table
from expunge.report.terminal import console, print_results, result_folders

__all__ = [
    "FORMAT",
    "Results",
    "add_rows",
    "console",
    "markdown_table",
    "print_results",
    "read_results",
    "result_folders",
    "results_table",
    "rows",
    "write_docs",
    "write_report",
]
