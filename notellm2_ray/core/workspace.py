"""Where every output of a data set is: the one place that knows the layout of a workspace.

A stage's output is a directory with a manifest (:mod:`notellm2_ray.core.run`). Code that reads a file
of it asks here for its path; the stage that writes it gets the directory.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

_TABLE = ".lance"  # an embedding table is beside the directory of its blocks


class Workspace:
    """The paths of a workspace. Nothing is created or read here.

    Attributes:
        root: its directory, absolute: Ray's workers run in directories of their own.
        seed: which of several training seeds this is the workspace of; None: the first or the only one.
        own: names of the directories that this seed has of its own, below ``seeds/SEED``; it shares the others.
    """

    def __init__(self, root: str | Path, seed: int | None = None, own: Collection[str] = ()) -> None:
        self.root = Path(root).absolute()
        self.seed, self.own = seed, frozenset(own)

    def _of_seed(self, name: str) -> Path:
        return (self.root / "seeds" / str(self.seed) if name in self.own else self.root) / name

    # --- notes, events and pairs

    @property
    def prepared(self) -> Path:
        """Checked notes and events."""
        return self.root / "prepared"

    @property
    def notes(self) -> Path:
        """Parquet directory of the prepared notes (NOTE_SCHEMA)."""
        return self.prepared / "notes"

    @property
    def events(self) -> Path:
        """Parquet directory of the prepared events (EVENT_SCHEMA)."""
        return self.prepared / "events"

    @property
    def pairs(self) -> Path:
        """Mined pairs and their split."""
        return self.root / "pairs"

    @property
    def train_notes(self) -> Path:
        """The notes of the training pairs, memory-mapped (:mod:`notellm2_ray.core.note_store`)."""
        return self.pairs / "train_notes.arrow"

    @property
    def test_pairs(self) -> Path:
        return self.pairs / "test.parquet"

    @property
    def test_pool(self) -> Path:
        """Ids of the notes that the test pairs are searched in."""
        return self.pairs / "test_pool.parquet"

    @property
    def pair_popularity(self) -> Path:
        """Clicks of each note, in the log of its side and in the training log."""
        return self.pairs / "popularity.parquet"

    @property
    def train_log(self) -> Path:
        """When the log that the training pairs were mined from begins and ends."""
        return self.pairs / "train_log.json"

    @property
    def pair_statistics(self) -> Path:
        return self.pairs / "statistics.json"

    # --- embedders

    @property
    def tiny(self) -> Path:
        """The tiny LLM and CLIP trained from scratch."""
        return self._of_seed("tiny")

    @property
    def tiny_llm(self) -> Path:
        return self.tiny / "llm"

    @property
    def tiny_clip(self) -> Path:
        return self.tiny / "clip"

    def embedder(self, name: str) -> Path:
        """A training run of an embedder, as in ``notellm2-seed42``."""
        return self.root / "embedders" / name

    def embedder_model(self, name: str) -> Path:
        """Its self-describing model directory."""
        return self.embedder(name) / "model"

    def embedder_history(self, name: str) -> Path:
        """Its logged steps, JSON lines."""
        return self.embedder(name) / "history.jsonl"

    def embeddings(self, name: str, pool: str) -> Path:
        """Blocks of vectors of a pool of notes: ``all``, ``test`` or ``train``."""
        return self.root / "embeddings" / (name if pool == "all" else f"{name}-{pool}")

    def embedding_table(self, name: str, pool: str) -> Path:
        """The Lance table compiled of them."""
        directory = self.embeddings(name, pool)
        return directory.with_name(directory.name + _TABLE)

    def index(self, name: str) -> Path:
        """The ANN index over an embedder's table."""
        return self.root / "index" / name

    def negatives(self, name: str) -> Path:
        """Hard negatives of the training pairs, mined from an embedder's vectors."""
        return self.root / "negatives" / name

    def negative_table(self, name: str) -> Path:
        """The training pairs with the column ``negatives``."""
        return self.negatives(name) / "negatives.parquet"

    def semantic_ids(self, name: str) -> Path:
        """Semantic ids of the notes in an embedder's table, and their codebooks."""
        return self.root / "semantic_ids" / name

    # --- the recommender

    @property
    def sequences(self) -> Path:
        """Histories, blocks, targets and candidates."""
        return self._of_seed("sequences")

    @property
    def sequence_table(self) -> Path:
        return self.sequences / "sequences.parquet"

    @property
    def sequence_statistics(self) -> Path:
        return self.sequences / "statistics.json"

    def blocks(self, history: str = "") -> Path:
        """Blocks of history. ``history``: "" for the users' own, "published" for the published construction's."""
        return self.sequences / (f"{history}_blocks.parquet" if history else "blocks.parquet")

    def examples(self, part: str) -> Path:
        """Targets with their histories: ``train``, ``valid``, ``test`` or ``published``."""
        return self.sequences / f"{part}.parquet"

    def candidates(self, protocol: str) -> Path:
        """Test candidates of a protocol."""
        return self.sequences / "candidates" / f"{protocol}.parquet"

    def popularity(self, protocol: str) -> Path:
        """Clicks of each note that may be known under a protocol."""
        return self.sequences / ("published_popularity.parquet" if protocol == "published" else "popularity.parquet")

    @property
    def tiny_mllm(self) -> Path:
        """The tiny multimodal LLM trained from scratch."""
        return self._of_seed("tiny_mllm")

    @property
    def image_summaries(self) -> Path:
        return self._of_seed("image_summaries")

    @property
    def summary_table(self) -> Path:
        """Note id and image summary."""
        return self.image_summaries / "summaries.parquet"

    def preferences(self, variant: str, history: str = "") -> Path:
        """Preferences of a variant, made from a history (see :meth:`blocks`)."""
        return self._of_seed("preferences") / (f"{variant}-{history}" if history else variant)

    def preference_table(self, variant: str, history: str = "") -> Path:
        return self.preferences(variant, history) / "preferences.parquet"

    def preference_logs(self, variant: str, history: str = "") -> Path:
        """Logs of finished calls, apart from the output, so that a history that grew by a block costs one call."""
        return self._of_seed("preference_logs") / self.preferences(variant, history).name

    def ranker(self, name: str) -> Path:
        """A tuning run of a ranker, as in ``mllm_msr-seed42``."""
        return self.root / "rankers" / name

    def ranker_model(self, name: str) -> Path:
        """Its model with the adapter merged in."""
        return self.ranker(name) / "model"

    def ranker_history(self, name: str) -> Path:
        """Its logged steps, JSON lines."""
        return self.ranker(name) / "history.jsonl"

    def scores(self, name: str, protocol: str) -> Path:
        """One model's scores of one protocol's candidates."""
        return self._of_seed("scores") / name / protocol

    def score_table(self, name: str, protocol: str) -> Path:
        return self.scores(name, protocol) / "scores.parquet"

    # --- reports, sweeps, the service

    @property
    def report(self) -> Path:
        """The reports of both halves, and their front page."""
        return self.root / "report"

    @property
    def recall_report(self) -> Path:
        return self.report / "retrieval"

    @property
    def ranking_report(self) -> Path:
        return self.report / "ranking"

    @property
    def sweeps(self) -> Path:
        return self.root / "sweeps"

    def sweep_results(self) -> list[Path]:
        """The results of finished sweeps."""
        return sorted(self.sweeps.glob("*/sweep.json"))

    @property
    def serving(self) -> Path:
        """The service's live table, keys and users."""
        return self.root / "serving"
