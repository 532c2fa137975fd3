"""How large the images are that an engine must be ready for."""

from __future__ import annotations

import re
from typing import Any

# Rounding the sides of an image up to whole tokens of 28 or 32 pixels enlarges it by less than this: no side is below
# MIN_SIDE.
_ROUNDING = 2


def image_limits(model: str, architecture: str, max_pixels: int) -> dict[str, Any]:
    """Engine arguments for a model that is shown images of at most ``max_pixels``.

    Qwen-VL's processors take images of up to 16,384 tokens. vLLM reserves memory for such a one, and describes one when
    it starts, though we send some 350 tokens. A smaller limit changes no image that is sent.

    Args:
        model: directory or hub name.
        architecture: of its configuration.
    """
    if not re.fullmatch(r"Qwen\d(_\d)?VL(Moe)?ForConditionalGeneration", architecture):
        return {}
    from transformers import AutoImageProcessor

    from notellm2_ray.models.quiet import quiet_loading

    with quiet_loading():
        size = AutoImageProcessor.from_pretrained(model).size
    least, most = size["shortest_edge"], size["longest_edge"]
    limit = _ROUNDING * max_pixels
    if not least <= limit < most:
        return {}
    return {"mm_processor_kwargs": {"size": {"shortest_edge": least, "longest_edge": limit}}}
