"""Measure what a run learned and how fast it ran, against baselines."""
