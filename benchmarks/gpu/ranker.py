"""The recommender's full-size models on one GPU, on PyTorch and transformers alone: LoRA tuning, scoring, generation.

    PYTHONPATH=. python benchmarks/gpu/ranker.py          # one GPU of 80 GB; LLaVA-v1.6-Mistral-7B and Llama-3-8B
    PYTHONPATH=. python benchmarks/gpu/ranker.py --mllm qwen2-vl-7b
    PYTHONPATH=. python benchmarks/gpu/ranker.py --tiny   # the same script on a CPU, in seconds

The networks are the paper's, with random weights in bfloat16; neither speed nor memory depends on their values. Every
prompt has an image of 512 x 512 pixels (the default ``ranker.max_image_pixels``) and texts of the greatest length.

Printed are:
- a step of tuning, with the package's own step and engines (DeepSpeed's ZeRO 2 too, where it is installed), and P(yes):
  prompts/s, and TFLOP/s against the rate that this card reaches at a bfloat16 product of 8192 x 8192 x 8192;
- image summaries and preferences, made by ``generate`` as in the published code: new tokens/s, and the bytes that must
  be read for them (weights and key-value cache, once a token) against the card's rate of copying;
- peak memory of each.

Reading, tokenising and decoding images are not measured. All of it takes three minutes. vLLM, which the package
generates with, is not measured here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from _device import copy_rate, matrix_rate, peak_gib, reset_peak, seconds_each
from _networks import IMAGE_TOKEN, LLMS, MLLMS, Mllm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from notellm2_ray.core.settings.ranking import PreferenceSettings, RankerSettings, SummarySettings, TuneSettings
from notellm2_ray.models.ranker.inputs import IGNORED, RankerBatch
from notellm2_ray.models.ranker.model import RankerModel, answer_probability, forward_logits
from notellm2_ray.train.engine import Engine
from notellm2_ray.train.engines import make_engine
from notellm2_ray.train.ranker_run import RankerStep, train_settings

YES, NO = 5, 6  # token ids; which ones does not matter
WORDS = 50  # tokens of a ranker prompt's own words
BLOCK = 3 * (45 + 120)  # tokens of three notes' titles and image summaries, of 30 and 80 words at most
SUMMARY_WORDS, PREFERENCE_WORDS = 25, 60


class Setup(NamedTuple):
    """What is measured."""

    mllm_name: str
    llm_name: str
    mllm: Mllm
    tune: TuneSettings
    texts: int  # tokens of a ranker prompt besides its image
    summaries: list[int]  # images at once
    preferences: list[int]  # users at once
    new_tokens: tuple[int, int]  # of a summary, of a preference
    matrix: int  # side of the product that measures the rate
    device: torch.device


def full_size(arguments: argparse.Namespace) -> Setup:
    """The paper's models on a GPU."""
    ranker, tune = RankerSettings(), TuneSettings(precision="bf16", gpus_per_worker=1)
    texts = WORDS + ranker.max_preference_tokens + ranker.max_title_tokens
    new_tokens = (SummarySettings().max_tokens, PreferenceSettings().max_tokens)
    names = (arguments.mllm, arguments.llm, MLLMS[arguments.mllm])
    return Setup(*names, tune, texts, arguments.images, arguments.users, new_tokens, 8192, torch.device("cuda"))


def tiny_size() -> Setup:
    """The same, small enough for a CPU."""
    tune = TuneSettings(precision="bf16", max_batch_tokens=128)
    return Setup("tiny", "tiny", MLLMS["tiny"], tune, 24, [2], [1, 4], (5, 6), 512, torch.device("cpu"))


def build(setup: Setup, kind: Any, config: Any) -> Any:
    """A network in bfloat16 with random weights."""
    torch.manual_seed(0)
    with setup.device:
        return kind.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def prompts(setup: Setup, rows: int, texts: int, number: int = 0) -> RankerBatch:
    """Random full prompts of an image and ``texts`` tokens, in host memory; the last token is the answer."""
    draw = torch.Generator().manual_seed(number)
    tokens = setup.mllm.image_tokens + texts
    ids = torch.randint(10, 900, (rows, tokens), generator=draw)
    before = texts * 3 // 4  # the preference comes before the image, the title after it
    is_image = torch.zeros(rows, tokens, dtype=torch.int64)
    is_image[:, before : before + setup.mllm.image_tokens] = 1
    ids[is_image == 1] = IMAGE_TOKEN
    labels = torch.full((rows, tokens), IGNORED)
    ids[:, -1] = labels[:, -1] = YES
    last = torch.full((rows,), tokens - 2)
    vision = setup.mllm.vision(rows)
    batch = RankerBatch(ids, torch.ones_like(ids), labels, is_image, last, vision)
    if setup.device.type != "cuda":
        return batch
    tensors = [tensor.pin_memory() for tensor in batch[:5]]
    return RankerBatch(*tensors, {name: tensor.pin_memory() for name, tensor in vision.items()})


class Work(NamedTuple):
    """Floating-point operations of one prompt; a multiplication and an addition count as two."""

    scoring: float
    tuning: float


