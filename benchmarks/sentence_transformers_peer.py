"""Our embedder against sentence-transformers: the same LLM, the same prompts token for token, the same machine.

    python benchmarks/sentence_transformers_peer.py LLM_DIRECTORY
    python benchmarks/sentence_transformers_peer.py LLM_DIRECTORY --notes 200 --steps 4

Prints notes per second of both, and their ratio, for embedding (bfloat16 weights), for full training steps, for steps
with LoRA, and for those with gradient caching, 16 texts a pass (bfloat16 autocast over float32 weights, which is what
both do when asked for bf16). The peer is set up as its documentation says: SentenceTransformer with last-token pooling
and a dense layer to 64, its trainer, and MultipleNegativesRankingLoss or CachedMultipleNegativesRankingLoss. The first
steps of a training are left out on both sides. Its trainer needs the package datasets.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _measure import machine
from _world import SEED, write_world_notes

from notellm2_ray.core.config import build
from notellm2_ray.core.schema import NOTE_SCHEMA, PAIR_SCHEMA, Note, iter_notes
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.core.settings.train import TrainSettings

WARM_UP = 2  # steps
CACHED = 16  # texts in a pass
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0}


def model_settings(llm: str) -> ModelSettings:
    return ModelSettings(llm=llm, variant="text_only", prompt_language="en")


def prompts(encoder: Any, notes: Sequence[Note]) -> list[str]:
    """The prompts that our embedder reads, as texts."""
    tokenizer = encoder.preprocessor.tokenizer
    return [tokenizer.decode(encoder.preprocessor.features(note).input_ids) for note in notes]


def peer(llm: str, *, bf16: bool, lora: bool = False) -> Any:
    """The LLM in sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer

    dtype = torch.bfloat16 if bf16 else torch.float32
    words = Transformer(llm, model_kwargs={"torch_dtype": dtype})
    width = words.get_word_embedding_dimension()
    dense = Dense(width, 64, bias=False, activation_function=torch.nn.Identity()).to(dtype)
    model = SentenceTransformer(modules=[words, Pooling(width, pooling_mode="lasttoken"), dense], device="cpu")
    if model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token
    if lora:
        from peft import LoraConfig

        model.add_adapter(
            LoraConfig(
                r=LORA["rank"],  # type: ignore[arg-type]
                lora_alpha=LORA["alpha"],  # type: ignore[arg-type]
                lora_dropout=LORA["dropout"],
                target_modules="all-linear",
            )
        )
    return model


def embedding(llm: str, notes: Sequence[Note], repeats: int) -> tuple[float, float]:
    """Notes per second: ours, and the peer's."""
    from notellm2_ray.models.embedder.build import build_encoder

    ours = build_encoder(model_settings(llm), SEED, llm_path=llm, vision_path="", precision="bf16")
    theirs, texts = peer(llm, bf16=True), prompts(ours, notes)
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    ours.encode(notes[:32])
    theirs.encode(texts[:32])
    for _ in range(repeats):
        started = time.perf_counter()
        ours.encode(notes)
        spent["ours"].append(time.perf_counter() - started)
        started = time.perf_counter()
        theirs.encode(texts, batch_size=32, normalize_embeddings=True)
        spent["theirs"].append(time.perf_counter() - started)
    return len(notes) / statistics.median(spent["ours"]), len(notes) / statistics.median(spent["theirs"])


