"""The Ray Data pipeline of image summaries: read and decode images, Ray's own vLLM stage, collect answers."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from notellm2_ray.core import errors
from notellm2_ray.core.settings import GenerationSettings, SummarySettings
from notellm2_ray.infer.chunks import NoteFile, plan_chunks
from notellm2_ray.infer.engine import engine_arguments, engine_environment, engine_error, last_line
from notellm2_ray.infer.model_facts import ModelFacts
from notellm2_ray.infer.ray_data import dataset_of, own_context
from notellm2_ray.infer.resources import check_engines
from notellm2_ray.infer.summary_engine import summary_engine
from notellm2_ray.infer.summary_rows import Asking, ImageReader, answer

STAGE = "summarize-images"
READER_CPUS = 0.25  # a whole CPU for every stage beside the engine would not fit into a small cluster
_MAX_RETRIES = 5  # of a batch during which the engine died


class SummaryJob(NamedTuple):
    """What a run describes, and how."""

    facts: ModelFacts
    output: Path
    files: list[NoteFile]
    versions: dict[str, str]  # by file, of all that shapes its notes' summaries
    settings: SummarySettings
    generation: GenerationSettings
    prompt: list[int]
    stop_token_ids: list[int]
    total: int  # notes to describe in all


def run(job: SummaryJob, todo: set[str]) -> Generator[list[dict[str, Any]]]:
    """Yields the rows of each batch when it leaves the engine.

    Raises:
        ModelError: vLLM cannot run the model.
    """
    check_engines(STAGE, job.generation, beside=2 * READER_CPUS)
    only = pa.array(sorted(todo), pa.string())
    chunks = plan_chunks(job.files, job.settings.batch_rows, "", only).chunks
    with own_context() as context:
        # An image is no Arrow type. Without this setting each worker warns that it falls back to objects.
        context.enable_fallback_to_arrow_object_ext_type = True
        images = dataset_of(chunks).map_batches(
            ImageReader(frozenset(todo), job.versions, job.settings.max_image_pixels),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=READER_CPUS,
        )
        answered = _processor(job)(images)
        seen = False
        try:
            for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                assert isinstance(batch, pa.Table)
                seen = True
                yield batch.to_pylist()
        except (errors.NoteLLMError, OSError):
            raise
        except Exception as error:
            if not seen:
                raise engine_error(error, job.facts) from error
            raise errors.ModelError(
                f"{job.facts.model}: the engine failed at a batch and at {_MAX_RETRIES} retries. The finished batches "
                f"are kept: run the same command again to continue. Ray says: {last_line(str(error))}"
            ) from error


def _processor(job: SummaryJob) -> Any:
    """Ray's pipeline around the engine."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    generation = job.generation
    bundle = {"CPU": generation.cpus_per_engine, "GPU": generation.gpus_per_engine}
    config = vLLMEngineProcessorConfig(
        model_source=job.facts.model,
        engine_kwargs=engine_arguments(job.facts, generation, images=1, pixels=job.settings.max_image_pixels),
        runtime_env={"env_vars": engine_environment(generation)},
        accelerator_type=None,
        placement_group_config={"bundles": [{name: value for name, value in bundle.items() if value}]},
        batch_size=job.settings.batch_rows,
        max_concurrent_batches=job.settings.concurrent_batches,
        concurrency=(generation.engines, generation.engines),
        should_continue_on_error=True,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
    )
    ask: Any = Asking(job.prompt, job.settings, job.stop_token_ids)
    with _without_log():
        processor = build_processor(
            config,
            preprocess=ask,
            postprocess=answer,
            preprocess_map_kwargs={"num_cpus": READER_CPUS},
            postprocess_map_kwargs={"num_cpus": READER_CPUS},
        )
    stage = processor.get_stage_by_name("vLLMEngineStage")
    # Both are changed in place: assigning them would make the stage compute its resources again, from arguments that it
    # has already consumed. By default Ray retries a batch that kills its engine without end.
    stage.map_batches_kwargs["max_task_retries"] = _MAX_RETRIES
    stage.__dict__["fn"] = summary_engine(job.facts, generation, ask)
    return processor


@contextmanager
def _without_log() -> Iterator[None]:
    """Suppress the log of Ray's builder, which connects to Ray again and leaves Ray's log level raised."""
    ray_log = logging.getLogger("ray")
    level = ray_log.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        ray_log.setLevel(level)
