"""Knobs of the recommender (MLLM-MSR): sequences, protocols, generation, the ranker and its evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from notellm2_ray.core.config import Frozen, resource

PreferenceVariant = Literal["recurrent", "direct", "no_image_summary"]
RankerVariant = Literal["mllm_msr", "direct", "no_image_summary", "tallrec"]
ProtocolName = Literal["uniform", "popular", "published"]
PromptLanguage = Literal["zh", "en"]
Control = Literal["shuffled_image", "other_preference"]


class PromptSettings(Frozen):
    """What all prompts of the recommender have in common: image summaries, preferences and the ranker's question."""

    language: PromptLanguage = Field("en", description="language of the recommender's prompts")


class SequenceSettings(Frozen):
    """Each user's positive events in time's order, and the blocks of history that preferences are summarised from."""

    positive_actions: tuple[str, ...] = Field(
        ("click",), min_length=1, description="events by which a user has liked a note"
    )
    min_events: int = Field(2, ge=1, description="users with fewer positive events get no target, but keep a sequence")
    max_events: int = Field(
        100, ge=2, description="only a user's last so many events are kept; past it each new event changes all blocks"
    )
    blocks_by: Literal["size", "session"] = Field(
        "size", description="cut history after block_size events (the published code), or where a session ends (paper)"
    )
    block_size: int = Field(3, ge=1, description="events in a block; by session: at most so many (Figure 5's best: 3)")
    session_gap_minutes: float = Field(
        60, gt=0, description="by session: a longer pause ends one, where events carry no session_id"
    )


class CandidateSettings(Frozen):
    """Who is trained and tested on what: targets, negatives, splits."""

    split_by: Literal["users", "time"] = Field(
        "users", description="train, validation and test users apart, or targets before and after moments in time"
    )
    validation_share: float = Field(0.1, gt=0, lt=0.5, description="share of users (or of targets, by time)")
    test_share: float = Field(0.2, gt=0, lt=0.9, description="share of users (or of targets, by time)")
    train_targets: Literal["last", "every_block"] = Field(
        "last",
        description="what a training user teaches: the last event alone (paper), or also the first event after every "
        "full block, with the preference as it stood then",
    )
    protocols: tuple[ProtocolName, ...] = Field(
        ("uniform", "popular"),
        min_length=1,
        description="test negatives: uniform, matched to the target's popularity, or the published construction, which "
        "takes each user's most popular notes for the history and so leaks popularity (it rebuilds the test examples "
        "alone: training and validation keep last events as targets)",
    )
    num_negatives: int = Field(20, ge=1, description="negatives per validation and test target")
    num_train_negatives: int = Field(1, ge=1, description="negatives per training target")
    max_test_users: int = Field(0, ge=0, description="test at most so many users, drawn by the seed; 0: all")
    existing_notes_only: bool = Field(
        True,
        description="negatives are notes that were created before the target was liked, where notes carry created_at: "
        "a later one could be told by its date alone; false: any note",
    )
    max_negative_age_days: float | None = Field(
        None,
        gt=0,
        description="negatives were created at most so many days before the target was liked: where users are shown "
        "new notes, an old one can be told by its age alone (see the row `newest`); null: any age",
    )
    k_core: tuple[int, int] | None = Field(
        None,
        description="keep only users with so many notes and notes with so many users, among each other (published "
        "code: [7, 5]; paper's number of users: [6, 5]); null: everybody",
    )

    @model_validator(mode="after")
    def _shares(self) -> CandidateSettings:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("candidates.validation_share and candidates.test_share leave nothing to train on")
        if len(set(self.protocols)) != len(self.protocols):
            raise ValueError(f"candidates.protocols names one twice: {list(self.protocols)}")
        if self.max_negative_age_days is not None and not self.existing_notes_only:
            raise ValueError("candidates.max_negative_age_days needs candidates.existing_notes_only=true")
        if self.k_core is not None and min(self.k_core) < 1:
            raise ValueError(f"candidates.k_core must be two numbers of at least 1: {list(self.k_core)}")
        return self


