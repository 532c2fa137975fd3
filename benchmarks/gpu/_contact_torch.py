"""The parts of first_contact.py that need PyTorch and transformers alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from _contact_shapes import Record, device_of, lengths_of, middle, prepared, qwen3_vl_2b, size, small
from _device import copy_rate, matrix_rate, peak_gib, reset_peak, seconds_each
from _flops import count
from embedder import GOALS, Setup, build, measure_embedding
from torch.utils.flop_counter import FlopCounterMode

from notellm2_ray.core.settings import ModelSettings, TrainSettings
from notellm2_ray.core.settings.train import LoraSettings
from notellm2_ray.models.embedder.encoder import NoteEncoder
from notellm2_ray.models.embedder.network import model_from_configs
from notellm2_ray.models.vision.pixels import ImageSettings
from notellm2_ray.train import distributed


def card(tiny: bool) -> Iterator[Record]:
    """What the card itself does: the measure of everything else."""
    device = device_of(tiny)
    rate = matrix_rate(device, 512 if tiny else 8192)
    yield Record("bfloat16 product", rate / 1e12, "TFLOP/s", flops=rate)
    yield Record("copy within its memory", copy_rate(device) / 1e9, "GB/s")


def collectives(tiny: bool, ranks: int | None = None) -> Iterator[Record]:
    """Every collective of training, with the types and on the devices that training passes.

    On one GPU there is one rank: NCCL refuses two on one card. What is tested there is that NCCL takes the tensors.
    """
    ranks = ranks or (2 if tiny else min(2, torch.cuda.device_count()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    arguments = (ranks, address, tiny)
    if ranks == 1:
        seconds = _rank(0, *arguments)
    else:
        context = torch.multiprocessing.spawn(_in_file, (arguments, address.rpartition(":")[2]), nprocs=ranks)
        assert context is None
        path = _result_file(address.rpartition(":")[2])
        seconds = torch.load(path)
        os.unlink(path)
    backend = "gloo" if tiny else "nccl"
    for name, taken in seconds.items():
        yield Record(f"{name}, {ranks} rank(s) of {backend}", 1e3 * taken, "ms", note="right")


def _result_file(name: str) -> str:
    return f"/tmp/first-contact-{name}.pt"


def _in_file(rank: int, arguments: tuple[int, str, bool], name: str) -> None:
    seconds = _rank(rank, *arguments)
    if rank == 0:
        torch.save(seconds, _result_file(name))


def _rank(rank: int, ranks: int, address: str, tiny: bool) -> dict[str, float]:
    """Check each collective's result on this rank; the seconds that each took the second time."""
    device = torch.device("cpu") if tiny else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if tiny else "nccl", init_method=address, rank=rank, world_size=ranks)
    try:
        work = _collectives(rank, ranks, device, rows=64 if tiny else 4096)
        return {name: seconds_each(device, lambda _, f=f: f(), warm_up=1, times=3) for name, f in work.items()}
    finally:
        dist.destroy_process_group()


def _collectives(rank: int, ranks: int, device: torch.device, rows: int) -> dict[str, Any]:
    def with_gradients() -> None:
        vectors = torch.full((rows, 64), float(rank), device=device, requires_grad=True)
        gathered = distributed._GatherRows.apply(vectors)
        gathered.sum().backward()
        assert gathered.shape == (ranks * rows, 64) and gathered[-1, 0] == ranks - 1
        assert (vectors.grad == ranks).all()

    def gather(tensor: torch.Tensor) -> None:
        found = distributed._all_gather(tensor)
        assert found.device == tensor.device and found.dtype == tensor.dtype and len(found) == ranks * len(tensor)

    def loss() -> None:
        mean = distributed.for_group(torch.tensor(float(rank)).double())  # on the CPU, as a loop has it
        dist.all_reduce(mean)
        assert float(mean) == sum(range(ranks))

    def objects() -> None:
        found: list[Any] = [None] * ranks
        dist.all_gather_object(found, {"rank": rank})
        assert found == [{"rank": number} for number in range(ranks)]
        first = [{"of": rank}]
        dist.broadcast_object_list(first, src=0)
        assert first == [{"of": 0}]

    finite = torch.ones(rows, dtype=torch.bool, device=device)
    shard = torch.zeros(rows * 1024, device=device)
    return {
        "vectors with gradients": with_gradients,
        "note keys on the CPU": lambda: gather(torch.arange(rows)),
        "finite": lambda: gather(finite),
        "ZeRO's shard": lambda: gather(shard),
        "loss on the CPU": loss,
        "objects": objects,
        "barrier": dist.barrier,
    }


