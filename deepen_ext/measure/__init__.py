"""Measuring members and ensembles of them: likelihood, evaluation, tuning, doctor."""
