"""Recall metrics, significance tests and the report."""