def our_training(llm: str, notes: Sequence[Note], arguments: argparse.Namespace, *, lora: bool, cached: bool) -> float:
    """Notes per second of our training steps."""
    import torch

    from notellm2_ray.core.note_store import NoteStore
    from notellm2_ray.train.embedder_run import EmbedderJob, EmbedderRun

    with tempfile.TemporaryDirectory() as home:
        directory = Path(home)
        rows = [{**note._asdict(), "topics": list(note.topics), "created_at": None} for note in notes]
        NoteStore.write(directory / "train_notes.arrow", pa.Table.from_pylist(rows, NOTE_SCHEMA).to_batches())
        ids = [note.note_id for note in notes]
        half = len(ids) // 2
        columns: dict[str, list[Any]] = {
            "query_id": ids[:half],
            "target_id": ids[half : 2 * half],
            "score": [1.0] * half,
        }
        for split, num in (("train", half), ("valid", 1)):
            table = pa.table({name: values[:num] for name, values in columns.items()})
            pq.write_table(table.cast(PAIR_SCHEMA), directory / f"{split}.parquet")
        train = build(
            TrainSettings,
            {
                "engine": "plain",
                "batch_pairs": arguments.pairs,
                "max_steps": arguments.steps,
                "epochs": 1000,
                "precision": "bf16",
                "learning_rate": 1e-5,
                "validate_every_steps": 10**6,
                "max_validation_pairs": 1,
                "lora": LORA if lora else None,
                "cached_notes_per_pass": CACHED if cached else None,
            },
        )
        (directory / "out").mkdir()
        job = EmbedderJob(model_settings(llm), train, SEED, directory, llm, "", directory / "out")
        run = EmbedderRun(job, torch.device("cpu"), lambda path, figures: None)
        return median_rate(run, arguments)


def median_rate(run: Any, arguments: argparse.Namespace) -> float:
    """Notes per second of a run's median step after the first ones."""
    import json

    run.run()
    rows = [json.loads(line) for line in run.files.history.read_text().splitlines()]
    return statistics.median([row["notes_per_s"] for row in rows if "notes_per_s" in row][WARM_UP:])


def their_training(llm: str, texts: Sequence[str], arguments: argparse.Namespace, *, lora: bool, cached: bool) -> float:
    """Notes per second of the peer's training steps."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *given: Any, **more: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *given: Any, **more: Any) -> None:
            marks.append(time.perf_counter())

    model, half = peer(llm, bf16=False, lora=lora), len(texts) // 2
    whole = MultipleNegativesRankingLoss(model)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=CACHED) if cached else whole
    with tempfile.TemporaryDirectory() as home:
        settings = SentenceTransformerTrainingArguments(
            output_dir=home,
            per_device_train_batch_size=arguments.pairs,
            max_steps=arguments.steps,
            learning_rate=1e-5,
            bf16=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        SentenceTransformerTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict({"anchor": list(texts[:half]), "positive": list(texts[half : 2 * half])}),
            loss=loss,
            callbacks=[Clock()],
        ).train()
    spent = np.diff(marks)[::2][WARM_UP:]
    return 2 * arguments.pairs / float(np.median(spent))


def show(what: str, ours: float, theirs: float, goal: float) -> None:
    print(
        f"{what:22s} ours {ours:7.2f} notes/s   theirs {theirs:7.2f} notes/s   RATIO {ours / theirs:.2f} (goal {goal})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llm", help="directory of a causal LM")
    parser.add_argument("--notes", type=int, default=256, help="notes of the world")
    parser.add_argument("--repeats", type=int, default=3, help="turns of embedding")
    parser.add_argument("--pairs", type=int, default=16, help="pairs in a training batch")
    parser.add_argument("--steps", type=int, default=8, help=f"training steps; the first {WARM_UP} are not counted")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    import torch

    from notellm2_ray.models.embedder.build import build_encoder

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as home:
        source = write_world_notes(Path(home) / "notes", arguments.notes, 1000)
        notes = [note._replace(image=None) for note in iter_notes(pq.read_table(source))]
    encoder = build_encoder(model_settings(arguments.llm), SEED, llm_path=arguments.llm, vision_path="")
    texts, lengths = prompts(encoder, notes), [encoder.preprocessor.features(note).num_tokens for note in notes]
    del encoder
    what = f"{len(notes)} notes of {min(lengths)} to {max(lengths)} tokens"
    print(f"{machine()}; {arguments.threads} torch thread(s), {what}", flush=True)
    show("embedding", *embedding(arguments.llm, notes, arguments.repeats), goal=1.5)
    ways: dict[str, dict[str, bool]] = {
        "training, all weights": {"lora": False, "cached": False},
        "training, LoRA": {"lora": True, "cached": False},
        "training, LoRA, cached": {"lora": True, "cached": True},
    }
    for name, way in ways.items():
        ours = our_training(arguments.llm, notes, arguments, **way)
        show(name, ours, their_training(arguments.llm, texts, arguments, **way), goal=1.2)


if __name__ == "__main__":
    main()
