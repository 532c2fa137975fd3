"""Settings of the recommender (MLLM-MSR): sequences, protocols, generation, the ranker and its evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from notellm2_ray.core.config import Frozen, added, resource
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings.baselines import GRID, Gru4RecSettings, SasRecSettings, points

PreferenceVariant = Literal["recurrent", "direct", "no_image_summary"]
RankerVariant = Literal["mllm_msr", "direct", "no_image_summary", "tallrec"]
ProtocolName = Literal["uniform", "popular", "published"]
PromptLanguage = Literal["zh", "en"]
Control = Literal["shuffled_image", "other_preference"]


class PromptSettings(Frozen):
    """Settings shared by all prompts of the recommender: image summaries, preferences and the ranker's question."""

    language: PromptLanguage = Field("en", description="language of the recommender's prompts")


class SequenceSettings(Frozen):
    """Each user's positive events in order of time, cut into the blocks that preferences are summarised from."""

    positive_actions: tuple[str, ...] = Field(
        ("click",), min_length=1, description="actions that count as liking a note"
    )
    min_events: int = Field(2, ge=1, description="users with fewer positive events get no target, but keep a sequence")
    max_events: int = Field(
        100,
        ge=2,
        description="most events kept per user, the latest ones; above this each new event changes all blocks",
    )
    blocks_by: Literal["size", "session"] = Field(
        "size", description="cut the history after block_size events (published code), or where a session ends (paper)"
    )
    block_size: int = Field(3, ge=1, description="events in a block; by session: the most (best in Figure 5: 3)")
    session_gap_minutes: float = Field(
        60, gt=0, description="by session: a longer pause ends a session, if events have no session_id"
    )


class CandidateSettings(Frozen):
    """Targets, negatives, and the split into training, validation and test examples."""

    split_by: Literal["users", "time"] = Field(
        "users", description="split the users, or split the targets at two moments in time"
    )
    validation_share: float = Field(0.1, gt=0, lt=0.5, description="share of users (or of targets, by time)")
    test_share: float = Field(0.2, gt=0, lt=0.9, description="share of users (or of targets, by time)")
    train_targets: Literal["last", "every_block"] = Field(
        "last",
        description="targets of a training user: the last event alone (paper), or also the first event after every "
        "full block, with the preference at that time",
    )
    per_seed: bool = resource(
        True, description="with several ranking.seeds, draw the negatives anew for each; false: all seeds share them"
    )
    protocols: tuple[ProtocolName, ...] = Field(
        ("uniform", "popular"),
        min_length=1,
        description="test negatives: drawn uniformly, matched to the target's popularity, or as published. The "
        "published construction puts each user's most popular notes into the history and so leaks popularity; "
        "it changes test examples only, training and validation keep the last events as targets",
    )
    num_negatives: int = Field(20, ge=1, description="negatives per validation and test target")
    num_train_negatives: int = Field(1, ge=1, description="negatives per training target")
    max_test_users: int = Field(0, ge=0, description="most test users, drawn with the seed; 0: all")
    existing_notes_only: bool = Field(
        True,
        description="take only notes created before the target was liked as negatives, if notes have created_at: "
        "a later one would give itself away by its date; false: any note",
    )
    max_negative_age_days: float | None = Field(
        None,
        gt=0,
        description="take only notes at most so many days old as negatives: if users are mostly shown "
        "new notes, an old one gives itself away by its age (see the baseline `newest`); null: any age",
    )
    k_core: tuple[int, int] | None = Field(
        None,
        description="[notes per user, users per note]: drop users and notes with fewer, until no such one is left "
        "(published code: [7, 5]; [6, 5] gives the paper's number of users); null: keep all",
    )

    @model_validator(mode="after")
    def _shares(self) -> CandidateSettings:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("candidates.validation_share and candidates.test_share leave nothing to train on")
        if len(set(self.protocols)) != len(self.protocols):
            raise ValueError(f"candidates.protocols has a duplicate: {list(self.protocols)}")
        if self.max_negative_age_days is not None and not self.existing_notes_only:
            raise ValueError("candidates.max_negative_age_days needs candidates.existing_notes_only=true")
        if self.k_core is not None and min(self.k_core) < 1:
            raise ValueError(f"candidates.k_core must be two numbers of at least 1: {list(self.k_core)}")
        return self


