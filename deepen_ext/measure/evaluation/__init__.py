"""Benchmarks: their prompts and metrics, evaluation of an ensemble on them, and how sure a difference is."""
