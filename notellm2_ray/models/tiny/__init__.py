"""Tiny models trained from scratch, so that the whole system runs without any checkpoint.

They are saved in Hugging Face layout and loaded by the code that loads real checkpoints.
"""
