"""Rows of the recall table that are not NoteLLM-2: BM25, popularity, random."""
