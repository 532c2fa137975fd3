"""The packaged models know another world of the same kind, and an embedder learns from both modalities with them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.schema import NOTE_SCHEMA, PAIR_SCHEMA
from notellm2_ray.core.settings import TinySettings
from notellm2_ray.data.sources.world import raw_notes, world_truth
from notellm2_ray.data.world.settings import WorldSettings
from notellm2_ray.lessons.corpus import questions_for_llm
from notellm2_ray.lessons.tastes import lessons
from notellm2_ray.models.packaged import DIRECTORY, PACKAGED, located
from notellm2_ray.models.tiny import llm
from notellm2_ray.pipeline.packaged_models import MADE
from notellm2_ray.presets import load_settings

SEED = 1234  # of a world that neither the packaged models nor the demo have seen
WORLD = WorldSettings(num_notes=600, broken_share=0.0)


def test_they_have_the_sizes_of_models_that_are_trained_from_scratch():
    made = json.loads((DIRECTORY / MADE).read_text())
    sizes = {name for name in TinySettings.model_fields if name.endswith(("layers", "size", "heads", "side"))}
    ours = TinySettings().model_dump()
    assert {name: made["tiny"][name] for name in sizes if name in made["tiny"]} == {
        name: ours[name] for name in sizes if name in made["tiny"]
    }
    assert made["source"]["num_subjects"] == WORLD.num_subjects and made["source"]["num_styles"] == WORLD.num_styles


def test_a_name_that_is_not_theirs_stays():
    assert located("Qwen/Qwen3-0.6B", "llm") == "Qwen/Qwen3-0.6B"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of notes that agree in both hidden factors, one told by the text and one by the image."""
    directory = tmp_path_factory.mktemp("pairs")
    notes = raw_notes(WORLD, SEED, np.arange(WORLD.num_notes)).select(NOTE_SCHEMA.names).cast(NOTE_SCHEMA)
    NoteStore.write(directory / "train_notes.arrow", notes.to_batches())
    truth = world_truth(WORLD, SEED).to_pandas()
    rng, found = np.random.default_rng(0), []
    for _, alike in truth.groupby(["subject", "style"]):
        ids = rng.permutation(alike["note_id"].to_numpy())
        found += [(query, target, 1.0) for query in ids for target in ids if query != target]
    rng.shuffle(found)
    table = pa.table(dict(zip(PAIR_SCHEMA.names, zip(*found, strict=True), strict=True)), schema=PAIR_SCHEMA)
    pq.write_table(table, directory / "train.parquet")
    pq.write_table(table.slice(0, 0), directory / "valid.parquet")
    return directory


@pytest.mark.slow
def test_the_llm_names_the_characteristic_word_of_notes_it_has_not_seen(pairs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = located(PACKAGED, "llm")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    asked = list(questions_for_llm(NoteStore(pairs / "train_notes.arrow"), "en", SEED))[::19]
    assert llm._accuracy(model, llm._rows(AutoTokenizer.from_pretrained(directory), asked)) > 0.6


@pytest.mark.slow
def test_the_mllm_describes_drawings_it_has_not_seen():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from notellm2_ray.models.chat import ChatTokenizer
    from notellm2_ray.models.tiny.mllm import _by_kind, accuracy
    from notellm2_ray.models.tiny.mllm_batches import Pictures

    directory = located(PACKAGED, "mllm")
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    few = {"mllm_drawings": 1, "mllm_topics": 1, "mllm_questions": 1, "mllm_preferences": 1, "mllm_held_out": 100}
    settings = load_settings(None, "demo", [f"seed={SEED}", *(f"tiny.{name}={count}" for name, count in few.items())])
    taught = lessons(settings)
    pictures = Pictures(taught.drawings, AutoProcessor.from_pretrained(directory))
    rows = _by_kind(taught.held_out, ChatTokenizer.from_pretrained(directory), pictures)
    assert accuracy(model, rows["caption"], pictures) > 0.9
    assert accuracy(model, rows["topic"], pictures) > 0.9
    assert accuracy(model, rows["question"], pictures) > 0.7


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_an_embedder_leaves_the_plateau_of_one_modality_within_fifty_steps(pairs, tmp_path, seed, precision):
    from notellm2_ray.train.embedder_run import EmbedderJob, EmbedderRun

    changes = ["train.max_steps=50", "train.batch_pairs=8", "train.engine=plain", f"train.precision={precision}"]
    settings = load_settings(None, "demo", changes)
    paths = {"llm_path": located(PACKAGED, "llm"), "vision_path": located(PACKAGED, "vision")}
    job = EmbedderJob(model=settings.model, train=settings.train, seed=seed, pairs=pairs, output=tmp_path, **paths)
    EmbedderRun(job, torch.device("cpu"), lambda directory, figures: None).run()
    steps = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert np.mean(losses[-10:]) < PLATEAU


PLATEAU = 1.0  # the loss that eight pairs a step reach by the image alone is about 1.2