class GenerationSettings(Frozen):
    """vLLM engines for summaries, preferences and scores."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="type of weights and activations"
    )
    tensor_parallel: int = resource(1, ge=1, description="GPUs that share one engine")
    gpu_memory: float | None = resource(
        None,
        gt=0,
        le=1,
        description="share of a GPU's memory that an engine takes; null: 0.9 of the share that it reserves",
    )
    quantization: Literal["fp8"] | None = added(
        None,
        description="fp8: weights and activations of 8 bits, on GPUs from Ada and Hopper on (older ones: weights "
        "alone); answers and scores change; null: as the model is stored",
    )
    cpu_cache_gb: int = resource(1, ge=1, description="key-value cache of an engine on a CPU, in GiB")
    max_model_len: int = Field(2048, ge=64, description="most tokens of a prompt and its answer together")
    max_sequences: int = resource(128, ge=1, description="sequences that an engine generates at once")
    enforce_eager: bool | None = resource(
        None, description="turn graph capture off; null: on CPUs only, to start faster"
    )
    engines: int = resource(1, ge=1, description="number of engine actors")
    cpus_per_engine: float = resource(1, gt=0, description="CPUs reserved for an engine actor")
    gpus_per_engine: float = resource(0, ge=0, description="GPUs reserved for an engine; below 1: its share of one")
    engine_kwargs: dict[str, Any] = Field({}, description="further arguments of vLLM's engine, under vLLM's names")


class SummarySettings(Frozen):
    """Summaries of images in words (MLLM-MSR, item summariser)."""

    model: str = Field(
        "tiny",
        description="MLLM that vLLM can run, by name or directory; tiny: trained on drawings; "
        "packaged: such a one that comes with the package",
    )
    template: str | None = Field(None, description="instruction to the model; null: ours, in prompts.language")
    max_tokens: int = Field(200, ge=1, description="most tokens of a summary (published code: 200)")
    min_characters: int = Field(
        2, ge=0, description="a shorter summary is generated once more; if still shorter, quarantined"
    )
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    max_image_pixels: int = Field(262_144, ge=784, description="larger images are scaled down to this area")
    batch_rows: int = resource(
        32, ge=1, description="rows in a batch: the unit that is committed, and that a killed run repeats"
    )
    concurrent_batches: int = resource(4, ge=1, description="batches that an engine works on at once")
    max_bad_share: float = resource(
        0.05, ge=0, le=1, description="the job stops if more than this share of images is quarantined"
    )


class PreferenceSettings(Frozen):
    """Preferences in words, from a user's history block by block (MLLM-MSR, user summariser)."""

    model: str = Field("tiny", description="LLM or MLLM that vLLM can run; tiny, packaged: as summaries.model")
    variant: PreferenceVariant = Field(
        "recurrent",
        description="recurrent: P_b from P_{b-1} and block b; direct: one call with the whole history; "
        "no_image_summary: recurrent, with titles only",
    )
    template: str | None = Field(None, description="instruction to the model; null: ours, in prompts.language")
    max_tokens: int = Field(
        256,
        ge=1,
        description="most tokens of a preference; a longer one is cut there (published code: 1,024)",
    )
    max_title_words: int = Field(
        30, ge=1, description="words of a title that are kept (characters in scripts without spaces)"
    )
    max_summary_words: int = Field(80, ge=1, description="words of an image summary that are kept")
    temperature: float = Field(
        0.0, ge=0, description="0: greedy; above 0: sampled with a seed per user and block (published: 0.6)"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling (published: 0.9)")
    concurrent_calls: int = resource(128, ge=1, description="users that an engine works on at once")


class RankerSettings(Frozen):
    """The MLLM that answers yes or no to a candidate, and what its prompt contains."""

    model: str = Field("tiny", description="Hugging Face image-text model; tiny, packaged: as summaries.model")
    variant: RankerVariant = Field(
        "mllm_msr",
        description="mllm_msr: recurrent preference and the candidate's image; direct, no_image_summary: the same with "
        "that kind of preference; tallrec: titles of the history and the candidate, no image or preference",
    )
    layout: Literal["shared_prefix", "image_first"] = Field(
        "shared_prefix",
        description="shared_prefix: instruction and preference come before the candidate, so that all prompts of a "
        "user share a prefix; image_first: the paper's order",
    )
    max_preference_tokens: int = Field(256, ge=8, description="tokens of a preference that are kept")
    max_title_tokens: int = Field(64, ge=4, description="tokens of a title that are kept")
    max_history: int = Field(10, ge=1, description="tallrec: number of latest notes whose titles are shown")
    max_image_pixels: int = Field(262_144, ge=784, description="larger candidate images are scaled down to this area")


class TuneSettings(Frozen):
    """LoRA supervised fine-tuning of the ranker on Ray Train."""

    seed: int = Field(42, ge=0, description="seed of LoRA's initialisation and the order of examples")
    lora_rank: int = Field(8, ge=1, description="LoRA rank (paper: 8; published code: 16)")
    lora_alpha: float = Field(32, gt=0, description="LoRA scale (published code: 32)")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="LoRA dropout (published code: 0.1)")
    loss_on: Literal["answer", "everything"] = Field(
        "answer", description="tokens in the loss; published code: everything"
    )
    engine: Literal["deepspeed", "plain"] = Field("deepspeed", description="DeepSpeed ZeRO, or PyTorch alone")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed's ZeRO stage; unused with engine=plain")
    num_workers: int = Field(1, ge=1, description="training processes")
    cpus_per_worker: float = resource(1, gt=0, description="CPUs reserved for a worker")
    gpus_per_worker: float = resource(0, ge=0, description="GPUs reserved for a worker")
    batch_size: int = Field(8, ge=1, description="prompts per update over all workers (paper: 1, accumulated 8 times)")
    max_batch_tokens: int = Field(8192, ge=64, description="padded tokens in a forward batch of a worker")
    epochs: float = Field(10, gt=0, description="passes over the training examples (paper: 10; published code: 4)")
    max_steps: int | None = Field(None, ge=1, description="stop after so many updates; null: after the epochs")
    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the updates with warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, on LoRA's matrices")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    precision: Literal["auto", "bf16", "fp32", "tf32"] = Field(
        "auto", description="auto: bf16 if the device supports it natively; tf32: fp32, with products in TF32 on a GPU"
    )
    gradient_checkpointing: bool = resource(False, description="recompute activations to save memory")
    validate_every_steps: int | None = Field(
        None, ge=1, description="updates between validations (AUC); null: 100, in long runs a twentieth of all updates"
    )
    max_validation_examples: int = Field(
        200, ge=1, description="most validation targets used, each with candidates.num_negatives negatives"
    )
    validation_share: float = added(
        0.25,
        gt=0,
        description="most work of validations, as a share of the training's: beyond it fewer negatives of each target "
        "are scored, then fewer targets (scoring a prompt takes half the work of tuning on it)",
    )
    readers: int | None = resource(None, ge=0, description="processes that decode and tokenise: as train.readers")
    checkpoint_every_steps: int = resource(
        100, ge=1, description="updates between checkpoints, which a killed run resumes from"
    )
    max_failures: int = resource(2, ge=0, description="worker failures survived before giving up")

    @model_validator(mode="after")
    def _consistent(self) -> TuneSettings:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"tune.batch_size ({self.batch_size}) must be a multiple of tune.num_workers ({self.num_workers})"
            )
        return self


