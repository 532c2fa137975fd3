"""The multimodal large representation model (sections 2.2 and 3): from a note to its vectors.

Z_v, pooled = V(image)            patches and pooled vector                     vision/tower.py
E_v = C(Z_v)                      visual tokens                                 qformer.py
H = LLM([text with E_v in it])    states after the final norm                   llm.py
n_v, n_m = H at the opening quotation mark of the visual half, and of the end
n = z * v + (1 - z) * n           gated late fusion, Eq. 7                      fusion.py
vector = P n                      64 numbers; n_v and n_m share P             vectors.py
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models.embedder.fusion import LateFusion
from notellm2_ray.models.embedder.preprocess import NoteBatch
from notellm2_ray.models.embedder.qformer import Connector
from notellm2_ray.models.embedder.variants import VARIANTS
from notellm2_ray.models.embedder.vectors import NOTE, VISUAL, NoteVectors, projection
from notellm2_ray.models.vision.tower import Views, VisionTower


class NoteModel(nn.Module):
    """The embedder's network.

    Args:
        settings: the variant, and the sizes of the randomly initialised parts.
        llm: a causal LM without its head (h_t wide); None for ``image_only``.
        tower: the vision tower (h_v wide, its pooled vector h_p); None for ``text_only``.

    Attributes:
        temperature: tau of Eq. 1, float32 of shape (1,); its exponential multiplies the cosine.
        width: of the states before the projection.
    """

    def __init__(self, settings: ModelSettings, llm: PreTrainedModel | None, tower: VisionTower | None) -> None:
        super().__init__()
        self.variant = VARIANTS[settings.variant]
        assert (llm is None) == (self.variant.prompt is None)
        assert (tower is None) == (not self.variant.sees_images)
        self.llm, self.tower = llm, tower
        llm_width = llm.config.hidden_size if llm is not None else 0
        vision_width, pooled_width = (tower.width, tower.pooled_width) if tower is not None else (0, 0)
        if self.variant.visual_tokens:
            self.connector = Connector(settings.qformer, vision_width, llm_width)
        if self.variant.late_fusion:
            self.fusion = LateFusion(pooled_width, llm_width)
        self.width = llm_width or pooled_width
        self.projection = projection(self.width, settings)
        self.temperature = nn.Parameter(torch.full((1,), settings.start_temperature, dtype=torch.float32))

    def forward(self, batch: NoteBatch) -> NoteVectors:
        """Vectors of a batch's notes. In training every parameter takes part, even if no note has an image.

        Otherwise ranks with images would wait for ever for ranks without.
        """
        dummy = self.training and self.tower is not None and len(batch.pixels) == 0
        if dummy:
            batch = _with_dummy_image(batch)
        views = self.tower(batch.pixels) if self.tower is not None and len(batch.pixels) else None
        if self.variant.prompt is None:
            assert views is not None  # a note without image has a blank one
            return self._vectors(views.pooled, None, batch, dummy)
        states = self._read(batch, views, dummy)
        num_notes = len(batch.input_ids)
        multimodal = states[torch.arange(num_notes, device=states.device), batch.last]
        visual = states[batch.image_rows, batch.visual_ends] if self.variant.visual_vector else None
        if self.variant.late_fusion and views is not None:
            fused = self.fusion(views.pooled, multimodal[batch.image_rows])
            multimodal = _put(multimodal, (batch.image_rows,), fused, dummy)
            visual = None if visual is None else self.fusion(views.pooled, visual)
        return self._vectors(multimodal, visual, batch, dummy)

    def _read(self, batch: NoteBatch, views: Views | None, dummy: bool) -> torch.Tensor:
        """Hidden states (N, T, h_t) of the prompts, with the visual tokens of the images in place."""
        assert self.llm is not None
        embeddings = self.llm.get_input_embeddings()(batch.input_ids)
        if self.variant.visual_tokens and views is not None:
            tokens = self.connector(views.patches)  # (K, L_c, h_t)
            places = batch.image_starts[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
            embeddings = _put(embeddings, (batch.image_rows[:, None], places), tokens, dummy)
        return self.llm(
            inputs_embeds=embeddings, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state

    def _vectors(
        self, multimodal: torch.Tensor, visual: torch.Tensor | None, batch: NoteBatch, dummy: bool
    ) -> NoteVectors:
        """Project the states, and put the K visual vectors into the rows of their notes."""
        multimodal = self.projection(multimodal).float()
        temperature = self.temperature.float().squeeze().clone()
        if visual is None:
            return NoteVectors({NOTE: multimodal}, {}, temperature)
        has_visual = torch.zeros(len(multimodal), dtype=torch.bool, device=multimodal.device)
        if not dummy:
            has_visual[batch.image_rows] = True
        visual = _put(torch.zeros_like(multimodal), (batch.image_rows,), self.projection(visual), dummy)
        return NoteVectors({NOTE: multimodal, VISUAL: visual}, {VISUAL: has_visual}, temperature)

    def to_precision(self, precision: str) -> NoteModel:
        """Convert the weights to float32 (``fp32``) or bfloat16 (``bf16``); the temperature stays float32."""
        # Parameters only. The angles of rotary positions are buffers, and bfloat16 is too coarse for them.
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        self.temperature.data = self.temperature.data.float()
        return self

    def is_fresh(self, name: str) -> bool:
        """Whether the named parameter is randomly initialised, not pretrained."""
        return name.startswith(("connector.", "fusion.", "projection."))

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass: less memory, about a third slower."""
        trained = [self.llm] if self.llm is not None else []
        if self.tower is not None and not self.tower.frozen and self.tower.model.supports_gradient_checkpointing:
            trained.append(self.tower.model)
        for model in trained:
            if enabled:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()


def _with_dummy_image(batch: NoteBatch) -> NoteBatch:
    """The batch with a black image for its first note; the image's outputs are later multiplied by zero."""
    zero = torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device)
    pixels = batch.pixels.new_zeros((1, *batch.pixels.shape[1:]))
    return batch._replace(pixels=pixels, image_rows=zero, image_starts=zero, visual_ends=zero)


def _put(target: torch.Tensor, places: tuple[torch.Tensor, ...], values: torch.Tensor, dummy: bool) -> torch.Tensor:
    """``target`` with ``values`` at ``places``. For a dummy image unchanged, but a function of both."""
    values = values.to(target.dtype)
    return target + 0.0 * values.sum() if dummy else target.index_put(places, values)
