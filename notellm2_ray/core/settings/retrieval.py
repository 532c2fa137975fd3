"""Settings of bulk embedding, the ANN index and the evaluation of recall."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen, added, resource
from notellm2_ray.core.settings.baselines import Bm25Settings, SwingSettings

Inputs = Literal["multimodal", "image", "text"]


class EmbedSettings(Frozen):
    """Bulk embedding on a Ray Data actor pool."""

    notes: str | None = Field(None, description="Parquet directory of notes to embed; null: the workspace's own")
    actors: int = resource(1, ge=1, description="encoder actors, each with a copy of the model")
    cpus_per_actor: float = resource(1, gt=0, description="CPUs reserved for an actor")
    gpus_per_actor: float = resource(0, ge=0, description="GPUs reserved for an actor")
    preprocess_threads: int = resource(
        1,
        ge=1,
        description="threads of an actor (or of a reader) that decode and tokenise while the model embeds",
    )
    readers: int | None = resource(
        None,
        ge=0,
        description="processes with one CPU that decode and tokenise for all actors; 0: the actors do it themselves; "
        "null: 0 on a CPU; on GPUs as many as there are CPUs for, up to 16 an actor",
    )
    chunk_rows: int = Field(1024, ge=1, description="notes in a chunk: the unit of work that a killed run repeats")
    batch_tokens: int = Field(16_384, ge=64, description="padded tokens in a forward batch, of notes of similar length")
    max_batch_notes: int | None = resource(
        None, ge=1, description="most notes in a forward batch; null: 256 on a GPU, 32 on a CPU"
    )
    precision: Literal["auto", "bf16", "fp32", "tf32"] = Field(
        "auto",
        description="of the forward pass, here and in the service; auto: bf16 on GPUs that multiply it natively, else "
        "fp32, and in the service as the vectors were made; tf32: float32 weights, products in TF32 on a GPU",
    )
    max_bad_share: float = resource(
        0.05, ge=0, le=1, description="the job stops if more than this share of notes is quarantined"
    )
    dimensions: int | None = added(
        None,
        ge=1,
        description="length to which vectors are cut, one of train.dimensions: here, in index, evaluation and service; "
        "null: whole vectors",
    )
    by_modality: bool = Field(
        False,
        description="also embed each note's image alone and text alone (three passes instead of one): the service then "
        "tells whether two notes are similar by image, by text or by both",
    )

    @property
    def device(self) -> str:
        """Where an actor's model is: ``cuda`` or ``cpu``."""
        return "cuda" if self.gpus_per_actor else "cpu"


class IndexSettings(Frozen):
    """The FAISS index over the embedding table. Vectors have unit length; the score is the cosine."""

    kind: Literal["auto", "exact", "ivf", "ivf_pq", "hnsw"] = Field(
        "auto", description="auto: exact up to 50,000 notes, IVF above"
    )
    num_lists: int = Field(0, ge=0, description="IVF: cells; 0: about 4 times the square root of the number of notes")
    num_probes: int = Field(0, ge=0, description="IVF: cells searched; 0: as many as recall_target needs")
    pq_bytes: int = Field(16, ge=1, description="IVF-PQ: bytes per vector")
    hnsw_neighbors: int = Field(32, ge=4, description="HNSW: links per note")
    hnsw_search: int = Field(128, ge=8, description="HNSW: candidates followed in a search")
    recall_target: float = Field(
        0.99, gt=0, le=1, description="with num_probes=0: recall@100 against exact search to reach"
    )
    gpu: bool = resource(False, description="search on a GPU (needs faiss-gpu)")
    recall_queries: int = Field(1000, ge=1, description="notes searched to measure recall against exact search")

    @model_validator(mode="after")
    def _nothing_ignored(self) -> IndexSettings:
        if self.kind in ("exact", "hnsw") and (self.num_lists or self.num_probes):
            raise ValueError(
                f"index.num_lists and index.num_probes are for IVF: with index.kind={self.kind} they would be ignored"
            )
        if self.kind == "hnsw" and self.gpu:
            raise ValueError("index.kind=hnsw has no GPU search in FAISS: use index.kind=ivf, or index.gpu=false")
        return self


