"""The variants of the paper, as rows of one table (Tables 2 and 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from notellm2_ray.core.prompts import PromptKind
from notellm2_ray.core.settings.model import VariantName


@dataclasses.dataclass(frozen=True)
class Variant:
    """The parts of an embedder.

    Attributes:
        prompt: the form of the LLM's prompt; None: no LLM, the tower's pooled vector is projected.
        late_fusion: whether the tower's pooled vector is fused with the LLM's state (Eq. 7).
    """

    prompt: PromptKind | None
    late_fusion: bool = False

    @property
    def visual_tokens(self) -> bool:
        """Whether the prompt contains the image as visual tokens of the connector (early fusion)."""
        return self.prompt in ("basic", "micl")

    @property
    def visual_vector(self) -> bool:
        """Whether there is also a visual vector, with its own loss (Eqs. 8 and 9)."""
        return self.prompt == "micl"

    @property
    def pooled(self) -> bool:
        """Whether the tower's pooled vector is used."""
        return self.late_fusion or self.prompt is None

    @property
    def sees_images(self) -> bool:
        return self.visual_tokens or self.pooled


VARIANTS: Mapping[VariantName, Variant] = {
    #                          prompt   late fusion
    "basic": Variant("basic", False),
    "micl": Variant("micl", False),
    "late_fusion": Variant("basic", True),
    "notellm2": Variant("micl", True),
    "only_late_fusion": Variant("text", True),
    "text_only": Variant("text", False),
    "image_only": Variant(None, False),
}
