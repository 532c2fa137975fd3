"""Bulk offline inference on Ray Data."""