class NegativeSettings(Frozen):
    """Hard negatives: notes that an embedder puts near a training query, though nothing relates them."""

    min_rank: int = Field(10, ge=1, description="nearer neighbours of a query are passed over: they may be related")
    max_rank: int = Field(100, ge=1, description="the farthest neighbour of a query that is looked at")
    relative_margin: float | None = Field(
        0.05,
        ge=0,
        le=1,
        description="a negative's cosine with the query is below that of the target by at least this share of it "
        "(0.05 is NV-Retriever's 95%, arXiv 2407.15831); null: no such limit",
    )
    absolute_margin: float | None = Field(None, ge=0, le=2, description="and by at least so much; null: no such limit")
    max_common_users: int | None = Field(
        0,
        ge=0,
        description="at most so many users clicked both a negative and the query in the log of the training pairs; "
        "null: any number",
    )
    per_pair: int = Field(32, ge=1, description="negatives kept per pair, the nearest")

    @model_validator(mode="after")
    def _window(self) -> NegativeSettings:
        if self.min_rank > self.max_rank:
            raise ValueError(
                f"negatives.min_rank ({self.min_rank}) is above negatives.max_rank ({self.max_rank}): no rank is left"
            )
        return self


class IdSettings(Frozen):
    """Semantic ids: residual k-means codes of the embedding table, which generative recommenders start from."""

    levels: int = Field(3, ge=1, description="codes of a note, from coarse to fine")
    codebook_size: int = Field(256, ge=2, description="values of a code: centroids on each level")
    iterations: int = Field(25, ge=1, description="iterations of k-means on each level")
    train_notes: int = Field(100_000, ge=2, description="most notes that the codebooks are learned from")
    tell_apart: bool = Field(
        True, description="end each id in a digit, 0, 1, ..., that tells notes with the same codes apart"
    )

    @model_validator(mode="after")
    def _enough_to_learn_from(self) -> IdSettings:
        if self.train_notes < self.codebook_size:
            raise ValueError(
                f"ids.train_notes ({self.train_notes}) is below ids.codebook_size ({self.codebook_size}): a centroid "
                "needs at least one note"
            )
        return self


class EvaluateSettings(Frozen):
    """Recall of the target note in the test pool, as the paper measures it."""

    embedders: tuple[str, ...] = Field(
        ("basic", "notellm2", "text_only", "image_only"),
        min_length=1,
        description="embedders that `run` trains and compares: variants of `model`, or names from `embedders`",
    )
    seeds: tuple[int, ...] = Field((42,), min_length=1, description="training seeds of each embedder (paper: 42,43,44)")
    cutoffs: tuple[int, ...] = Field((10, 100, 1000, 10000), min_length=1, description="k of Recall@k")
    short_tokens: int = Field(50, ge=1, description="a note with fewer text tokens is short")
    long_tokens: int = Field(165, ge=1, description="a note with more text tokens is long")
    inputs: tuple[Inputs, ...] = Field(
        ("multimodal", "image", "text"), min_length=1, description="inputs that each embedder is tested with (Table 3)"
    )
    baselines: tuple[str, ...] = Field(
        ("bm25", "item_cf", "swing", "popularity", "random"),
        description="baselines compared with the embedders: bm25, item_cf, swing, popularity, random, sentence_encoder",
    )
    bm25: Bm25Settings = Field(Bm25Settings(), description="knobs of the baseline bm25")
    swing: SwingSettings = Field(SwingSettings(), description="knobs of the baseline swing")
    sentence_encoder: str = added(
        "sentence-transformers/all-MiniLM-L6-v2",
        description="name or directory of the model of the baseline sentence_encoder (needs sentence-transformers)",
    )
    one_pair_per_note: bool = Field(
        False,
        description="use each note in at most one test pair and drop queries from the pool, as the published code does",
    )
    sample_queries: int = Field(24, ge=0, description="query notes shown with their neighbours in the report")

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateSettings:
        if min(self.cutoffs) < 1 or sorted(set(self.cutoffs)) != list(self.cutoffs):
            raise ValueError(
                f"evaluate.cutoffs must be increasing numbers of at least 1, as in [10, 100]; got {list(self.cutoffs)}"
            )
        for name in ("seeds", "embedders"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"evaluate.{name} has a duplicate: {list(values)}")
        if self.short_tokens > self.long_tokens + 1:
            raise ValueError(
                f"evaluate.short_tokens ({self.short_tokens}) is above evaluate.long_tokens ({self.long_tokens}): "
                "a note would be short and long at once"
            )
        return self
