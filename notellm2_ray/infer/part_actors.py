"""Making parts on a pool of Ray Data actors: a call makes one part and reports its record, or the error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow as pa

from notellm2_ray.core import errors
from notellm2_ray.core.errors import ModelError, NoteLLMError
from notellm2_ray.infer.parts import MAX_ATTEMPTS, F, PartStore, recorded_fields
from notellm2_ray.infer.ray_data import dataset_of, own_context

CALLS_AT_ONCE = 2  # one part is with the model while the next is being read and tokenised
P = TypeVar("P")  # a part: a NamedTuple, whose part_id names it
_ARROW = {int: pa.int64(), str: pa.string()}


class PartActor(ABC, Generic[P, F]):
    """Loads a model once, then makes one part a call; two calls may run at once. Subclasses say what a part is.

    Attributes:
        part_type: the NamedTuple of a part to make.
        finished_type: of its record when it is finished.
    """

    part_type: ClassVar[Any]
    finished_type: ClassVar[Any]

    @abstractmethod
    def store(self, part: P) -> PartStore[F]:
        """Where the part is kept."""

    @abstractmethod
    def make(self, part: P) -> F:
        """Make a part and commit it.

        Raises:
            NoteLLMError, OSError: reported to the driver, where it stops the job.
        """

    @abstractmethod
    def describe(self, part: P) -> str:
        """Which part it is, and which settings save memory: for the error after too many attempts."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of ``part_type`` to rows of reports (:func:`report_schema`)."""
        reports = [self._report(self.part_type(**row)) for row in batch.to_pylist()]
        return pa.Table.from_pylist(reports, schema=report_schema(self.finished_type))

    def _report(self, part: Any) -> dict[str, Any]:
        store = self.store(part)
        about = {"output": str(store.output), "part_id": part.part_id}
        try:
            # Ray gives a dead actor's parts to another actor; one of them may have been finished in time.
            finished = store.finished(part.part_id) or self._attempt(store, part)
            return {**about, **asdict(finished)}
        except (NoteLLMError, OSError) as error:
            kind = type(error).__name__ if isinstance(error, NoteLLMError) else "OSError"
            return {**about, "error": kind, "message": str(error), "errno": getattr(error, "errno", None)}

    def _attempt(self, store: PartStore[F], part: Any) -> F:
        if store.begin_attempt(part.part_id) > MAX_ATTEMPTS:
            raise ModelError(
                f"{MAX_ATTEMPTS} actors died while they worked on {self.describe(part)}. The finished parts are kept: "
                "run the same command again"
            )
        return self.make(part)


def make_parts(
    actor: type[PartActor[P, F]],
    job: Any,
    parts: Sequence[P],
    *,
    actors: int,
    cpus: float,
    gpus: float,
    environment: Mapping[str, str] | None = None,
    reader: type | None = None,
    readers: int = 0,
) -> Generator[tuple[Path, F]]:
    """Make ``parts`` on the cluster; yields each one's output directory and record when it is finished, in any order.

    Close the generator if it is not exhausted: it holds the actors.

    Args:
        actor: constructed with ``job`` on every worker.
        actors: size of the pool, each actor with ``cpus`` and ``gpus``.
        environment: variables of the workers.
        reader: a class of actors that get the rows of ``parts`` before ``actor`` does, and add what they read for it.
            It is constructed with ``job`` as well.
        readers: how many of them, each with one CPU; 0: ``actor`` gets plain rows.

    Raises:
        NoteLLMError, OSError: the error that stopped a part; the finished parts are kept.
    """
    import ray

    remote: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    if environment:
        remote["runtime_env"] = {"env_vars": dict(environment)}
    with own_context():
        rows = dataset_of(parts)
        if readers:
            rows = rows.map_batches(
                reader,
                fn_constructor_args=(job,),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=readers, max_tasks_in_flight_per_actor=2),
                num_cpus=1,
            )
        reports = rows.map_batches(
            actor,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=min(actors, len(parts)),
                max_concurrent_calls_per_actor=CALLS_AT_ONCE,
                # One call more waits at the actor, so that the actor never waits for the driver.
                max_tasks_in_flight_per_actor=CALLS_AT_ONCE + 1,
                enable_true_multi_threading=True,
            ),
            **remote,
        )
        for batch in reports.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(batch, pa.Table)
            for row in batch.to_pylist():
                yield Path(row["output"]), finished_of(row, actor.finished_type)


def report_schema(finished_type: type[F]) -> pa.Schema:
    """Columns of a report: the output directory, the fields of ``finished_type``, and the error if there was one."""
    fields = {"part_id": pa.string(), **{name: _ARROW[kind] for name, kind in recorded_fields(finished_type).items()}}
    failure = {"error": pa.string(), "message": pa.string(), "errno": pa.int64()}
    return pa.schema({"output": pa.string(), **fields, **failure})


def finished_of(report: Mapping[str, Any], finished_type: type[F]) -> F:
    """The record in a report.

    Raises:
        NoteLLMError, OSError: the error that the report tells of.
    """
    if report["error"] == "OSError":
        raise OSError(report["errno"], report["message"])
    if report["error"] is not None:
        raise getattr(errors, report["error"])(report["message"])
    return finished_type(part_id=report["part_id"], **{name: report[name] for name in recorded_fields(finished_type)})
