"""Arguments and environment of vLLM engines, and models that cannot run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from notellm2_ray.core.config import shaping
from notellm2_ray.core.errors import ConfigError, ModelError
from notellm2_ray.core.settings import GenerationSettings
from notellm2_ray.infer.engine import engine_arguments, engine_environment, engine_error
from notellm2_ray.infer.image_limits import image_limits
from notellm2_ray.infer.model_facts import check_model
from tests.support import architectures
from tests.support.tiny_mllm import save_mllm


@pytest.fixture(scope="module")
def mllm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_mllm(tmp_path_factory.mktemp("mllm"))


def test_models_that_cannot_be_used_are_named(tmp_path: Path, mllm: str) -> None:
    facts = check_model(mllm, images=True)
    assert facts == check_model(Path(mllm), images=False)
    assert (facts.architecture, facts.reads_images, facts.context) == ("Qwen2VLForConditionalGeneration", True, 4096)
    with pytest.raises(ModelError, match="there is no model directory"):
        check_model(tmp_path / "absent", images=True)
    with pytest.raises(ModelError, match="has no config.json"):
        check_model(tmp_path, images=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        check_model(tmp_path, images=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no architecture"):
        check_model(tmp_path, images=True)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelError, match="LlamaForCausalLM reads no images"):
        check_model(tmp_path, images=True)


def test_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    before = check_model(tmp_path, images=False).fingerprint
    assert check_model(tmp_path, images=False).fingerprint == before
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert check_model(tmp_path, images=False).fingerprint != before


def test_arguments_follow_device_and_settings(mllm: str) -> None:
    facts = check_model(mllm, images=True)
    cpu = engine_arguments(facts, GenerationSettings(max_model_len=512), images=1)
    assert cpu["enforce_eager"] and cpu["enable_prefix_caching"] and cpu["distributed_executor_backend"] == "uni"
    assert cpu["block_size"] == 32 and cpu["enable_chunked_prefill"] is False
    assert cpu["limit_mm_per_prompt"] == {"image": 1, "video": 0} and "gpu_memory_utilization" not in cpu
    on_gpu = GenerationSettings(max_model_len=512, gpus_per_engine=1, engine_kwargs={"max_num_batched_tokens": 4096})
    gpu = engine_arguments(facts, on_gpu, images=1)
    assert (
        "block_size" not in gpu
        and "enable_chunked_prefill" not in gpu
        and not gpu["enforce_eager"]
        and gpu["gpu_memory_utilization"] == 0.9
        and gpu["max_num_batched_tokens"] == 4096
    )
    assert gpu["distributed_executor_backend"] == "uni"
    with pytest.raises(ConfigError, match=r"tensor_parallel=2 needs as many GPUs"):
        engine_arguments(facts, GenerationSettings(max_model_len=512, gpus_per_engine=1, tensor_parallel=2))
    with pytest.raises(ConfigError, match=r"more than the 4096 tokens"):
        engine_arguments(facts, GenerationSettings(max_model_len=8192))


def test_engines_that_score_keep_images_and_capture_no_graphs(mllm: str) -> None:
    facts, on_gpu = check_model(mllm, images=True), GenerationSettings(gpus_per_engine=1)
    once = engine_arguments(facts, on_gpu, images=1)
    assert once["mm_processor_cache_gb"] == 0 and "compilation_config" not in once
    scoring = engine_arguments(facts, on_gpu, images=1, recurring=True, one_token=True)
    assert scoring["mm_processor_cache_gb"] > 0 and not scoring["enforce_eager"]
    assert scoring["compilation_config"] == {"cudagraph_mode": "NONE"}
    on_cpu = engine_arguments(facts, GenerationSettings(), images=1, recurring=True, one_token=True)
    assert on_cpu["mm_processor_cache_gb"] == 0 and "compilation_config" not in on_cpu


def test_eight_bits_are_a_setting_that_shapes_outputs(mllm: str) -> None:
    facts = check_model(mllm, images=True)
    assert "quantization" not in engine_arguments(facts, GenerationSettings(gpus_per_engine=1))
    fp8 = GenerationSettings(gpus_per_engine=1, quantization="fp8")
    assert engine_arguments(facts, fp8)["quantization"] == "fp8"
    assert shaping(fp8)["quantization"] == "fp8" and "quantization" not in shaping(GenerationSettings())
    with pytest.raises(ConfigError, match=r"generation\.quantization=fp8 needs a GPU"):
        engine_arguments(facts, GenerationSettings(quantization="fp8"))


def test_an_engine_reserves_memory_for_the_images_that_are_sent(tmp_path: Path, mllm: str) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    pixels = 262_144
    facts = check_model(architectures.save("qwen3_vl", tmp_path, published=True, weights=False), images=True)
    arguments = engine_arguments(facts, GenerationSettings(), images=1, pixels=pixels)
    limit = arguments["mm_processor_kwargs"]["size"]
    assert limit["longest_edge"] == 2 * pixels < 4096**2
    whole, limited = (AutoImageProcessor.from_pretrained(facts.model, **more) for more in ({}, {"size": limit}))
    for size in ((512, 512), (51, 5140), (5140, 51), (79, 3318), (60, 50), (1489, 176)):
        grids = [made([Image.new("RGB", size)])["image_grid_thw"].tolist() for made in (whole, limited)]
        assert grids[0] == grids[1]
    assert "mm_processor_kwargs" not in engine_arguments(facts, GenerationSettings(), images=1)
    assert image_limits(mllm, "Qwen2VLForConditionalGeneration", pixels) == {}  # its own limit is lower
    assert image_limits("nowhere", "LlavaForConditionalGeneration", pixels) == {}


def test_a_model_that_vllm_computes_otherwise_on_a_cpu_is_refused_there(tmp_path: Path) -> None:
    facts = check_model(architectures.save("gemma3", tmp_path, weights=False), images=True)
    with pytest.raises(ConfigError, match=r"both ways.*generation\.gpus_per_engine"):
        engine_arguments(facts, GenerationSettings(), images=1)
    assert engine_arguments(facts, GenerationSettings(gpus_per_engine=1), images=1)
    assert engine_arguments(facts, GenerationSettings())  # text alone


def test_names_of_weights_that_vllm_does_not_know_are_refused(tmp_path: Path) -> None:
    published = architectures.save("llava", tmp_path / "published")
    assert check_model(published, images=True).architecture == "LlavaForConditionalGeneration"
    other = architectures.save("llava", tmp_path / "other", names="transformers 5")
    with pytest.raises(ModelError, match=r"vision_tower\.encoder.*vision_tower\.vision_model\.encoder"):
        check_model(other, images=True)


def test_environment_is_quiet_and_bound_to_no_core() -> None:
    cpu = engine_environment(GenerationSettings(cpu_cache_gb=3, cpus_per_engine=2))
    assert cpu["VLLM_CPU_KVCACHE_SPACE"] == "3" and cpu["OMP_NUM_THREADS"] == "2"
    assert cpu["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn" and cpu["VLLM_NO_USAGE_STATS"] == "1"
    assert not any("HF_" in name or "OFFLINE" in name for name in cpu)
    assert "VLLM_CPU_KVCACHE_SPACE" not in engine_environment(GenerationSettings(gpus_per_engine=1))


def test_failures_to_start_are_explained(mllm: str) -> None:
    facts = check_model(mllm, images=True)
    unsupported = "Model architectures ['Qwen2VL...'] are not supported for now. Supported architectures: ..."
    assert "does not run the architecture Qwen2VL" in str(engine_error(ValueError(unsupported), facts))
    assert "generation.max_model_len" in str(engine_error(ValueError("To serve ... KV cache is needed"), facts))
    kwargs = engine_error(TypeError("AsyncEngineArgs.__init__() got an unexpected keyword argument 'x'"), facts)
    assert "generation.engine_kwargs" in str(kwargs)


@pytest.mark.slow
def test_this_vllm_knows_all_our_arguments_and_variables(mllm: str) -> None:
    from vllm import envs
    from vllm.engine.arg_utils import AsyncEngineArgs

    facts = check_model(mllm, images=True)
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for gpus in (0, 1):
        settings = GenerationSettings(max_model_len=512, gpus_per_engine=gpus)
        arguments = engine_arguments(facts, settings, images=1, recurring=True, one_token=True)
        assert set(arguments) <= known
        ours = [name for name in engine_environment(settings) if name.startswith("VLLM_")]
        assert [name for name in ours if name not in envs.environment_variables] == []
