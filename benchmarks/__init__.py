"""Measurements: commands that print figures for benchmarks/RESULTS.md."""
