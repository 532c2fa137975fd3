"""vLLM engines of every stage that generates text: their arguments, environment variables and start-up errors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from notellm2_ray.core import memory
from notellm2_ray.core.errors import ConfigError, ModelError
from notellm2_ray.core.run import files_fingerprint
from notellm2_ray.core.settings import GenerationSettings
from notellm2_ray.infer.image_limits import image_limits
from notellm2_ray.models.weight_names import check_weight_names

# Any of these keys in a config means that the model has an image tower.
_IMAGE_KEYS = ("vision_config", "vision_tower", "mm_vision_tower", "visual", "image_token_id", "image_token_index")

_BOTH_WAYS = ("Gemma3ForConditionalGeneration", "PaliGemmaForConditionalGeneration")

# vLLM's prefix cache shares whole blocks of a prompt. The default on a CPU is 128 tokens, as long as a short prompt;
# 32 is the least that vLLM's CPU kernels support.
CPU_BLOCK_TOKENS = 32


class ModelFacts(NamedTuple):
    """What a model's configuration says about it."""

    model: str  # directory (absolute) or name on the hub
    architecture: str
    reads_images: bool
    context: int | None  # the most tokens that its positions allow; None if the configuration does not say
    fingerprint: str  # changes with the files of the model, or for a model on the hub with its name


def check_model(model: Path | str, *, images: bool) -> ModelFacts:
    """Read a model's configuration, without loading anything heavy.

    Args:
        model: directory in Hugging Face layout, or a name on the hub.
        images: whether the model must read images.

    Raises:
        ModelError: there is no such model, its config.json is damaged or names no architecture, the model must read
            images and does not, or vLLM does not know its weights' names.
    """
    name, config = _read_config(str(model))
    architectures = config.get("architectures") or []
    if not architectures:
        raise ModelError(f"{name}: its config.json names no architecture, so it is not a model that vLLM can run")
    reads_images = any(key in config for key in _IMAGE_KEYS)
    if images and not reads_images:
        raise ModelError(
            f"{name}: {architectures[0]} reads no images; an image-text model (LLaVA, Qwen2-VL, ...) is needed here"
        )
    if reads_images and Path(name).is_dir():
        check_weight_names(Path(name))
    text = config.get("text_config") or config.get("llm_config") or config
    context = text.get("max_position_embeddings") or config.get("max_position_embeddings")
    return ModelFacts(name, architectures[0], reads_images, context, files_fingerprint(name))


def engine_arguments(
    facts: ModelFacts, settings: GenerationSettings, *, images: int = 0, pixels: int | None = None
) -> dict[str, Any]:
    """Arguments of vLLM's ``AsyncEngineArgs`` except ``model``; for a CPU if no GPU is reserved.

    Args:
        images: the most images in a prompt.
        pixels: of the largest image; None: as large as the model's processor takes.

    Raises:
        ConfigError: the settings contradict each other or the model.
    """
    on_gpu = settings.gpus_per_engine > 0
    if on_gpu and settings.gpus_per_engine < settings.tensor_parallel and settings.tensor_parallel > 1:
        raise ConfigError(
            f"generation.tensor_parallel={settings.tensor_parallel} needs as many GPUs: raise "
            f"generation.gpus_per_engine={settings.gpus_per_engine:g}"
        )
    if facts.context and settings.max_model_len > facts.context:
        raise ConfigError(
            f"generation.max_model_len={settings.max_model_len} is more than the {facts.context} tokens that "
            f"{facts.model} allows; lower it"
        )
    if images and not on_gpu and facts.architecture in _BOTH_WAYS:
        raise ConfigError(
            f"{facts.model}: in {facts.architecture} the tokens of an image attend to each other both ways, which vLLM "
            "does not do on a CPU, so that its scores would not be the tuned model's: set "
            "generation.gpus_per_engine=1, or take another model"
        )
    arguments: dict[str, Any] = {
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tensor_parallel,
        # The model runs in the engine's own process. Two processes would wait for each other, the engine by spinning.
        "distributed_executor_backend": "uni" if settings.tensor_parallel == 1 else "mp",
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_sequences,
        "enforce_eager": (not on_gpu) if settings.enforce_eager is None else settings.enforce_eager,
        # All prompts share the instruction, and a user's candidates share the preference.
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if on_gpu:
        arguments["gpu_memory_utilization"] = settings.gpu_memory
    else:
        arguments["block_size"] = CPU_BLOCK_TOKENS
        # With chunked prefill vLLM rewinds the random generator after every chunk of a prompt but the last. On a CPU it
        # cannot do that, and the first request with a seed would end the engine.
        arguments["enable_chunked_prefill"] = False
    if facts.reads_images:
        # Without these limits vLLM profiles a video input at start-up, which takes long.
        arguments["limit_mm_per_prompt"] = {"image": images, "video": 0}
        # Every image is used once, so a cache of processed images would never be read.
        arguments["mm_processor_cache_gb"] = 0
        if images and pixels:
            arguments |= image_limits(facts.model, facts.architecture, pixels)
    return {**arguments, **settings.engine_kwargs}


def engine_environment(settings: GenerationSettings) -> dict[str, str]:
    """Environment variables of a process that holds an engine, and of vLLM's processes below it."""
    environment = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked child of a process with threads may hang
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "TOKENIZERS_PARALLELISM": "false",
        # These two silence a warning about an argument that vLLM itself passes, and notes about memory placement.
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "RAY_LOGGER_LEVEL": "warning",  # Ray's own engine stage logs a line for every batch
    }
    if not settings.gpus_per_engine:
        environment |= {
            **memory.ENVIRONMENT,
            "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_cache_gb),
            # If threads were bound to cores, two engines on one machine would share the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Keeps the engine in its caller's process. By default vLLM moves it to a process of its own on a CPU, since
            # it could not set the number of threads here; the next line sets it. Ray Data's engines move regardless.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(_cpu_threads(settings)),
            # Multi-head latent attention is for DeepSeek's models alone, but without this vLLM 0.29 does not start
            # Qwen3-VL on a CPU ("list index out of range").
            "VLLM_MLA_DISABLE": "1",
        }
    return environment


