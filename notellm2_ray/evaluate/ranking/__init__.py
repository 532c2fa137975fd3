"""Ranking of a user's candidates: task, metrics, results, tables, report."""
