"""Recall of related notes: task, metrics, results, tables, plots, samples and report."""
