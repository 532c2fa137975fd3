"""The parts of first_contact.py that need more than PyTorch and transformers: whole jobs, DeepSpeed, vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _contact_shapes import Record, device_of, save_models, size, small
from _photos import write_photos

from notellm2_ray.core.settings import EmbedSettings, RaySettings, TrainSettings

ROOT = Path(__file__).parents[2]
PIPELINE = 0.9  # goal: share of the bare loop


def pipeline(tiny: bool) -> Iterator[Record]:
    """Bulk embedding from Parquet with real JPEGs, beside the bare loop on notes that are read already."""
    import importlib.util

    from notellm2_ray.models.embedder.build import build_encoder

    with tempfile.TemporaryDirectory() as directory:
        setup, rows = small(tiny), 16 if tiny else 256
        llm, vision = save_models(Path(directory), setup)
        encoder = build_encoder(setup.settings, 0, llm_path=llm, vision_path=vision)
        encoder.save_pretrained(Path(directory) / "model")
        del encoder
        settings = EmbedSettings(chunk_rows=rows, gpus_per_actor=0 if tiny else 1)
        model = Path(directory) / "model"
        counts = [1] if tiny else [workers for workers in (1, 4, 16) if workers <= (os.cpu_count() or 1)]
        side = 256 if tiny else 768
        tables = {
            workers: write_photos(Path(directory) / f"{workers}.parquet", rows * (4 + 4 * workers), side, rows)
            for workers in counts
        }
        bare = _bare(model, tables[1], settings)
        yield Record(f"{size('0.6B', tiny)}, bare loop on read notes", bare, "notes/s")
        for workers in counts:
            rate = _through_processes(model, tables[workers], settings, workers)
            yield _compared(f"Parquet, {workers} reading processes", rate, bare)
        if importlib.util.find_spec("ray") is None or importlib.util.find_spec("lance") is None:
            yield Record("the same through Ray Data", note="skipped: ray or lance is not installed")
            return
        for workers in counts:
            rate = _through_ray(model, tables[workers], settings, workers)
            yield _compared(f"Parquet through Ray Data, {workers} readers", rate, bare)


def _compared(what: str, rate: float, bare: float) -> Record:
    return Record(
        what, rate, "notes/s", note=f"{rate / bare:.2f} of the bare loop (goal: {PIPELINE} where CPUs suffice)"
    )


def _job(model: Path, output: str, settings: EmbedSettings) -> Any:
    from notellm2_ray.infer.embed_reading import EmbedJob

    return EmbedJob(str(model), output, {"embedding": "multimodal"}, None, settings)


def _bare(model: Path, notes: Path, settings: EmbedSettings) -> float:
    from notellm2_ray.infer.chunks import list_note_files, plan_chunks
    from notellm2_ray.infer.embed_reading import Reading
    from notellm2_ray.infer.embed_worker import encode
    from notellm2_ray.models.embedder.encoder import NoteEncoder

    encoder = NoteEncoder.from_pretrained(model, device=settings.device)
    reading = Reading(_job(model, "", settings), encoder.preprocessor)
    chunks = plan_chunks(list_note_files(notes), settings.chunk_rows, "").chunks[:2]
    features = [one["embedding"] for chunk in chunks for _, one in reading(chunk).features]
    encode(encoder, features, settings)
    times = 5
    started = time.perf_counter()
    encode(encoder, features * times, settings)
    return len(features) * times / (time.perf_counter() - started)


def _through_processes(model: Path, notes: Path, settings: EmbedSettings, workers: int) -> float:
    """The product's reader and encoder without Ray; notes/s from the end of the first chunk to that of the last."""
    import pyarrow as pa

    from notellm2_ray.infer.chunks import list_note_files, plan_chunks
    from notellm2_ray.infer.embed_worker import ChunkEmbedder, embedded_parts
    from notellm2_ray.infer.part_actors import CALLS_AT_ONCE

    with tempfile.TemporaryDirectory() as output:
        job = _job(model, output, settings)
        embedded_parts(Path(output)).clear_leftovers([])
        chunks = plan_chunks(list_note_files(notes), settings.chunk_rows, "").chunks
        actor, ends = ChunkEmbedder(job), []
        with (
            ProcessPoolExecutor(workers, get_context("spawn"), _start_reader, (job,)) as readers,
            ThreadPoolExecutor(CALLS_AT_ONCE) as calls,
        ):
            tables = [pa.Table.from_pylist([chunk._asdict()]) for chunk in chunks]
            read = [readers.submit(_read, table) for table in tables]
            for call in as_completed([calls.submit(lambda one: actor(one.result()), one) for one in read]):
                (report,) = call.result().to_pylist()
                assert report["error"] is None, report
                ends.append((time.perf_counter(), report["embedded"]))
    return sum(count for _, count in ends[1:]) / (ends[-1][0] - ends[0][0])


