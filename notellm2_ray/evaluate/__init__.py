"""Metrics, tests of significance, tables and reports, for recall and for ranking."""
