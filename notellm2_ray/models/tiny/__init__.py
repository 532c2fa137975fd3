"""Tiny models trained from scratch, so that the whole system runs where no checkpoint is at hand.

They are saved in Hugging Face layout and loaded by the code that loads real checkpoints.
"""

from notellm2_ray.models.tiny.clip import train_tiny_clip
from notellm2_ray.models.tiny.llm import train_tiny_llm

__all__ = ["train_tiny_clip", "train_tiny_llm"]