class GenerationSettings(Frozen):
    """vLLM engines for summaries, preferences and scores."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="of weights and activations")
    tensor_parallel: int = resource(1, ge=1, description="GPUs that share one engine")
    gpu_memory: float = resource(0.9, gt=0, le=1, description="share of a GPU's memory that an engine takes")
    cpu_cache_gb: int = resource(1, ge=1, description="key-value cache of an engine on a CPU, in GiB")
    max_model_len: int = Field(2048, ge=64, description="tokens of a prompt and its answer together at most")
    max_sequences: int = resource(128, ge=1, description="sequences that an engine advances at once")
    enforce_eager: bool | None = resource(None, description="no graph capture; null: on a CPU only, to start sooner")
    engines: int = resource(1, ge=1, description="engine actors")
    cpus_per_engine: float = resource(1, gt=0, description="CPUs reserved for an engine actor")
    gpus_per_engine: float = resource(0, ge=0, description="GPUs reserved for an engine actor")
    engine_kwargs: dict[str, Any] = Field({}, description="further arguments of vLLM's engine, as vLLM names them")


class SummarySettings(Frozen):
    """Images to text (MLLM-MSR, item summariser)."""

    model: str = Field("tiny", description="MLLM that vLLM can run, by name or directory; tiny: trained on drawings")
    template: str | None = Field(None, description="instruction to the model; null: ours, in prompts.language")
    max_tokens: int = Field(200, ge=1, description="tokens of a summary at most (the published code's 200)")
    min_characters: int = Field(2, ge=0, description="a shorter summary is asked for once more, then quarantined")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    max_image_pixels: int = Field(262_144, ge=784, description="larger images are scaled down to this area")
    batch_rows: int = resource(32, ge=1, description="rows in a batch: the unit committed, and redone after a kill")
    concurrent_batches: int = resource(4, ge=1, description="batches that an engine works on at once")
    max_bad_share: float = resource(
        0.05, ge=0, le=1, description="above this share of quarantined images the job stops"
    )


class PreferenceSettings(Frozen):
    """A user's history to a taste in words, block by block (MLLM-MSR, user summariser)."""

    model: str = Field("tiny", description="LLM or MLLM that vLLM can run; tiny: the one that captions")
    variant: PreferenceVariant = Field(
        "recurrent",
        description="recurrent: P_b from P_{b-1} and block b; direct: one call on the whole history; no_image_summary: "
        "recurrent, from titles alone",
    )
    template: str | None = Field(None, description="instruction to the model; null: ours, in prompts.language")
    max_tokens: int = Field(
        256,
        ge=1,
        description="tokens of a preference at most; one that runs into it is cut there (published code: 1,024)",
    )
    max_title_words: int = Field(
        30, ge=1, description="a title is cut after so many words (Chinese, Japanese: characters)"
    )
    max_summary_words: int = Field(80, ge=1, description="an image summary is cut after so many words")
    temperature: float = Field(0.0, ge=0, description="0: greedy; above (published: 0.6) seeded per user and block")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of sampling (published: 0.9)")
    concurrent_calls: int = resource(128, ge=1, description="users whose chains an engine advances at once")


class RankerSettings(Frozen):
    """The MLLM that says yes or no to a candidate, and what it is shown."""

    model: str = Field("tiny", description="Hugging Face image-text model; tiny: the one that captions")
    variant: RankerVariant = Field(
        "mllm_msr",
        description="mllm_msr: recurrent preference and the candidate's image; direct, no_image_summary: other "
        "preferences; tallrec: titles of the history and of the candidate, no image, no preference",
    )
    layout: Literal["shared_prefix", "image_first"] = Field(
        "shared_prefix",
        description="shared_prefix: instruction and preference before the candidate, so that a user's candidates share "
        "their prefix; image_first: the paper's order",
    )
    max_preference_tokens: int = Field(256, ge=8, description="a preference is cut after so many tokens")
    max_title_tokens: int = Field(64, ge=4, description="a title is cut after so many tokens")
    max_history: int = Field(10, ge=1, description="tallrec: titles of so many last notes")
    max_image_pixels: int = Field(262_144, ge=784, description="larger candidate images are scaled down to this area")


