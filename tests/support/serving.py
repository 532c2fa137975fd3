"""A small service for tests: a tiny embedder, notes, their bulk vectors, and a service's spec with them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cloudpickle
import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_ray.core.schema import NOTE_SCHEMA, Note
from notellm2_ray.core.settings.ranking import RankerSettings
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.core.settings.serve import ArmSettings, DeploymentSettings, RecommendSettings, ServeSettings
from notellm2_ray.serve.experiments import arm_of
from notellm2_ray.serve.spec import ServiceSpec
from tests.support import ROOT

SMALL = DeploymentSettings(cpus=0.05)
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class World:
    """Outputs of the bulk jobs: ``notes`` and their ``vectors`` by column."""

    base: Path
    model: Path
    encoder: Any
    notes: Sequence[Note]
    vectors: dict[str, np.ndarray]

    def spec(self, name: str, **changes: Any) -> ServiceSpec:
        """A spec with its own serving directory; ``changes`` are ServeSettings, or ``spec_...``: the spec's fields."""
        own = {key.removeprefix("spec_"): changes.pop(key) for key in list(changes) if key.startswith("spec_")}
        serve = {"port": free_port(), "gateway": SMALL, "encoder": SMALL, "writer_cpus": 0.05, "users_cpus": 0.05}
        return ServiceSpec(
            directory=self.base / name,
            model=self.model,
            notes=self.base / "notes",
            embeddings=self.base / "bulk.lance",
            serve=ServeSettings(**{**serve, "drain_seconds": 3, "ready_seconds": 120, **changes}),
            index=IndexSettings(),
            ranker=RankerSettings(),
            **own,
        )


def make_world(base: Path, num: int = 40, embedding_dim: int = 16) -> World:
    """A tiny random embedder, ``num`` notes, and the tables that the bulk jobs would write."""
    from notellm2_ray.index.table import embedding_schema, write_table
    from notellm2_ray.models.embedder.build import build_encoder
    from notellm2_ray.models.embedder.encoder import NoteEncoder
    from tests.support import tiny_models

    base.mkdir(exist_ok=True)
    paths = {"llm_path": tiny_models.save_llm(base / "llm"), "vision_path": tiny_models.save_clip(base / "clip")}
    build_encoder(tiny_models.settings(embedding_dim=embedding_dim), 0, **paths).save_pretrained(base / "model")
    encoder = NoteEncoder.from_pretrained(base / "model")
    notes = tiny_models.notes(num, without_image=(3,))
    (base / "notes").mkdir()
    rows = [{**note._asdict(), "created_at": START + timedelta(days=row)} for row, note in enumerate(notes)]
    pq.write_table(pa.Table.from_pylist(rows, schema=NOTE_SCHEMA), base / "notes" / "part.parquet")
    names = {"embedding": "multimodal", "embedding_image": "image", "embedding_text": "text"}
    vectors = {column: encoder.encode(notes, inputs) for column, inputs in names.items()}
    schema = embedding_schema(embedding_dim, list(names), model_fingerprint=encoder.fingerprint)
    arrays = [pa.array([note.note_id for note in notes])]
    arrays += [pa.FixedSizeListArray.from_arrays(pa.array(vectors[name].ravel()), embedding_dim) for name in names]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    write_table(base / "bulk.lance", [batch], model_fingerprint=encoder.fingerprint)
    return World(base, base / "model", encoder, notes, vectors)


class Service:
    """A service in its own process with its own Ray, which ends with that process.

    Attributes:
        http: a client of it.
        output: what it has written so far (a file).
    """

    def __init__(self, spec: ServiceSpec, directory: Path, environment: dict[str, str] | None = None) -> None:
        (directory / "spec").write_bytes(cloudpickle.dumps(spec))
        self.spec, self.output = spec, directory / "output"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.serving", str(directory / "spec")],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.http = self.client()
        try:
            wait_for(lambda: self._is_up(), 180)
        except BaseException:
            self.stop()
            raise

    def client(self, key: str = "") -> httpx.Client:
        """A new client, for example for a thread of its own."""
        address = f"http://127.0.0.1:{self.spec.serve.port}"
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=address, headers=headers, timeout=60, trust_env=False)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment's replicas."""
        return self.processes(f"ray::ServeReplica:{self.spec.serve.name}:{deployment}")

    def processes(self, name: str) -> list[psutil.Process]:
        """Its processes with a name in their command line."""
        found = []
        for one in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):  # also raised for a zombie
                if name in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def log(self) -> str:
        """What it and its replicas have logged so far. Replicas keep all but errors back for a while."""
        files = sorted(Path("/tmp/ray").glob(f"session_*_{self.process.pid}/logs/serve/*.log"))
        return "".join(one.read_text() for one in [self.output, *files])

    def stop(self, seconds: float = 60) -> int | None:
        """Terminate it; its exit status, or None if it had to be killed."""
        self.http.close()
        tree = self._tree()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return None
        finally:
            for one in tree:
                if one.is_running():
                    one.kill()

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        return "API " in self.output.read_text()

    def _tree(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def user_in(arm: str, prefix: str) -> str:
    """A user of the shared service's arm ``ranked`` or ``recalled``, named by the prefix and a number."""
    arms = (ArmSettings(name="ranked", share=0.5), ArmSettings(name="recalled", share=0.5))
    names = (f"{prefix}{number}" for number in range(1000))
    return next(name for name in names if arm_of(name, "default", arms, RecommendSettings()).name == arm)


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """The value of ``condition`` once it is true."""
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.05)


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Run the service of a pickled spec."""
    import functools
    import logging

    from notellm2_ray.core.cluster import connect
    from notellm2_ray.core.settings import RaySettings
    from notellm2_ray.serve.launch import serve_forever

    logging.basicConfig(level=logging.INFO)
    spec = cloudpickle.loads(Path(sys.argv[1]).read_bytes())
    serve_forever(spec, functools.partial(connect, RaySettings(num_cpus=8, object_store_gb=0.2)))


if __name__ == "__main__":
    main()
