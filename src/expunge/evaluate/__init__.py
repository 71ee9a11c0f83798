"""Metrics: what a model still says, what it gives away, and whether it still works."""
