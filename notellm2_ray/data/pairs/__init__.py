"""Pairs of related notes, mined from co-occurrence in the event log, and their split."""
