"""Ranking of candidates: task, metrics, results, tables, plots, samples and report."""
