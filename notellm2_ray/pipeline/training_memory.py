"""The memory that a command needs on each GPU, for ``--dry-run``: what for, whether it fits, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from notellm2_ray.core.config import build, merge, to_plain
from notellm2_ray.core.errors import NoteLLMError, first_line
from notellm2_ray.core.settings import LoraSettings, ModelSettings, Settings, TuneSettings
from notellm2_ray.models.embedder.kinds import kind_of
from notellm2_ray.pipeline import embedders, ranking_outputs
from notellm2_ray.pipeline.cards import CARDS, USABLE, card_of, require_at_hand, size_of
from notellm2_ray.train.memory import Load, Memory, training_memory

if TYPE_CHECKING:
    from notellm2_ray.models.footprint import Footprint

_GIB = 2**30
# Settings that need less memory, the cheapest first.
_LESS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "train": (
        {"gradient_checkpointing": True},
        {"cached_notes_per_pass": 16, "gradient_checkpointing": True},
        {"engine": "deepspeed", "zero_stage": 3, "gradient_checkpointing": True},
        {"lora": {"rank": 16}, "gradient_checkpointing": True},
        {"engine": "deepspeed", "zero_stage": 3, "offload": "parameters_and_optimizer", "gradient_checkpointing": True},
    ),
    "tune": (
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "max_batch_tokens": 2048},
        {"engine": "deepspeed", "zero_stage": 3, "gradient_checkpointing": True},
    ),
}


def embedder_memory(settings: Settings) -> list[str]:
    """Lines on the training of the embedder that the settings name."""
    settings = embedders.resolved(settings)
    tiny = any(embedders.is_tiny(settings, part) for part in embedders.parts_of(settings))
    if tiny or not embedders.is_trained(settings):
        return []  # tiny models may not be there yet, and fit anywhere
    return _training(f"train-embedder {settings.embedder_row}", "train", settings, _embedder)


def ranker_memory(settings: Settings) -> list[str]:
    """Lines on tuning the ranker."""
    if settings.ranker.model == "tiny":
        return []  # there may be none yet, and it fits anywhere
    return _training("train-ranker", "tune", settings, _ranker)


def _embedder(settings: Settings) -> tuple[Memory, int]:
    """The memory of a rank, and its host's while the network is built."""
    train, paths = settings.train, embedders.model_paths(settings)
    lora = None if train.lora is None else train.lora.model_dump_json()
    sizes = _embedder_sizes(settings.model.model_dump_json(), lora, *paths, train.precision in ("auto", "bf16"))
    notes = (2 + train.hard_negatives) * train.batch_pairs // train.num_workers
    load = Load(notes, -(-notes // train.length_chunks))
    if train.caches_gradients:
        once = min(notes, train.cached_notes_per_pass or notes)
        load = Load(once, once, accumulates=once < notes)
    return training_memory(sizes, train, load), 4 * sizes.parameters


@lru_cache(maxsize=64)
def _embedder_sizes(model: str, lora: str | None, llm: str, vision: str, bf16: bool) -> Footprint:
    """The sizes of an embedder whose settings are given as JSON."""
    from notellm2_ray.models.embedder.outline import embedder_outline
    from notellm2_ray.models.footprint import footprint

    own = ModelSettings.model_validate_json(model)
    require_at_hand(*(path for part, path in (("llm", llm), ("vision", vision)) if part in kind_of(own).parts(own)))
    adapter = None if lora is None else LoraSettings.model_validate_json(lora)
    return footprint(embedder_outline(own, adapter, llm_path=llm, vision_path=vision, bf16=bf16), bf16=bf16)


def _ranker(settings: Settings) -> tuple[Memory, int]:
    from notellm2_ray.train.ranker_run import train_settings

    tune, longest = settings.tune, settings.generation.max_model_len
    bf16 = tune.precision in ("auto", "bf16")
    path = ranking_outputs.ranking_model(settings, settings.ranker.model)
    sizes, vocabulary = _ranker_sizes(path, tune.lora_rank, tune.lora_dropout, bf16)
    prompts = tune.batch_size // tune.num_workers * longest
    tokens = min(prompts, max(tune.max_batch_tokens, longest))
    logits = 10 * tokens * vocabulary if tune.loss_on == "everything" else 0  # as they are, in float32, and gradients
    load = Load(tokens, tokens, accumulates=tokens < prompts, extra=logits)
    return training_memory(sizes, train_settings(tune), load), (2 if bf16 else 4) * sizes.parameters


@lru_cache(maxsize=16)
def _ranker_sizes(path: str, rank: int, dropout: float, bf16: bool) -> tuple[Footprint, int]:
    from notellm2_ray.models.footprint import footprint
    from notellm2_ray.models.ranker.outline import TOKENS, ranker_outline

    require_at_hand(path)
    outline, vocabulary = ranker_outline(path, TuneSettings(lora_rank=rank, lora_dropout=dropout), bf16=bf16)
    return footprint(outline, bf16=bf16, tokens=TOKENS), vocabulary


def _training(
    title: str, section: str, settings: Settings, measure: Callable[[Settings], tuple[Memory, int]]
) -> list[str]:
    try:
        memory, built = measure(settings)
    except (NoteLLMError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
        # Also of a network whose forward pass looks at its data, which fake tensors do not have.
        return [f"memory of {title}: not foretold, {first_line(error)}"]
    knobs = getattr(settings, section)
    on_gpu = knobs.gpus_per_worker > 0
    each = "GPU" if on_gpu else "worker"
    lines = [f"memory of {title}, of each {each}: {size_of(memory.peak)} at once ({_list(memory.device)})"]
    host = dict(memory.host) if on_gpu else {}
    if host:
        lines.append(f"  and of the host for each rank: {size_of(sum(host.values()))} ({_list(host)})")
    lines.append(f"  while the model is loaded, rank 0 takes {size_of(built)} of its host, the others next to none")
    if on_gpu:
        lines += _verdict(memory.peak, min(1.0, knobs.gpus_per_worker), settings)
        if not _fits(memory.peak, knobs.gpus_per_worker, settings):
            lines += _remedies(section, settings, measure)
    return lines


def _verdict(peak: int, share: float, settings: Settings) -> list[str]:
    card = card_of(settings)
    if card is not None:
        word = "fits" if _fits(peak, share, settings) else "does NOT fit"
        part = "" if share == 1 else f"{share:g} of "
        return [f"  {word} into {part}a GPU of {card:.0f} GiB, of which {USABLE:.0%} can be used"]
    fitting = [one for one in CARDS if peak <= USABLE * share * one * _GIB]
    if fitting:
        return [f"  fits into a GPU of {fitting[0]} GiB or more (ray.gpu_memory_gb names yours)"]
    return [f"  does NOT fit into any GPU of up to {CARDS[-1]} GiB"]


def _fits(peak: int, share: float, settings: Settings) -> bool:
    return peak <= USABLE * min(1.0, share) * (card_of(settings) or CARDS[-1]) * _GIB


def _remedies(section: str, settings: Settings, measure: Callable[[Settings], tuple[Memory, int]]) -> list[str]:
    lines = []
    for change in _LESS[section]:
        try:
            changed: Settings = build(Settings, merge(to_plain(settings), {section: change}))
            memory, _ = measure(changed)
        except NoteLLMError:
            continue
        knobs = getattr(changed, section)
        if _fits(memory.peak, knobs.gpus_per_worker, changed):
            named = " ".join(f"{section}.{name}={_value(value)}" for name, value in change.items())
            lines.append(f"  would fit with {named}: {size_of(memory.peak)}")
    more = f"raise {section}.num_workers with {section}.zero_stage=3, or take a smaller model"
    return lines or [f"  no setting makes it fit: {more}"]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "'{" + ", ".join(f"{name}: {one}" for name, one in value.items()) + "}'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size_of(size)}" for name, size in sizes.items())
