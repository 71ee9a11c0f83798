"""The report: what was forgotten and what was kept, as tables, one HTML page and docs."""
