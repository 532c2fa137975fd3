"""Recall of related notes: task, metrics, results, tables, report."""
