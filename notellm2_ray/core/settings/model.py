"""Settings of the embedder, and of the tiny models that can take the place of pretrained checkpoints."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen, added, build, resource
from notellm2_ray.core.errors import ConfigError

VariantName = Literal["basic", "micl", "late_fusion", "notellm2", "only_late_fusion", "text_only", "image_only"]
VisionPooling = Literal["auto", "cls", "mean", "projected"]
VARIANT_NAMES: tuple[str, ...] = get_args(VariantName)


class TinySettings(Frozen):
    """Small models trained from scratch on your own notes, for runs without any download."""

    per_seed: bool = resource(
        True,
        description="with several seeds, train tiny models anew for each, and let each write image summaries and "
        "preferences of its own; false: all seeds share the first one's",
    )
    vocab_size: int = Field(4000, ge=300, description="vocabulary size of the byte-level BPE tokenizer")
    llm_layers: int = Field(2, ge=1, description="layers of the causal LM (Qwen2 architecture)")
    llm_hidden_size: int = Field(128, ge=16, description="width of the causal LM")
    llm_heads: int = Field(4, ge=1, description="attention heads of the causal LM")
    llm_steps: int = Field(1200, ge=1, description="training steps of the causal LM")
    llm_batch_size: int = Field(16, ge=1, description="sequences of 128 tokens in a training batch of the causal LM")
    vision_layers: int = Field(3, ge=1, description="layers of each CLIP tower")
    vision_hidden_size: int = Field(128, ge=16, description="width of the CLIP towers")
    vision_heads: int = Field(4, ge=1, description="attention heads of the CLIP towers")
    image_size: int = Field(64, ge=16, description="side of CLIP's input images, in pixels")
    patch_size: int = Field(8, ge=2, description="side of a CLIP patch, in pixels")
    clip_steps: int = Field(200, ge=1, description="training steps of CLIP on images and their captions")
    clip_batch_size: int = Field(64, ge=2, description="images in a training batch of CLIP")
    num_captions: int = Field(4000, ge=4, description="captioned images for training and validating CLIP")
    mllm_layers: int = Field(3, ge=1, description="layers of the MLLM's LM (Qwen2-VL architecture)")
    mllm_hidden_size: int = Field(192, ge=32, description="width of the MLLM's LM")
    mllm_heads: int = Field(
        6, ge=1, description="attention heads of the MLLM's LM; vLLM needs head sizes of 32, 64, ..."
    )
    mllm_vision_layers: int = Field(2, ge=1, description="layers of the MLLM's vision tower")
    mllm_vision_hidden_size: int = Field(128, ge=32, description="width of the MLLM's vision tower")
    mllm_vision_heads: int = Field(4, ge=1, description="attention heads of the MLLM's vision tower")
    mllm_image_side: int = Field(
        84, ge=28, multiple_of=28, description="side of the MLLM's input images, in pixels; 28 pixels a token"
    )
    mllm_drawings: int = Field(5000, ge=1, description="drawings with captions that the MLLM is trained on")
    mllm_topics: int = Field(3000, ge=1, description="titles with topics that the MLLM is trained on")
    mllm_questions: int = Field(12000, ge=1, description="yes-or-no questions that the MLLM is trained on")
    mllm_preferences: int = Field(5000, ge=1, description="preferences to summarise that the MLLM is trained on")
    mllm_held_out: int = Field(200, ge=1, description="held-out examples of each of these tasks, to measure the MLLM")
    mllm_first_steps: int = Field(
        350, ge=1, description="first training steps, of token embeddings and vision tower alone"
    )
    mllm_steps: int = Field(1200, ge=1, description="training steps of the whole MLLM")
    mllm_batch_size: int = Field(8, ge=1, description="captions in a training batch; the other tasks scale with it")

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
    """The connector (Table 9): learned queries attend to the patches and become visual tokens."""

    num_layers: int = Field(6, ge=1, description="layers")
    num_heads: int = Field(12, ge=1, description="attention heads")
    hidden_size: int = Field(768, ge=8, description="width")
    intermediate_size: int = Field(3072, ge=8, description="width of the feed-forward layers")
    num_queries: int = Field(16, ge=1, description="visual tokens per image (L_c)")
    cross_attention_every: int = Field(2, ge=1, description="every n-th layer attends to the patches")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability")


class EmbedderSettings(Frozen):
    """A named embedder: how it differs from `model` and `train`."""

    model: dict[str, Any] = Field({}, description="settings that replace those of `model`, as in {llm: NAME}")
    train: dict[str, Any] = Field({}, description="settings that replace those of `train`")
    trained: bool = Field(True, description="false: the model before any training, as a row to compare with")
    baseline: bool | None = Field(
        None,
        description="whether the star of the recall table compares with it; null: if it is untrained, of another "
        "variant than notellm2, or of the kind mllm",
    )


class MllmOptions(Frozen):
    """``model.options`` of the kind mllm: a ready multimodal LLM as embedder."""

    prompt: Literal["compression", "chat"] = Field(
        "compression",
        description="compression: the paper's basic prompt, with the image in its place; chat: the model's own chat "
        "template with an instruction, as Qwen3-VL-Embedding and its like were trained",
    )
    instruction: str | None = Field(
        None, description="system message of the chat prompt; null: Qwen3-VL-Embedding's own"
    )
    max_image_pixels: int = Field(
        262_144,
        ge=784,
        description="larger images are scaled down to this area; of 262,144 pixels Qwen2-VL makes some 330 tokens, "
        "Qwen3-VL 256",
    )

    @model_validator(mode="after")
    def _consistent(self) -> MllmOptions:
        if self.instruction is not None and self.prompt != "chat":
            raise ValueError("instruction is for prompt=chat and would be ignored")
        return self


class ModelSettings(Frozen):
    """The embedder: NoteLLM-2, sections 2.2 and 3."""

    kind: str = Field(
        "notellm2",
        description="kind of embedder: notellm2; mllm: a ready multimodal LLM, which model.llm names; or one that "
        "another package adds",
    )
    options: dict[str, Any] = Field(
        {},
        description="settings of an embedder of another kind; notellm2 has none, mllm has prompt, instruction and "
        "max_image_pixels",
    )
    variant: VariantName = Field("notellm2", description="variant of the model (Tables 2 and 4)")
    llm: str = Field(
        "tiny",
        description="Hugging Face name or directory of a causal LM, or of a multimodal LLM for the LM inside it; tiny: "
        "trained on your notes; packaged: a tiny one that comes with the package and knows the synthetic world's words",
    )
    vision: str = Field(
        "tiny",
        description="Hugging Face name or directory of a vision encoder with states of square patches, such as CLIP, "
        "SigLIP, DINOv2, DINOv3 or ViT, or of a model with one; openclip:ARCHITECTURE[:PRETRAINED]; "
        "timm:ARCHITECTURE[:PRETRAINED], where PRETRAINED is a tag or a .safetensors file; "
        "tiny: trained on your notes; packaged: a tiny one that comes with the package and knows the world's drawings",
    )
    vision_pooling: VisionPooling = added(
        "auto",
        description="the tower's vector of an image, for late fusion and image_only; auto: what the model pools itself "
        "(of a CLIP its CLS state before the last norm, as published); cls: the state of CLS; mean: of the patches; "
        "projected: the vector that a CLIP or SigLIP compares with texts",
    )
    revision: str | None = Field(None, description="revision of the LLM on the Hugging Face hub")
    freeze_vision: bool | None = Field(
        None, description="do not train the vision tower; null: true, except for the image_only variant (Table 2)"
    )
    qformer: QFormerSettings = Field(QFormerSettings(), description="connector")
    embedding_dim: int | None = Field(
        64,
        ge=2,
        description="dimension of a note's vector; null: no projection, the vector is the LLM's hidden state itself, "
        "as in the paper's zero-shot rows",
    )
    initial_temperature: float | None = Field(
        None,
        description="initial tau; exp(tau) multiplies the cosine; null: 3 as in Table 8, and 1.5 with a tiny LLM of "
        "this package",
    )
    alpha: float = Field(9.0, ge=0, description="weight of the multimodal loss relative to the visual one (Eq. 9)")
    prompt_language: Literal["zh", "en"] = Field("zh", description="language of the prompt")
    max_title_words: int = Field(
        20, ge=0, description="words of the title that are kept (characters in scripts without spaces)"
    )
    max_content_words: int = Field(
        80, ge=0, description="words of the content that are kept (characters in scripts without spaces)"
    )
    max_topics: int = Field(10, ge=0, description="topics that are kept")
    max_topic_length: int = Field(16, ge=1, description="characters of a topic; longer topics are left out")
    truncation_unit: Literal["auto", "words", "characters"] = Field(
        "auto",
        description="unit in which title and content are cut; auto: characters if the text is mostly of a script "
        "without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), else words",
    )
    max_body_tokens: int = Field(
        140,
        ge=8,
        description="tokens of the note in the prompt: its text, the words around it, and one for the image; "
        "closing words and visual tokens are not counted and never cut",
    )
    missing_image: Literal["omit", "zero"] = Field(
        "omit",
        description="for a note without an image: leave the image out of the prompt, or use a blank one (zero after "
        "normalisation, as published); the image_only variant always uses the blank one",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention implementation")

    @property
    def start_temperature(self) -> float:
        """Initial tau. At 3 a tiny model makes all its vectors equal first, and there gradients vanish."""
        if self.initial_temperature is not None:
            return self.initial_temperature
        return 1.5 if self.llm in ("tiny", "packaged") else 3.0

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        if self.options and self.kind == "notellm2":
            raise ValueError(f"model.options is for other kinds of embedder: {list(self.options)} would be ignored")
        if self.kind == "mllm":
            self._consistent_mllm()
        if self.qformer.hidden_size % self.qformer.num_heads:
            raise ValueError(
                f"model.qformer.hidden_size ({self.qformer.hidden_size}) must be a multiple of "
                f"model.qformer.num_heads ({self.qformer.num_heads})"
            )
        return self

    def _consistent_mllm(self) -> None:
        try:
            build(MllmOptions, self.options)
        except ConfigError as error:
            raise ValueError(f"model.options: {error}") from error
        if self.llm == "tiny":
            raise ValueError(
                "model.kind=mllm starts from a ready multimodal LLM: let model.llm name one. packaged is a tiny one "
                "that comes with the package"
            )
        if self.missing_image != "omit":
            raise ValueError("model.kind=mllm leaves a missing image out: model.missing_image would be ignored")
