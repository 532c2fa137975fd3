"""Baselines of the recall table."""