class RankEvaluateSettings(Frozen):
    """Evaluation of ranking: AUC, HR, MRR and NDCG among a target's candidates."""

    rankers: tuple[RankerVariant, ...] = Field(("mllm_msr",), description="variants that `run` trains and compares")
    seeds: tuple[int, ...] = Field((42,), min_length=1, description="training seeds of each variant")
    cutoffs: tuple[PositiveInt, ...] = Field((3, 5, 10), min_length=1, description="k of HR, MRR and NDCG")
    baselines: tuple[str, ...] = Field(
        ("random", "popularity", "gru4rec", "sasrec", "untuned"),
        description="baselines compared with the rankers: random, popularity, newest, gru4rec, sasrec, gru4rec_image, "
        "gru4rec_summary, untuned, untuned_text",
    )
    controls: tuple[Control, ...] = Field(
        ("shuffled_image", "other_preference"),
        description="score the first ranker with another candidate's image, or with another user's preference, under "
        "the first protocol",
    )
    image_tower: str = Field(
        "",
        description="vision tower of the baseline gru4rec_image: as in model.vision, or vgg19; empty: model.vision",
    )
    gru4rec: Gru4RecSettings = Field(Gru4RecSettings(), description="knobs of the baseline gru4rec")
    sasrec: SasRecSettings = Field(SasRecSettings(), description="knobs of the baseline sasrec")
    gru4rec_image: Gru4RecSettings = Field(Gru4RecSettings(), description="knobs of the baseline gru4rec_image")
    gru4rec_summary: Gru4RecSettings = Field(Gru4RecSettings(), description="knobs of the baseline gru4rec_summary")
    tune_baselines: bool = Field(
        False,
        description="choose the knobs of sequential baselines in baseline_grid by their AUC on validation targets",
    )
    baseline_grid: dict[str, tuple[float, ...]] = Field(
        GRID, description="values that tune_baselines tries, by knob; every combination is trained once, with one seed"
    )
    sweep: Literal["block_size", "context_length"] = resource("block_size", description="what `notellm2 sweep` varies")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="confidence level of the bootstrap intervals over users")
    sample_users: int = Field(8, ge=0, description="users whose history, preferences and ranking the report shows")

    @model_validator(mode="after")
    def _consistent(self) -> RankEvaluateSettings:
        for name in ("rankers", "seeds", "cutoffs", "baselines", "controls"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"ranking.{name} has a duplicate: {list(values)}")
        for name in ("gru4rec", "sasrec", "gru4rec_image", "gru4rec_summary"):
            try:
                points(getattr(self, name), self.baseline_grid)
            except ConfigError as error:
                raise ValueError(f"ranking.baseline_grid does not fit {name}: {error}") from error
        if self.controls and not self.rankers:
            raise ValueError("ranking.controls need a ranker: name one in ranking.rankers, or set ranking.controls=[]")
        if self.controls and self.rankers[0] == "tallrec":
            raise ValueError(
                "ranking.controls replace the first ranker's images and preferences, but tallrec uses neither: name "
                "another ranker first in ranking.rankers, or set ranking.controls=[]"
            )
        return self
