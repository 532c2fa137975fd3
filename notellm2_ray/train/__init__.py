"""Distributed training: Ray Train around a plain or DeepSpeed engine."""
