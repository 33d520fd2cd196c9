"""Measurements against other programs, each with its results in RESULTS.md."""
