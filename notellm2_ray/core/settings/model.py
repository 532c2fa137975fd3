"""Knobs of the embedder and of the tiny models trained for it where no checkpoint is at hand."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen

VariantName = Literal["basic", "micl", "late_fusion", "notellm2", "only_late_fusion", "text_only", "image_only"]
VARIANT_NAMES: tuple[str, ...] = get_args(VariantName)


class TinySettings(Frozen):
    """A CLIP, a tokenizer and a causal LM trained from scratch on your own notes, for runs without any download."""

    vocab_size: int = Field(4000, ge=300, description="entries of the byte-level BPE tokenizer")
    llm_layers: int = Field(2, ge=1, description="layers of the causal LM (Qwen2 architecture)")
    llm_hidden_size: int = Field(128, ge=16, description="width of the causal LM")
    llm_heads: int = Field(4, ge=1, description="attention heads of the causal LM")
    llm_steps: int = Field(1200, ge=1, description="training steps of the causal LM")
    llm_batch_size: int = Field(16, ge=1, description="stretches of 128 tokens in a training batch of the causal LM")
    vision_layers: int = Field(3, ge=1, description="layers of each CLIP tower")
    vision_hidden_size: int = Field(128, ge=16, description="width of the CLIP towers")
    vision_heads: int = Field(4, ge=1, description="attention heads of the CLIP towers")
    image_size: int = Field(64, ge=16, description="side of the images as CLIP takes them")
    patch_size: int = Field(8, ge=2, description="side of a CLIP patch")
    clip_steps: int = Field(200, ge=1, description="training steps of CLIP on images and their captions")
    clip_batch_size: int = Field(64, ge=2, description="images in a training batch of CLIP")
    num_captions: int = Field(4000, ge=4, description="images with captions that CLIP is trained and checked on")
    mllm_layers: int = Field(3, ge=1, description="layers of the MLLM's LM (Qwen2-VL architecture)")
    mllm_hidden_size: int = Field(192, ge=32, description="width of the MLLM's LM")
    mllm_heads: int = Field(6, ge=1, description="attention heads of the MLLM's LM; vLLM wants heads of 32, 64, ...")
    mllm_vision_layers: int = Field(2, ge=1, description="layers of the MLLM's vision tower")
    mllm_vision_hidden_size: int = Field(128, ge=32, description="width of the MLLM's vision tower")
    mllm_vision_heads: int = Field(4, ge=1, description="attention heads of the MLLM's vision tower")
    mllm_image_side: int = Field(
        84, ge=28, multiple_of=28, description="side of a square picture as the MLLM takes it; 28 pixels a token"
    )
    mllm_drawings: int = Field(5000, ge=1, description="drawings that the MLLM learns to caption")
    mllm_topics: int = Field(3000, ge=1, description="titles that it learns to name the topic of")
    mllm_questions: int = Field(12000, ge=1, description="yes-or-no questions that it learns to answer")
    mllm_preferences: int = Field(5000, ge=1, description="tastes that it learns to sum up")
    mllm_held_out: int = Field(200, ge=1, description="exercises of each of these that it is measured on, unseen")
    mllm_first_steps: int = Field(350, ge=1, description="training steps of its word vectors and vision tower alone")
    mllm_steps: int = Field(1200, ge=1, description="training steps of the whole MLLM")
    mllm_batch_size: int = Field(8, ge=1, description="captions in a training batch; the other exercises go by it")

    @model_validator(mode="after")
    def _fits(self) -> TinySettings:
        for part in ("llm", "vision", "mllm", "mllm_vision"):
            width, heads = f"{part}_hidden_size", f"{part}_heads"
            size, number = getattr(self, width), getattr(self, heads)
            if size % (2 * number):
                raise ValueError(f"tiny.{width} ({size}) must be an even multiple of tiny.{heads} ({number})")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"tiny.image_size ({self.image_size}) must be a multiple of tiny.patch_size ({self.patch_size})"
            )
        return self


class QFormerSettings(Frozen):
    """The connector (Table 9): learned queries that read the patches and become visual tokens."""

    num_layers: int = Field(6, ge=1, description="layers")
    num_heads: int = Field(12, ge=1, description="attention heads")
    hidden_size: int = Field(768, ge=8, description="width")
    intermediate_size: int = Field(3072, ge=8, description="width of the feed-forward layers")
    num_queries: int = Field(16, ge=1, description="visual tokens per image (L_c)")
    cross_attention_every: int = Field(2, ge=1, description="every n-th layer attends to the patches")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability")


class EmbedderSettings(Frozen):
    """An embedder under a name of its own: what is different for it from `model` and `train`."""

    model: dict[str, Any] = Field({}, description="settings of `model` that are different for it, as in {llm: NAME}")
    train: dict[str, Any] = Field({}, description="settings of `train` that are different for it")
    trained: bool = Field(True, description="false: the model as it is before training, for rows without any")


class ModelSettings(Frozen):
    """The embedder: NoteLLM-2, sections 2.2 and 3."""

    kind: str = Field("notellm2", description="kind of embedder: notellm2, or one that another package declares")
    options: dict[str, Any] = Field({}, description="settings of another kind of embedder, as it names them")
    variant: VariantName = Field("notellm2", description="row of the variants table (Tables 2 and 4)")
    llm: str = Field("tiny", description="Hugging Face name or directory of a causal LM; tiny: trained on your notes")
    vision: str = Field(
        "tiny",
        description="Hugging Face name or directory of a CLIP or SigLIP; openclip:ARCHITECTURE[:PRETRAINED]; "
        "tiny: trained on your notes",
    )
    revision: str | None = Field(None, description="revision of the LLM on the hub")
    freeze_vision: bool | None = Field(
        None, description="keep the vision tower as it is; null: yes, except in the image_only variant (Table 2)"
    )
    qformer: QFormerSettings = Field(QFormerSettings(), description="connector")
    embedding_dim: int = Field(64, ge=2, description="length of a note's vector")
    initial_temperature: float = Field(3.0, description="tau at the start; its exponential multiplies the cosine")
    alpha: float = Field(9.0, ge=0, description="weight of the multimodal loss over the visual one (Eq. 9)")
    prompt_language: Literal["zh", "en"] = Field("zh", description="language of the prompt's own words")
    max_title_words: int = Field(
        20, ge=0, description="title is cut after so many words (characters in Chinese and Japanese)"
    )
    max_content_words: int = Field(
        80, ge=0, description="content is cut after so many words (characters in Chinese and Japanese)"
    )
    max_topics: int = Field(10, ge=0, description="topics kept")
    max_topic_length: int = Field(16, ge=1, description="a longer topic, in characters, is left out")
    truncation_unit: Literal["auto", "words", "characters"] = Field(
        "auto",
        description="what title and content are cut by; auto: characters where the text is mostly Chinese or "
        "Japanese, which have no spaces",
    )
    max_body_tokens: int = Field(
        140,
        ge=8,
        description="tokens of the note in the prompt: its text, the words around it, and the image as one; "
        "closing words and visual tokens come on top and are never cut",
    )
    missing_image: Literal["omit", "zero"] = Field(
        "omit",
        description="a note without image: leave the image out of the prompt, or a blank one (zero after "
        "normalisation, as published); the image_only variant always takes the blank one",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention implementation")

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        if self.options and self.kind == "notellm2":
            raise ValueError(f"model.options is for other kinds of embedder: {list(self.options)} would be ignored")
        if self.qformer.hidden_size % self.qformer.num_heads:
            raise ValueError(
                f"model.qformer.hidden_size ({self.qformer.hidden_size}) must be a multiple of "
                f"model.qformer.num_heads ({self.qformer.num_heads})"
            )
        return self
