"""Baselines of the ranking tables."""
