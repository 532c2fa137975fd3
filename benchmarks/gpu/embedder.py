"""A full-size embedder on one GPU, on PyTorch and transformers alone: speed, share of the card's rate, memory.

    PYTHONPATH=. python benchmarks/gpu/embedder.py                # one GPU of 80 GB
    PYTHONPATH=. python benchmarks/gpu/embedder.py --tiny         # the same script on a CPU, in seconds

The network is the paper's MQwen-Base with NoteLLM-2: a Qwen-7B of 32 layers and width 4,096, CLIP ViT-B/16, and a
Q-Former of six layers. Its weights are random; neither speed nor memory depends on their values.

Printed are embedding and training in notes/s, achieved TFLOP/s, and peak memory. Operations are counted by formula
(_flops.py). They are compared with the rate that this card reaches in the same run at a bfloat16 product of
8192 x 8192 x 8192, and with its nominal rate. The goals: embedding at 65% of the measured rate (and at least 150
notes/s on an H200), training at 45%, and with notes that are read meanwhile nine tenths of that. The paper's Table 7
has 46.9 notes/s on an A100, at a batch of 50.

Embedding runs in bfloat16 on batches that are ready in page-locked memory, of prompts of the greatest length.

Training is the package's own step (_training.py), with weights, gradients and AdamW's moments in float32: 16 bytes a
parameter, 117 GB at full size. So the LLM has the full width and vocabulary, and --train-layers of its layers. On
their number the share of the card's rate depends little. Operations of padding are not counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _device import matrix_rate, peak_gib, reset_peak, seconds_each
from _flops import NoteFlops, count
from _training import Measured, measure_training
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, Qwen2Config

from notellm2_ray.core.settings import ModelSettings, QFormerSettings
from notellm2_ray.models.embedder.architectures import ARCHITECTURES
from notellm2_ray.models.embedder.build import count_parameters
from notellm2_ray.models.embedder.mlrm import NoteModel
from notellm2_ray.models.embedder.network import model_from_configs
from notellm2_ray.models.embedder.preprocess import NoteBatch
from notellm2_ray.models.vision.pixels import ImageSettings

GOALS = {"notes_per_second": 150.0, "embedding": 0.65, "training": 0.45}
# Dense bfloat16 products as the maker states them, FLOP/s, by a part of the card's name.
NOMINAL = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
# Tokens of a prompt beyond max_body_tokens, for a tokenizer that knows Chinese: the opening and closing words of the
# visual half, its special token, and the closing words of the whole prompt.
OPENING, CLOSING, MARK = 6, 7, 1


class Setup(NamedTuple):
    """What is measured."""

    settings: ModelSettings
    llm: Any  # Hugging Face configurations
    llm_trained: Any  # the same with fewer layers
    vision: Any
    num_tokens: int  # of every prompt
    embed_notes: list[int]  # notes of a forward pass
    train_pairs: list[int]  # pairs of a step; each has two notes
    train_steps: int  # measured after two of warm-up
    matrix: int  # side of the product that measures the rate
    device: torch.device


def full_size(arguments: argparse.Namespace) -> Setup:
    """The paper's architecture on a GPU."""
    architecture = ARCHITECTURES[arguments.architecture]
    settings = architecture.settings("notellm2")
    body = settings.max_body_tokens - 1 + settings.qformer.num_queries  # there the image counts as one token
    tokens = arguments.tokens or body + OPENING + CLOSING + MARK + CLOSING
    device = torch.device("cuda")
    llm, trained = architecture.llm(), architecture.llm()
    trained.num_hidden_layers = arguments.train_layers
    sizes = (tokens, arguments.notes, arguments.pairs, 10, 8192)
    return Setup(settings, llm, trained, architecture.vision(), *sizes, device)