_READER: list[Any] = []  # of this process


def _start_reader(job: Any) -> None:
    from notellm2_ray.infer.embed_reading import ChunkReader

    torch.set_num_threads(1)
    _READER.append(ChunkReader(job))


def _read(table: Any) -> Any:
    return _READER[0](table)


def _through_ray(model: Path, notes: Path, settings: EmbedSettings, workers: int) -> float:
    from notellm2_ray.core.cluster import connect
    from notellm2_ray.infer.embed import embed_notes

    cpus = max(workers + 2, os.cpu_count() or 1)
    ray = connect(RaySettings(num_cpus=cpus, object_store_gb=0.5 if settings.device == "cpu" else 16))
    try:
        with tempfile.TemporaryDirectory() as output:
            counts = embed_notes(model, notes, Path(output) / "out", settings.model_copy(update={"readers": workers}))
    finally:
        ray.shutdown()
    seconds = counts["embed_seconds"] - counts["startup_seconds"]
    return (counts["notes"] - settings.chunk_rows) / seconds


def training(tiny: bool) -> Iterator[Record]:
    """`train_embedder` by Ray Train with ZeRO-3 on real JPEGs: killed in the middle, and continued."""
    import psutil

    from notellm2_ray.train.history import read_history

    with tempfile.TemporaryDirectory() as directory:
        _write_training_set(Path(directory), tiny)
        command = [sys.executable, __file__, directory, "tiny" if tiny else "full"]
        history = Path(directory) / "out" / "history.jsonl"

        def start(log: str) -> subprocess.Popen:
            with open(Path(directory) / log, "w") as file:
                return subprocess.Popen(command, env=_environment(), stdout=file, stderr=subprocess.STDOUT)

        def steps() -> int:
            return len([row for row in read_history(history) if "loss" in row]) if history.exists() else 0

        settings, started = _train_settings(tiny), time.monotonic()
        assert settings.max_steps is not None
        driver = start("killed.log")
        while steps() <= settings.checkpoint_every_steps and driver.poll() is None:
            time.sleep(0.05)
        if driver.poll() is not None:
            raise RuntimeError((Path(directory) / "killed.log").read_text()[-2000:])
        yield Record("until the first checkpoint was left behind", time.monotonic() - started, "s")
        family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        seen = steps()
        for process in family:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        driver.wait()
        psutil.wait_procs(family, 10)
        started = time.monotonic()
        driver = start("continued.log")
        log = Path(directory) / "continued.log"
        if driver.wait():
            raise RuntimeError(log.read_text()[-2000:])
        result = json.loads(log.read_text().strip().splitlines()[-1])
        assert steps() == settings.max_steps == result["steps"], "steps were lost or repeated"
        note = f"killed with SIGKILL after {seen} of {settings.max_steps} steps"
        yield Record("continued to the end", time.monotonic() - started, "s", note=note)
        yield Record(f"{size('0.6B', tiny)}, ZeRO-3, JPEGs, checkpoints", result["notes_per_s"], "notes/s")


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _train_settings(tiny: bool) -> TrainSettings:
    sizes = {"batch_pairs": 4, "max_steps": 12, "checkpoint_every_steps": 4, "precision": "fp32"}
    if not tiny:
        sizes = {"batch_pairs": 64, "max_steps": 40, "checkpoint_every_steps": 10, "cpus_per_worker": 8}
    fixed = {"engine": "deepspeed", "zero_stage": 3, "epochs": 1000, "learning_rate": 1e-5, "prefetch_batches": 4}
    return TrainSettings(
        **fixed, **sizes, validate_every_steps=int(sizes["max_steps"]), gpus_per_worker=0 if tiny else 1
    )