def embedding(tiny: bool) -> Iterator[Record]:
    """The bare loop on batches in page-locked memory, prompts full."""
    setup = small(tiny)
    model = build(setup, setup.device)
    flops = count(setup.settings, setup.llm, setup.vision, setup.num_tokens).forward
    for notes in setup.embed_notes:
        speed, rate, peak, *_ = measure_embedding(setup, model, notes, flops)
        yield Record(f"{size('0.6B', tiny)}, {notes} full prompts", speed, "notes/s", rate, peak, GOALS["embedding"])


def mllm(tiny: bool) -> Iterator[Record]:
    """A Qwen3-VL-2B as embedder. Operations are PyTorch's count, which takes the whole square of attention."""
    from notellm2_ray.models.embedder.mllm_inputs import MllmBatch
    from notellm2_ray.models.embedder.mllm_network import MllmModel, network_from_config

    device, config = device_of(tiny), qwen3_vl_2b(tiny)
    side, texts = (4, 12) if tiny else (28, 110)  # patches of an image's side, and tokens of the text
    torch.manual_seed(0)
    settings = ModelSettings(kind="mllm", llm="Qwen/Qwen3-VL-2B-Instruct")  # a name alone: nothing is loaded
    with device:
        model = MllmModel(settings, network_from_config(config, "sdpa"))
    model.to_precision("bf16").eval().requires_grad_(False)

    def batch(notes: int) -> MllmBatch:
        image = side * side // 4
        ids = torch.randint(10, 400, (notes, texts + image))
        ids[:, 2 : 2 + image] = config.image_token_id
        ids[:, 1] = config.vision_start_token_id
        vision = {
            "pixel_values": torch.randn(notes * side * side, 3 * 2 * 16 * 16),
            "image_grid_thw": torch.tensor([[1, side, side]] * notes),
        }
        types = (ids == config.image_token_id).long()
        rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
        return MllmBatch(rows, torch.full((notes,), texts + image - 1), vision)

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(batch(1).to(device))
    flops = counter.get_total_flops()
    for notes in (2, 4) if tiny else (32, 128):
        given = batch(notes)
        given = given if tiny else given.pin_memory()

        @torch.inference_mode()
        def embed(_: int, given: MllmBatch = given) -> torch.Tensor:
            return model(given.to(device, non_blocking=True)).multimodal.cpu()

        reset_peak(device)
        rate = notes / seconds_each(device, embed, times=5)
        yield Record(
            f"{size('Qwen3-VL-2B', tiny)}, {notes} notes, {texts + side * side // 4} tokens",
            *(rate, "notes/s", flops * rate, peak_gib(device), GOALS["embedding"]),
        )


def step(tiny: bool) -> Iterator[Record]:
    """Whole training steps of a 3B shape by the package's own engine: float32 weights and moments, real lengths."""
    setup = middle(tiny)
    for how in ("eager", "compiled"):
        for pairs in (4,) if tiny else (64, 32, 16):
            train = TrainSettings(engine="plain", precision="bf16", batch_pairs=pairs, learning_rate=1e-6)
            what = f"{size('3B', tiny)}, float32 masters, {pairs} pairs, {how}"
            record = _step_record(what, setup, train, how == "compiled")
            yield record
            if record.value is not None:
                break