def tiny_size() -> Setup:
    """The same network, small enough for a CPU."""
    qformer = QFormerSettings(num_layers=3, num_heads=2, hidden_size=32, intermediate_size=64, num_queries=4)
    llm = Qwen2Config(
        vocab_size=9000,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    settings = ModelSettings(variant="notellm2", qformer=qformer, embedding_dim=16)
    return Setup(settings, llm, llm, vision, 40, [8], [4], 2, 512, torch.device("cpu"))


def build(
    setup: Setup, device: torch.device, attention: str = "sdpa", *, llm: Any = None, precision: str = "bf16"
) -> NoteModel:
    """The network with random weights, or without weights on the meta device."""
    torch.manual_seed(0)
    image = ImageSettings(setup.vision.image_size)
    with device:
        model = model_from_configs(setup.settings, llm or setup.llm, setup.vision.to_dict(), image, attention=attention)
    return model.to_precision(precision)


def batches(setup: Setup, num_notes: int, how_many: int = 4) -> list[NoteBatch]:
    """Different random batches in host memory, page-locked if there is a GPU; prompts are full and need no padding."""
    side, queries, tokens = setup.vision.image_size, setup.settings.qformer.num_queries, setup.num_tokens
    rows = torch.arange(num_notes)
    made = []
    for number in range(how_many):
        draw = torch.Generator().manual_seed(number)
        batch = NoteBatch(
            input_ids=torch.randint(0, setup.llm.vocab_size, (num_notes, tokens), generator=draw),
            attention_mask=torch.ones(num_notes, tokens, dtype=torch.int64),
            last=torch.full((num_notes,), tokens - 1),
            pixels=torch.randint(0, 256, (num_notes, 3, side, side), generator=draw, dtype=torch.uint8),
            image_rows=rows,
            image_starts=torch.full((num_notes,), OPENING),
            visual_ends=torch.full((num_notes,), OPENING + queries + CLOSING - 1),
        )
        made.append(batch.pin_memory() if setup.device.type == "cuda" else batch)
    return made


def measure_embedding(setup: Setup, model: NoteModel, num_notes: int, flops: int) -> Measured:
    """From host batches to unit vectors on the host; ``flops``: of a note."""
    model.eval().requires_grad_(False)
    given = batches(setup, num_notes)

    @torch.inference_mode()
    def embed(number: int) -> torch.Tensor:
        batch = given[number % len(given)].to(setup.device, non_blocking=True)
        return F.normalize(model(batch).multimodal, dim=-1).cpu()

    vectors = embed(0)
    assert vectors.shape == (num_notes, setup.settings.embedding_dim) and vectors.isfinite().all()
    reset_peak(setup.device)
    speed = num_notes / seconds_each(setup.device, embed)
    return Measured(speed, speed * flops, peak_gib(setup.device))


def check_formula(setup: Setup, flops: NoteFlops) -> float:
    """PyTorch's own count of one note's forward pass, on the meta device, divided by the formula's.

    PyTorch counts the whole square of attention. The formula counts the half that a causal model needs, so the other
    half is added to it here.
    """
    meta = torch.device("meta")
    model = build(setup, meta, attention="eager").eval().requires_grad_(False)
    batch = batches(setup, 1, 1)[0].to(meta)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch)
    tokens, layers, width = setup.num_tokens, setup.llm.num_hidden_layers, setup.llm.hidden_size
    other_half = layers * 4 * width * tokens * (tokens - 1) // 2
    return counter.get_total_flops() / (flops.forward + other_half)


def measure(setup: Setup) -> Iterator[dict[str, Any]]:
    """One record per measurement, each printed as soon as it is there."""
    rate = matrix_rate(setup.device, setup.matrix)
    model = build(setup, setup.device)
    flops = count(setup.settings, setup.llm, setup.vision, setup.num_tokens)
    name = torch.cuda.get_device_name() if setup.device.type == "cuda" else "CPU"
    print(f"{name}: {rate / 1e12:.2f} TFLOP/s at a {setup.matrix}^3 bfloat16 product (torch {torch.__version__})")
    print(
        f"{count_parameters(model) / 1e6:,.1f} M parameters, {setup.num_tokens} tokens a note, "
        f"{flops.forward / 1e12:.4g} TFLOP to embed one; "
        f"PyTorch's count over the formula's: {check_formula(setup, flops):.4f}"
    )
    yield {"measurement": "card", "name": name, "matrix_tflops": rate / 1e12, "tokens": setup.num_tokens}
    for notes in setup.embed_notes:
        found = _measured(lambda n=notes: measure_embedding(setup, model, n, flops.forward))
        yield _record("embedding", f"{notes} notes", rate, found)
    model.to("meta")  # makes room
    trained = build(setup, setup.device, llm=setup.llm_trained, precision="fp32")
    print(f"training {count_parameters(trained) / 1e6:,.1f} M parameters in float32")
    for what, found in measure_training(setup, trained, setup.train_steps):
        yield _record("training", what, rate, found)


def _measured(work: Callable[[], Measured]) -> Measured | None:
    try:
        return work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _record(kind: str, what: str, rate: float, found: Measured | None) -> dict[str, Any]:
    if found is None:
        print(f"{kind:9s}  {what}: does not fit into this card's memory")
        return {"measurement": kind, "what": what, "fits": False}
    share, nominal = found.flops_per_second / rate, _nominal()
    of_nominal = f", {found.flops_per_second / nominal:.1%} of the nominal one" if nominal else ""
    print(
        f"{kind:9s}  {what}: {found.notes_per_second:.1f} notes/s, {found.flops_per_second / 1e12:.4g} TFLOP/s = "
        f"{share:.1%} of the product's rate{of_nominal} (goal: {GOALS[kind]:.0%}), peak {found.peak_gib:.1f} GiB",
        flush=True,
    )
    return {
        "measurement": kind,
        "what": what,
        "fits": True,
        **found._asdict(),
        "share": share,
        "nominal_share": found.flops_per_second / nominal if nominal else None,
    }


def _nominal() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for part, rate in NOMINAL.items() if part in name), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny network on the CPU, to see that all of it runs")
    parser.add_argument("--architecture", default="mqwen-base", choices=sorted(ARCHITECTURES))
    parser.add_argument("--tokens", type=int, help="length of every prompt; by default the longest there is")
    parser.add_argument("--notes", type=int, nargs="+", default=[50, 128, 256], help="notes of a forward pass")
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 32], help="pairs of a training step (paper: 16)")
    parser.add_argument("--train-layers", type=int, default=12, help="layers of the LLM that is trained")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny runs the same on the CPU")
    records = list(measure(tiny_size() if arguments.tiny else full_size(arguments)))
    print(json.dumps(records))


if __name__ == "__main__":
    main()