class TuneSettings(Frozen):
    """LoRA supervised fine-tuning of the ranker on Ray Train."""

    seed: int = Field(42, ge=0, description="seed of LoRA's initialisation and of the order of examples")
    lora_rank: int = Field(8, ge=1, description="rank (paper: 8; published code: 16)")
    lora_alpha: float = Field(32, gt=0, description="scale (published code: 32)")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="dropout (published code: 0.1)")
    loss_on: Literal["answer", "everything"] = Field(
        "answer", description="tokens that the loss is taken over; the published code's is everything"
    )
    engine: Literal["deepspeed", "plain"] = Field("deepspeed", description="what distributes the optimizer")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed's ZeRO stage; the plain engine has none")
    num_workers: int = Field(1, ge=1, description="training processes")
    cpus_per_worker: float = resource(1, gt=0, description="CPUs reserved for a worker")
    gpus_per_worker: float = resource(0, ge=0, description="GPUs reserved for a worker")
    batch_size: int = Field(8, ge=1, description="prompts in an update over all workers (paper: 1 with 8 accumulated)")
    max_batch_tokens: int = Field(8192, ge=64, description="padded tokens in a forward batch of a worker")
    epochs: float = Field(10, gt=0, description="passes over the training examples (paper: 10; published code: 4)")
    max_steps: int | None = Field(None, ge=1, description="stop after so many updates")
    learning_rate: float = Field(2e-5, gt=0, description="peak")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the updates that the rate rises over")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on LoRA's matrices")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the device multiplies it")
    gradient_checkpointing: bool = resource(False, description="recompute activations to save memory")
    validate_every_steps: int = Field(100, ge=1, description="updates between validations by AUC and checkpoints")
    max_validation_examples: int = Field(
        200, ge=1, description="validation targets used at most, each with candidates.num_negatives negatives"
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
    """The ranking tables: AUC, HR, MRR and NDCG among a target's candidates."""

    rankers: tuple[RankerVariant, ...] = Field(("mllm_msr",), description="variants trained and compared by `run`")
    seeds: tuple[int, ...] = Field((42,), min_length=1, description="seeds each of them is trained with")
    cutoffs: tuple[PositiveInt, ...] = Field((3, 5, 10), min_length=1, description="k of HR, MRR and NDCG")
    baselines: tuple[str, ...] = Field(
        ("random", "popularity", "gru4rec", "sasrec", "untuned"), description="rows beside the rankers"
    )
    controls: tuple[Control, ...] = Field(
        ("shuffled_image", "other_preference"),
        description="the first ranker scored with another candidate's image, or another user's preference, under the "
        "first protocol",
    )
    image_tower: str = Field(
        "", description="vision tower of the row gru4rec_image: as model.vision, or vgg19; empty: model.vision"
    )
    sweep: Literal["block_size", "context_length"] = resource("block_size", description="what `notellm2 sweep` varies")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="level of the bootstrap intervals over users")
    sample_users: int = Field(8, ge=0, description="users shown with history, preferences and ranking in the report")

    @model_validator(mode="after")
    def _consistent(self) -> RankEvaluateSettings:
        for name in ("rankers", "seeds", "cutoffs", "baselines", "controls"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"ranking.{name} names one twice: {list(values)}")
        if self.controls and not self.rankers:
            raise ValueError("ranking.controls need a ranker: name one in ranking.rankers, or set ranking.controls=[]")
        if self.controls and self.rankers[0] == "tallrec":
            raise ValueError(
                "ranking.controls take away the first ranker's images and preferences, and tallrec sees neither: name "
                "another first in ranking.rankers, or set ranking.controls=[]"
            )
        return self
