"""Calibrated merging: find the merge whose forgotten text looks like text never seen."""
