"""What follows the device where the settings leave it open. Imports no torch, so that a driver can ask."""

from __future__ import annotations

# A GPU is idle between small batches. On a CPU the activations of a large batch leave the caches: SmolLM2-135M embeds
# 11.8 notes/s by 256 on two cores, and 17.4 by 32.
_BATCH_NOTES = {"cuda": 256, "cpu": 32}


def batch_notes(given: int | None, device: str) -> int:
    """The most notes in a forward pass: those ``given``, else what suits the device (``cuda`` or ``cpu``)."""
    return given or _BATCH_NOTES["cuda" if device == "cuda" else "cpu"]