def lora(tiny: bool) -> Iterator[Record]:
    """The same with LoRA: frozen linear layers in bfloat16, whose weights have no gradient."""
    pairs = 4 if tiny else 64
    train = TrainSettings(
        engine="plain", precision="bf16", batch_pairs=pairs, learning_rate=1e-5, lora=LoraSettings(rank=16)
    )
    yield _step_record(f"{size('3B', tiny)}, LoRA, {pairs} pairs", middle(tiny), train)


def _step_record(what: str, setup: Setup, train: TrainSettings, compiled: bool = False) -> Record:
    given = [prepared(setup, 2 * train.batch_pairs, train.length_chunks, seed) for seed in range(3)]
    flops = _training_flops(setup, given, with_weights=train.lora is None)
    try:
        model = _network(setup)
        if train.lora is not None:
            _adapt(setup, model, train.lora)
        if compiled:
            for layer in model.llm.layers:
                layer.compile(dynamic=True)
        seconds, peak = _step_seconds(setup, model, train, given)
    except torch.OutOfMemoryError:
        seconds = peak = 0.0
    if not seconds:  # outside of the handler, whose traceback holds the tensors
        torch.cuda.empty_cache()
        return Record(what, note="does not fit into this card's memory")
    return Record(what, 2 * train.batch_pairs / seconds, "notes/s", flops / seconds, peak, GOALS["training"])


def _adapt(setup: Setup, model: Any, lora: LoraSettings) -> None:
    from notellm2_ray.models.embedder.adapt import adapt_llm
    from notellm2_ray.models.lora import store_frozen_linears_in_bf16

    encoder = NoteEncoder(model, SimpleNamespace(settings=setup.settings))
    store_frozen_linears_in_bf16(adapt_llm(encoder, lora, 0))


def cached(tiny: bool) -> Iterator[Record]:
    """Gradient caching at 4,096 notes. The forward passes that it repeats are not counted as work."""
    setup = small(tiny)
    notes, each = (32, 8) if tiny else (4096, 128)
    train = TrainSettings(
        engine="plain", precision="bf16", batch_pairs=notes // 2, learning_rate=1e-6, cached_notes_per_pass=each
    )
    given = [prepared(setup, notes, notes // each, 0)]
    seconds, peak = _step_seconds(setup, _network(setup), train, given, times=2)
    flops = _training_flops(setup, given)
    what = f"{size('0.6B', tiny)}, {notes} notes in passes of {each}"
    yield Record(what, notes / seconds, "notes/s", flops / seconds, peak, note="a whole step would count 4/3")


def _network(setup: Setup) -> Any:
    """In float32, with random weights and a frozen tower."""
    torch.manual_seed(0)
    image = ImageSettings(setup.vision.image_size)
    with setup.device:
        return model_from_configs(setup.settings, setup.llm, setup.vision.to_dict(), image, attention="sdpa").train()


def _training_flops(setup: Setup, given: list[Any], with_weights: bool = True) -> float:
    """Operations of a step, padding left out; without those of the LLM's gradients if its weights are frozen."""
    lengths = [length for notes in given for length in lengths_of(notes)]
    parts = [count(setup.settings, setup.llm, setup.vision, length) for length in lengths]
    return sum(one.training - (0 if with_weights else one.llm) for one in parts) / len(given)


def _step_seconds(
    setup: Setup, model: Any, train: TrainSettings, given: list[Any], times: int = 5
) -> tuple[float, float]:
    """Median seconds of a step, from batches in host memory to updated weights; peak GiB."""
    from notellm2_ray.train.engines import make_engine
    from notellm2_ray.train.gradient_cache import begin_step
    from notellm2_ray.train.objectives import loss_of
    from notellm2_ray.train.step import EmbedderStep

    module = EmbedderStep(model, loss=loss_of(setup.settings, train), bf16=True)
    engine = make_engine(module, train, setup.device)
    keys = torch.arange(2 * train.batch_pairs, device=setup.device)

    def take(number: int) -> None:
        out, update = begin_step(engine, given[number % len(given)], keys, cached=train.caches_gradients)
        update(1.0)
        assert out.loss.isfinite()

    reset_peak(setup.device)
    return seconds_each(setup.device, take, warm_up=len(given), times=times), peak_gib(setup.device)
