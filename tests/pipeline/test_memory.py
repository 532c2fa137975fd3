"""What a dry run says about memory: for training, tuning and engines, whether it fits, and what to change."""

import re

import pytest

from notellm2_ray.pipeline.dry_run import dry_run
from notellm2_ray.pipeline.engine_memory import cache_bytes_per_token
from notellm2_ray.presets import load_settings
from tests.support import tiny_models
from tests.support.tiny_mllm import save_mllm


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    llm, clip = tiny_models.save_llm(directory / "llm"), tiny_models.save_clip(directory / "clip")
    mllm = save_mllm(directory / "mllm")
    return [
        f"workspace={directory / 'runs'}",
        f"model.llm={llm}",
        f"model.vision={clip}",
        f"ranker.model={mllm}",
        f"summaries.model={mllm}",
        f"preferences.model={mllm}",
        "train.gpus_per_worker=1",
        "tune.gpus_per_worker=1",
        "generation.gpus_per_engine=1",
        "generation.max_model_len=1024",
    ]


def plan(given, verb, *more):
    return dry_run(load_settings(None, "demo", [*given, *more]), verb)


def test_training_says_what_memory_is_for_and_on_which_gpu_it_fits(given):
    text = plan(given, "train-embedder")
    line = next(one for one in text.splitlines() if one.startswith("memory of train-embedder notellm2, of each GPU"))
    for part in ("weights", "master copies", "gradients", "optimizer moments", "activations"):
        assert re.search(rf"{part} [\d.]+ [GM]iB", line), part
    assert "fits into a GPU of 15 GiB or more" in text and "of its host" in text


def peak(text):
    """GiB."""
    number, unit = re.search(r"of each GPU: ([\d.]+) (MiB|GiB) at once", text).groups()
    return float(number) / (1024 if unit == "MiB" else 1)


def test_where_it_does_not_fit_settings_that_help_are_named(given):
    more = [*given, "train.batch_pairs=512", "train.zero_stage=1"]
    whole = peak(plan(more, "train-embedder"))
    less = peak(plan(more, "train-embedder", "train.gradient_checkpointing=true"))
    assert less < whole
    between = (whole + less) / 2 / 0.92
    text = plan(more, "train-embedder", f"ray.gpu_memory_gb={between}")
    assert "does NOT fit into a GPU of" in text
    assert "would fit with train.gradient_checkpointing=true" in text
    text = plan(more, "train-embedder", "ray.gpu_memory_gb=0.0001")
    assert "no setting makes it fit: raise train.num_workers" in text


def test_tuning_and_engines_are_foretold_in_a_run(given):
    text = plan(given, "run-ranking", "ray.gpu_memory_gb=15")
    assert re.search(r"memory of train-ranker, of each GPU: .* at once \(weights", text)
    assert text.count("memory of train-ranker") == text.count("memory of an engine") == 1
    assert re.search(r"memory of an engine with \S+mllm, of each GPU: weights .*cache for a prompt of 1,024", text)
    assert re.search(r"fits into 0.9 of a GPU of 15 GiB, with [\d.]+ GiB of cache, for \d+ such prompts", text)
    text = plan(given, "score-candidates", "ray.gpu_memory_gb=1")
    assert "does NOT fit into 0.9 of a GPU of 1 GiB" in text


def test_a_model_that_cannot_be_read_is_no_error(given):
    text = plan(given, "train-embedder", "model.llm=no/such-directory/at-all")
    assert "memory of train-embedder notellm2: not foretold" in text


def test_a_token_s_cache():
    llama = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    assert cache_bytes_per_token(llama, 2) == 128 * 1024  # Llama-3-8B's, as its papers say
    assert cache_bytes_per_token({"text_config": llama}, 4) == 256 * 1024
