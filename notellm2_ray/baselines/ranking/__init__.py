"""Ranking baselines: one file each, the table of them, and the sequential models that several share."""