def count(setup: Setup, network: nn.Module) -> Work:
    """Operations of one prompt: PyTorch's own count of its forward pass, minus the unneeded half of causal attention.

    In tuning, the backward pass costs as much as the forward pass through a frozen linear map, and twice as much
    through attention. The tower has no backward pass, and the adapter (0.3% of the weights) is left out.
    """
    batch = prompts(setup, 1, setup.texts).to(setup.device)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward_logits(network, batch, batch.last)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    tower = next(flops for name, flops in by_module.items() if name.endswith((".vision_tower", ".visual")))
    text = network.config.get_text_config()
    tokens = batch.input_ids.shape[1]
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    square, causal = (text.num_hidden_layers * 4 * width * pairs for pairs in (tokens**2, tokens * (tokens + 1) / 2))
    maps = by_module["Global"] - tower - square
    return Work(tower + maps + causal, tower + 2 * maps + 3 * causal)


def measure_tuning(setup: Setup, step: RankerStep, engine: Engine, checkpointing: bool) -> tuple[float, float]:
    """Prompts/s of whole updates of ``tune.batch_size`` prompts, and peak GiB."""
    step.model.set_gradient_checkpointing(checkpointing)
    tokens = setup.texts + setup.mllm.image_tokens
    rows = min(setup.tune.batch_size, max(1, setup.tune.max_batch_tokens // tokens))
    parts = setup.tune.batch_size // rows
    given = [prompts(setup, rows, setup.texts, number) for number in range(parts)]
    step.train()

    def update(_: int) -> None:
        for number, batch in enumerate(given):
            loss = engine(batch.to(setup.device))[0] / setup.tune.batch_size
            if number < parts - 1:
                engine.accumulate(loss)
            else:
                engine.update(loss, 1.0)

    reset_peak(setup.device)
    return rows * parts / seconds_each(setup.device, update, warm_up=2, times=5), peak_gib(setup.device)


def measure_scoring(setup: Setup, network: nn.Module) -> tuple[float, float]:
    """Prompts/s of P(yes), with no prefix shared, and peak GiB."""
    tokens = setup.texts + setup.mllm.image_tokens
    rows = max(1, setup.tune.max_batch_tokens // tokens)
    given = [prompts(setup, rows, setup.texts, number) for number in range(4)]

    def model(batch: RankerBatch, places: torch.Tensor) -> torch.Tensor:
        return forward_logits(network, batch, places)

    @torch.inference_mode()
    def score(number: int) -> torch.Tensor:
        return answer_probability(model, given[number % 4].to(setup.device), YES, NO).cpu()

    network.eval()
    assert score(0).isfinite().all()
    reset_peak(setup.device)
    return rows / seconds_each(setup.device, score), peak_gib(setup.device)


def generate_seconds(setup: Setup, network: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> float:
    """Seconds of one greedy ``generate`` of exactly ``new_tokens`` tokens."""
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    made = network.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    assert made.shape[1] == inputs["input_ids"].shape[1] + new_tokens
    made.cpu()
    return time.perf_counter() - started


def measure_generation(
    setup: Setup, network: Any, inputs: dict[str, torch.Tensor], new_tokens: int, rate: float
) -> dict[str, Any]:
    """Speed of answering the rows of ``inputs`` together; ``rate`` is the card's rate of copying."""
    rows, tokens = inputs["input_ids"].shape
    generate_seconds(setup, network, inputs, 2)
    reset_peak(setup.device)
    first = min(generate_seconds(setup, network, inputs, 1) for _ in range(2))
    seconds = generate_seconds(setup, network, inputs, new_tokens)
    text = network.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * head  # bytes of one token's keys and values
    weights = 2 * sum(parameter.numel() for parameter in network.get_decoder().parameters())
    steps = (new_tokens - 1) / (seconds - first)
    read = (weights + rows * (tokens + new_tokens / 2) * cache) * steps
    return {
        "answers_per_second": rows / seconds,
        "new_tokens_per_second": rows * new_tokens / seconds,
        "prompt_seconds": first,
        "read_gb_per_second": read / 1e9,
        "share": read / rate,
        "peak_gib": peak_gib(setup.device),
    }


def measure(setup: Setup) -> Iterator[dict[str, Any]]:
    """One record per measurement, each printed as soon as it is there."""
    rate, copying = matrix_rate(setup.device, setup.matrix), copy_rate(setup.device)
    name = torch.cuda.get_device_name() if setup.device.type == "cuda" else "CPU"
    print(
        f"{name}: {rate / 1e12:.2f} TFLOP/s at a {setup.matrix}^3 bfloat16 product, copying {copying / 1e12:.2f} TB/s"
    )
    yield {"measurement": "card", "name": name, "matrix_tflops": rate / 1e12, "copy_tb_per_second": copying / 1e12}
    yield from _with_mllm(setup, rate, copying)
    if setup.preferences:
        yield from _with_llm(setup, copying)


def _with_mllm(setup: Setup, rate: float, copying: float) -> Iterator[dict[str, Any]]:
    network = build(setup, AutoModelForImageTextToText, setup.mllm.config())
    work = count(setup, network)
    tokens = setup.texts + setup.mllm.image_tokens
    print(
        f"{setup.mllm_name}: {_billions(network)} parameters, {tokens} tokens a prompt, "
        f"{work.scoring / 1e12:.4g} TFLOP to score one, {work.tuning / 1e12:.4g} to tune on one"
    )
    yield _rated("scoring", "P(yes)", work.scoring, rate, lambda: measure_scoring(setup, network))
    for images in setup.summaries:
        yield _generated("summaries", f"{images} images", lambda n=images: _summaries(setup, network, n, copying))
    yield from _tuning(setup, network, work.tuning, rate)


def _with_llm(setup: Setup, copying: float) -> Iterator[dict[str, Any]]:
    reset_peak(setup.device)
    llm = build(setup, AutoModelForCausalLM, LLMS[setup.llm_name]())
    print(f"{setup.llm_name}: {_billions(llm)} parameters")
    for users in setup.preferences:
        yield _generated("preferences", f"{users} users", lambda n=users: _preferences(setup, llm, n, copying))


def _tuning(setup: Setup, network: nn.Module, flops: float, rate: float) -> Iterator[dict[str, Any]]:
    engines = ["plain", *(["deepspeed"] if importlib.util.find_spec("deepspeed") else [])]
    model = RankerModel(network, setup.tune)
    for name in engines:
        tune = setup.tune.model_copy(update={"engine": name})
        step = RankerStep(model, tune.precision == "bf16")
        engine = make_engine(step, train_settings(tune), setup.device)
        for again in (False, True):
            what = f"{tune.batch_size} prompts, {name}, {'recomputing' if again else 'keeping'} activations"
            yield _rated("tuning", what, flops, rate, lambda a=again, e=engine, s=step: measure_tuning(setup, s, e, a))


def _summaries(setup: Setup, network: Any, images: int, rate: float) -> dict[str, Any]:
    batch = prompts(setup, images, SUMMARY_WORDS).to(setup.device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.vision}
    if network.config.model_type == "qwen2_vl":
        inputs["mm_token_type_ids"] = batch.is_image
    return measure_generation(setup, network, inputs, setup.new_tokens[0], rate)


def _preferences(setup: Setup, llm: Any, users: int, rate: float) -> dict[str, Any]:
    tokens = PREFERENCE_WORDS + BLOCK + setup.new_tokens[1]
    ids = torch.randint(10, 900, (users, tokens), generator=torch.Generator().manual_seed(0)).to(setup.device)
    return measure_generation(
        setup, llm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, setup.new_tokens[1], rate
    )


def _rated(kind: str, what: str, flops: float, rate: float, work: Callable[[], tuple[float, float]]) -> dict[str, Any]:
    try:
        speed, peak = work()
    except torch.OutOfMemoryError:
        return _too_large(kind, what)
    achieved = speed * flops
    print(
        f"{kind:11s}  {what}: {speed:.2f} prompts/s, {achieved / 1e12:.4g} TFLOP/s = {achieved / rate:.1%} of the "
        f"product's rate, peak {peak:.1f} GiB",
        flush=True,
    )
    share = {"tflops": achieved / 1e12, "share": achieved / rate, "peak_gib": peak}
    return {"measurement": kind, "what": what, "fits": True, "prompts_per_second": speed, **share}


def _generated(kind: str, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        record = work()
    except torch.OutOfMemoryError:
        return _too_large(kind, what)
    print(
        f"{kind:11s}  {what} at once: {record['answers_per_second']:.2f} answers/s, "
        f"{record['new_tokens_per_second']:.0f} new tokens/s after {record['prompt_seconds']:.2f} s for the prompts, "
        f"reading {record['share']:.1%} of what copying moves, peak {record['peak_gib']:.1f} GiB",
        flush=True,
    )
    return {"measurement": kind, "what": what, "fits": True, **record}


def _too_large(kind: str, what: str) -> dict[str, Any]:
    torch.cuda.empty_cache()
    print(f"{kind:11s}  {what}: does not fit into this card's memory", flush=True)
    return {"measurement": kind, "what": what, "fits": False}


def _billions(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e9:.3g} G"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU, to see that all of it runs")
    parser.add_argument("--mllm", default="llava-next-mistral-7b", choices=sorted(set(MLLMS) - {"tiny"}))
    parser.add_argument("--llm", default="llama-3-8b", choices=sorted(set(LLMS) - {"tiny"}))
    parser.add_argument("--images", type=int, nargs="*", default=[8], help="images summarised at once (published: 8)")
    parser.add_argument("--users", type=int, nargs="*", default=[1, 64], help="users at once (published: 1)")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny runs the same on the CPU")
    setup = tiny_size() if arguments.tiny else full_size(arguments)
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group("nccl" if setup.device.type == "cuda" else "gloo")
    records = list(measure(setup))
    print(json.dumps(records))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