def _write_training_set(directory: Path, tiny: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from notellm2_ray.core.note_store import NoteStore
    from notellm2_ray.core.schema import PAIR_SCHEMA

    save_models(directory, small(tiny))
    count = 24 if tiny else 2048
    notes = write_photos(directory / "notes.parquet", count, 256 if tiny else 768, 256)
    (directory / "pairs").mkdir()
    NoteStore.write(directory / "pairs" / "train_notes.arrow", pq.read_table(notes).to_batches())
    draw = np.random.default_rng(0)
    for name, pairs in (("train", 2 * count), ("valid", 16)):
        chosen = [draw.choice(count, 2, replace=False) for _ in range(pairs)]
        rows = [{"query_id": f"n{one}", "target_id": f"n{other}", "score": 1.0} for one, other in chosen]
        pq.write_table(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA), directory / "pairs" / f"{name}.parquet")


def _train(directory: Path, tiny: bool) -> dict[str, Any]:
    from notellm2_ray.train.embedder import train_embedder

    return train_embedder(
        small(tiny).settings,
        _train_settings(tiny),
        1,
        pairs=directory / "pairs",
        llm_path=str(directory / "llm"),
        vision_path=str(directory / "vision"),
        output=directory / "out",
    )


def offload(tiny: bool) -> Iterator[Record]:
    """DeepSpeed's AdamW on the CPU: how long it takes to build, and how fast it updates pinned float32 weights."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    count = 2**22 if tiny else 2**29
    weight = torch.zeros(count, pin_memory=not tiny, requires_grad=True)
    started = time.perf_counter()
    optimizer = DeepSpeedCPUAdam([weight], lr=1e-5)
    yield Record("built (or loaded, if it was built before)", time.perf_counter() - started, "s")
    weight.grad = torch.full((count,), 1e-3)
    optimizer.step()
    times = 3
    started = time.perf_counter()
    for _ in range(times):
        optimizer.step()
    rate = times * count / (time.perf_counter() - started)
    yield Record("updated", rate / 1e9, "G weights/s", note=f"{torch.get_num_threads()} OpenMP threads")
    if not tiny:
        on_card = torch.empty(count, device="cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        on_card.copy_(weight.detach())
        torch.cuda.synchronize()
        yield Record("page-locked memory to the card", 4 * count / (time.perf_counter() - started) / 1e9, "GB/s")


def vllm(tiny: bool) -> Iterator[Record]:
    """vLLM on the 0.6B shape with random weights: its start, and prompts that share a prefix."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from transformers import AutoTokenizer, Qwen2Config
    from vllm import LLM, SamplingParams

    setup = small(tiny)
    if tiny:
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        setup = setup._replace(llm=Qwen2Config(**narrow, num_key_value_heads=1, vocab_size=8192))
    with tempfile.TemporaryDirectory() as directory:
        llm, _ = save_models(Path(directory), setup)
        vocabulary = len(AutoTokenizer.from_pretrained(llm))
        started = time.perf_counter()
        engine = LLM(llm, max_model_len=1024, gpu_memory_utilization=0.5, dtype="bfloat16", enforce_eager=tiny)
        yield Record("engine started", time.perf_counter() - started, "s")
        draw = np.random.default_rng(0)
        count, shared, own = (8, 64, 16) if tiny else (2048, 384, 64)
        prefix = draw.integers(10, vocabulary, shared).tolist()
        asked = [{"prompt_token_ids": prefix + draw.integers(10, vocabulary, own).tolist()} for _ in range(count)]
        for tokens in (1, 16 if tiny else 128):
            how = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            started = time.perf_counter()
            engine.generate(asked, how, use_tqdm=False)
            rate = count / (time.perf_counter() - started)
            yield Record(f"{count} prompts of {shared + own} tokens, {tokens} new", rate, "answers/s")


if __name__ == "__main__":
    assert device_of(sys.argv[2] == "tiny")
    print(json.dumps(_train(Path(sys.argv[1]), sys.argv[2] == "tiny")))