def start_engine(facts: ModelFacts, settings: GenerationSettings, *, images: int = 0, pixels: int | None = None) -> Any:
    """Start an engine for the running event loop of this process.

    On a GPU it is a ``vllm.v1.engine.async_llm.AsyncLLM``. On a CPU it is a
    :class:`~notellm2_ray.infer.local_engine.LocalEngine`, which has the same methods ``generate``, ``check_health``,
    ``reset_prefix_cache`` and ``shutdown``.

    Raises:
        ModelError: vLLM cannot run this model, or cannot run it in this memory.
    """
    arguments = engine_arguments(facts, settings, images=images, pixels=pixels)
    try:
        if not settings.gpus_per_engine:
            from notellm2_ray.infer.local_engine import LocalEngine

            return LocalEngine({"model": facts.model, **arguments}, _cpu_threads(settings))
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=facts.model, **arguments))
    except Exception as error:  # any error: the model does not run, and the message says why
        raise engine_error(error, facts) from error


def _cpu_threads(settings: GenerationSettings) -> int:
    return max(1, int(settings.cpus_per_engine))


def engine_error(error: BaseException, facts: ModelFacts) -> ModelError:
    """The error for an engine that did not start: it names the model, and the remedy if the cause is a known one."""
    text = str(error)
    if re.search(r"architectures? .*(not supported|failed to be inspected)", text, re.I | re.S):
        return ModelError(f"{facts.model}: this vLLM does not run the architecture {facts.architecture}")
    if re.search(r"out of memory|kv cache|free memory|gpu_memory_utilization", text, re.I):
        return ModelError(
            f"{facts.model}: too little memory for an engine: lower generation.max_model_len or "
            f"generation.max_sequences, or change generation.gpu_memory / generation.cpu_cache_gb ({last_line(text)})"
        )
    if "unexpected keyword argument" in text:
        return ModelError(f"{facts.model}: vLLM has no such argument, see generation.engine_kwargs: {last_line(text)}")
    return ModelError(f"{facts.model}: the vLLM engine did not start: {last_line(text)}; its log above says more")


def last_line(text: str) -> str:
    """The last line of an error's text, which in a traceback is the message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no message"


def _read_config(model: str) -> tuple[str, dict[str, Any]]:
    """The model's absolute directory or hub name, and its configuration."""
    path = Path(model)
    if not (path.exists() or path.is_absolute() or model.startswith(".") or model.count("/") != 1):
        return model, _hub_config(model)
    if not path.is_dir():
        raise ModelError(f"{model}: there is no model directory; train or download one first, or correct the path")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{model} is not a model directory in Hugging Face layout: it has no config.json") from None
    except ValueError as error:
        raise ModelError(f"{path / 'config.json'} is damaged ({error}): copy the model again") from error
    return str(path.absolute()), config


def _hub_config(model: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model} is neither a directory nor a model that can be loaded from the hub: {error}"
        ) from error


async def generate(engine: Any, ids: list[int], request_id: str, **sampling: Any) -> Any:
    """One completion: vLLM's ``CompletionOutput`` (text unless ``detokenize=False``, token_ids, finish_reason).

    Args:
        ids: the prompt.
        request_id: differs from the ids of all unfinished requests.
        sampling: arguments of ``vllm.SamplingParams``.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
    results = [result async for result in engine.generate({"prompt_token_ids": ids}, params, request_id)]
    assert results and results[-1].finished
    return results[-1].outputs[0]
