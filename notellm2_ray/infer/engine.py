"""vLLM engines of every stage that generates text: their arguments, environment variables and start-up errors."""

from __future__ import annotations

import os
import re
from typing import Any

from notellm2_ray.core import memory
from notellm2_ray.core.cards import only_start
from notellm2_ray.core.errors import ConfigError, ModelError, NoteLLMError
from notellm2_ray.core.settings import GenerationSettings
from notellm2_ray.infer.card_memory import arguments_on_card, card_share
from notellm2_ray.infer.image_limits import image_limits
from notellm2_ray.infer.model_facts import ModelFacts

_BOTH_WAYS = ("Gemma3ForConditionalGeneration", "PaliGemmaForConditionalGeneration")

# vLLM's prefix cache shares whole blocks of a prompt. The default on a CPU is 128 tokens, as long as a short prompt;
# 32 is the least that vLLM's CPU kernels support.
CPU_BLOCK_TOKENS = 32
_IMAGE_CACHE_GB = 2  # some 300 images of 262,144 pixels


def engine_arguments(
    facts: ModelFacts,
    settings: GenerationSettings,
    *,
    images: int = 0,
    pixels: int | None = None,
    recurring: bool = False,
    one_token: bool = False,
) -> dict[str, Any]:
    """Arguments of vLLM's ``AsyncEngineArgs`` except ``model``; for a CPU if no GPU is reserved.

    Args:
        images: the most images in a prompt.
        pixels: of the largest image; None: as large as the model's processor takes.
        recurring: whether images are sent more than once, as those of candidates.
        one_token: whether answers are one token, so that every step reads prompts.

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
    if settings.quantization and not on_gpu:
        raise ConfigError(
            f"generation.quantization={settings.quantization} needs a GPU: set generation.gpus_per_engine, or null"
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
        arguments["gpu_memory_utilization"] = card_share(settings)
        if settings.quantization:
            arguments["quantization"] = settings.quantization
        if one_token and settings.enforce_eager is None:
            # Graphs are captured for steps of up to 512 tokens, and steps of prompts have thousands.
            arguments["compilation_config"] = {"cudagraph_mode": "NONE"}
    else:
        arguments["block_size"] = CPU_BLOCK_TOKENS
        # With chunked prefill vLLM rewinds the random generator after every chunk of a prompt but the last. On a CPU it
        # cannot do that, and the first request with a seed would end the engine.
        arguments["enable_chunked_prefill"] = False
    if facts.reads_images:
        # Without these limits vLLM profiles a video input at start-up, which takes long.
        arguments["limit_mm_per_prompt"] = {"image": images, "video": 0}
        # The processor's outputs of images that come again, in the caller's process and in the engine's.
        arguments["mm_processor_cache_gb"] = _IMAGE_CACHE_GB if recurring and on_gpu else 0
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


def start_engine(
    facts: ModelFacts,
    settings: GenerationSettings,
    *,
    images: int = 0,
    pixels: int | None = None,
    recurring: bool = False,
    one_token: bool = False,
    offline: bool = True,
) -> Any:
    """Start an engine for the running event loop of this process; on a GPU as the only one that starts there.

    On a GPU it is a ``vllm.v1.engine.async_llm.AsyncLLM``. On a CPU it is a
    :class:`~notellm2_ray.infer.local_engine.LocalEngine`, which has the same methods ``generate``, ``check_health``,
    ``reset_prefix_cache`` and ``shutdown``.

    Args:
        images, pixels, recurring, one_token: as for :func:`engine_arguments`.
        offline: whether only throughput counts, not the time of a single answer.

    Raises:
        ModelError: vLLM cannot run this model, or cannot run it in this memory.
    """
    arguments = engine_arguments(
        facts, settings, images=images, pixels=pixels, recurring=recurring, one_token=one_token
    )
    try:
        if not settings.gpus_per_engine:
            from notellm2_ray.infer.local_engine import LocalEngine

            return LocalEngine({"model": facts.model, **arguments}, _cpu_threads(settings))
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        with only_start():
            arguments = arguments_on_card(facts, settings, arguments, offline=offline)
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model=facts.model, **arguments))
    except NoteLLMError:
        raise
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
            "generation.max_sequences, or reserve more (generation.gpus_per_engine; in the service serve.ranker.gpus, "
            f"serve.preferences.gpus; on a CPU generation.cpu_cache_gb). vLLM says: {last_line(text)}"
        )
    if "unexpected keyword argument" in text:
        return ModelError(f"{facts.model}: vLLM has no such argument, see generation.engine_kwargs: {last_line(text)}")
    return ModelError(f"{facts.model}: the vLLM engine did not start: {last_line(text)}; its log above says more")


def last_line(text: str) -> str:
    """The last line of an error's text, which in a traceback is the message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no message"


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
