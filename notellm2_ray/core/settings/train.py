"""Settings of training (NoteLLM-2, Table 8)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen, added, resource


class LoraSettings(Frozen):
    """LoRA for the embedder's LLM: its weights are frozen, and small matrices beside its linear layers are trained.

    Parts that start from random values are trained in full, as without LoRA.
    """

    rank: int = Field(16, ge=1, description="rank of the matrices")
    alpha: float = Field(32, gt=0, description="scale: the matrices' product is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the matrices' input")
    learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of the matrices; null: ten times train.learning_rate"
    )


class TrainSettings(Frozen):
    """How the embedder is trained; the defaults are the paper's Table 8, but for the learning rate."""

    seed: int = Field(42, ge=0, description="seed of initialisation, order and dropout (paper: 42, 43, 44)")
    engine: Literal["deepspeed", "plain"] = Field("deepspeed", description="DeepSpeed ZeRO, or PyTorch (DDP) alone")
    zero_stage: Literal[0, 1, 2, 3] = Field(3, description="DeepSpeed's ZeRO stage; unused with engine=plain")
    offload: Literal["none", "optimizer", "parameters_and_optimizer"] = Field(
        "none", description="DeepSpeed: what is kept in CPU memory (parameters: stage 3 only)"
    )
    num_workers: int = Field(1, ge=1, description="ranks, one Ray Train worker each")
    cpus_per_worker: float = resource(1, gt=0, description="CPUs reserved for a rank")
    gpus_per_worker: float = resource(0, ge=0, description="GPUs reserved for a rank")
    objective: str = Field(
        "contrastive", description="what is minimised: contrastive, or one that another package adds"
    )
    batch_pairs: int = Field(128, ge=1, description="pairs in a global batch (B); a batch holds 2B notes")
    epochs: int = Field(1, ge=1, description="passes over the training pairs")
    max_steps: int | None = Field(None, ge=1, description="stop after so many steps; null: after the epochs")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of AdamW; null: by the size of the pretrained models (the paper's 3e-6 at 7 "
        "billion parameters, 1e-4 at 135 million, 5e-4 at the tiny models')",
    )
    connector_learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of randomly initialised parts; null: learning_rate if that is set, else ten "
        "times as much, at most 2e-3",
    )
    lora: LoraSettings | None = added(
        None, description="train the LLM with LoRA, as in {rank: 16, alpha: 32}; null: train all its weights"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of AdamW's moments")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(1e-3, ge=0, description="decoupled weight decay (not on biases, norms, temperature)")
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="share of the steps with linear warm-up; then linear decay to zero"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this global norm")
    precision: Literal["bf16", "fp32", "tf32", "auto"] = Field(
        "bf16",
        description="bf16: matrix work in bfloat16 over float32 weights; similarity and loss always float32; "
        "tf32: fp32, with products in TF32 on a GPU; auto: bf16 where the device multiplies it natively, else fp32",
    )
    gradient_checkpointing: bool = resource(
        False, description="recompute activations: less memory, about a third slower"
    )
    length_chunks: int = Field(
        4, ge=1, description="a rank's notes go through the model in so many groups of similar length (same result)"
    )
    cached_notes_per_pass: int | None = resource(
        None,
        ge=1,
        description="gradient caching: a rank's notes go through the model in passes of at most so many notes, so that "
        "memory does not grow with batch_pairs, about a quarter slower (same result); instead of length_chunks",
    )
    cached_tokens_per_pass: int | None = resource(
        None, ge=1, description="gradient caching in passes of at most so many tokens, with padding; or both limits"
    )
    mask_duplicates: bool = Field(True, description="do not use another copy of a note in the batch as its negative")
    hard_negatives: int = added(
        0, ge=0, description="mined negatives of each pair that a step draws from its list; 0: in-batch negatives alone"
    )
    negatives_of: str | None = added(
        None,
        description="name of the embedder whose mined negatives are used; null: the column `negatives` of the pairs",
    )
    false_negative_margin: float | None = added(
        None,
        ge=-2,
        le=2,
        description="a note whose cosine exceeds the related note's by more than this is no negative; null: each is",
    )
    dimensions: tuple[int, ...] = added(
        (),
        description="lengths to which vectors can later be cut, as in [64,32,16]: the loss is the mean over vectors of "
        "each length (Matryoshka, Kusupati et al. 2022); model.embedding_dim must be one; empty: whole vectors alone",
    )
    prefetch_batches: int = resource(2, ge=0, description="batches prepared ahead by each rank")
    readers: int | None = resource(
        None,
        ge=0,
        description="processes that decode and tokenise for each rank; null: on a GPU up to 16, one less than "
        "cpus_per_worker, or where that is 1 than the machine has cores for a rank; on CPUs none; 0: its threads do it",
    )
    validate_every_steps: int = Field(1750, ge=1, description="steps between validations by recall")
    checkpoint_every_steps: int = resource(
        500, ge=1, description="steps between checkpoints, which a killed run resumes from"
    )
    background_checkpoints: bool = resource(
        False,
        description="write checkpoints while training goes on; a copy of a rank's state (12 bytes for each of its "
        "trained parameters) is in CPU memory meanwhile",
    )
    max_validation_pairs: int = Field(2000, ge=1, description="most validation pairs used")
    best_by: Literal["recall", "loss"] = Field(
        "recall", description="validation metric that selects the best checkpoint"
    )
    max_failures: int = resource(3, ge=-1, description="worker failures survived in one run; -1: any number")
    logger: Literal["none", "tensorboard", "wandb", "mlflow"] = resource(
        "none", description="where training curves go besides disk"
    )

    @property
    def caches_gradients(self) -> bool:
        """Whether a step's notes go through the model in passes, with a cache of their vectors' gradients."""
        return self.cached_notes_per_pass is not None or self.cached_tokens_per_pass is not None

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.batch_pairs % self.num_workers:
            raise ValueError(
                f"train.batch_pairs ({self.batch_pairs}) must be a multiple of train.num_workers ({self.num_workers})"
            )
        if self.engine == "plain" and self.offload != "none":
            raise ValueError(
                "train.offload is DeepSpeed's: with train.engine=plain it would be ignored; set train.offload=none"
            )
        if self.offload == "parameters_and_optimizer" and self.zero_stage != 3:
            raise ValueError("train.offload=parameters_and_optimizer needs train.zero_stage=3")
        if len(set(self.dimensions)) != len(self.dimensions) or min(self.dimensions, default=1) < 1:
            raise ValueError(
                f"train.dimensions must be different numbers above 0, as in [64,32,16]; got {list(self.dimensions)}"
            )
        if self.negatives_of is not None and not self.hard_negatives:
            raise ValueError("train.negatives_of would be ignored: set train.hard_negatives to a number above 0")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("train.offload=optimizer needs train.zero_stage 1, 2 or 3")
        return self
