"""The deployment that turns notes into vectors."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.memory import keep_freed_memory
from notellm2_ray.core.schema import Note
from notellm2_ray.serve.current import current, upcoming
from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.loaded_model import LoadedModel, Vectors, Workers
from notellm2_ray.serve.plan import Plan, replica_options

log = logging.getLogger("notellm2_ray.serve")

_SWITCH_SECONDS = 2e-4  # as in bulk embedding: a thread that keeps the interpreter longer starves a small model
_KEPT_SECONDS = 60.0  # a model that is served no more, after its last use
_RETRY_SECONDS = 30.0  # after a model could not be loaded


class Encoder:
    """One replica of the deployment.

    It holds the model that is served. While another one is to take its place it holds both, and a call says by
    fingerprint whose vectors it wants; the old one goes when it has not been asked for a minute.
    """

    def __init__(self, plan: Plan) -> None:
        import torch

        torch.set_num_threads(max(1, int(plan.serve.encoder.cpus)))
        keep_freed_memory()
        sys.setswitchinterval(_SWITCH_SECONDS)
        self.plan, self.device = plan, "cuda" if plan.serve.encoder.gpus else "cpu"
        self.figures = Figures(f"encoder-{_replica()}")
        self.workers = Workers(plan.serve.encode, self.figures)
        self.models = [self._load(self._served())]
        self._loading: asyncio.Task[None] | None = None
        self._failed: dict[Path, float] = {}  # when loading failed last (monotonic)

    async def encode(self, notes: Sequence[Note], columns: Sequence[str], fingerprint: str) -> Vectors:
        """Vectors of N notes.

        Args:
            notes: to be encoded.
            columns: which of ``embedding``, ``embedding_image``, ``embedding_text``.
            fingerprint: of the model.

        Raises:
            OverloadedError: the notes in hand take as long as anybody should wait.
            ModelError: this replica does not have that model (yet).
        """
        model = next((one for one in self.models if one.fingerprint == fingerprint), None)
        if model is None:
            self._look()
            there = ", ".join(one.fingerprint for one in self.models)
            raise ModelError(f"the encoder runs another model ({there}) than {fingerprint}, which is asked for")
        return await model.encode(notes, columns)

    async def describe(self) -> dict[str, Any]:
        """What this replica runs. Asked every few seconds, it also looks whether another model is to be loaded."""
        self._look()
        return {"fingerprints": [one.fingerprint for one in self.models]}

    def report(self) -> list[Family]:
        """This replica's figures."""
        return self.figures.snapshot()

    def _served(self) -> Path:
        return current(self.plan.directory).model or self.plan.model

    def _load(self, path: Path) -> LoadedModel:
        return LoadedModel(path, self.device, self.workers)

    def _look(self) -> None:
        """Load what is to be served, drop what is no more."""
        following = upcoming(self.plan.directory)
        wanted = [self._served()] + ([following.model] if following is not None and following.model else [])
        late = time.monotonic() - _KEPT_SECONDS
        if any(one.path in wanted for one in self.models):  # else the old one is all there is
            self.models = [one for one in self.models if one.path in wanted or one.used > late]
        if self._loading is not None and not self._loading.done():
            return
        there = {one.path for one in self.models}
        retry = time.monotonic() - _RETRY_SECONDS
        missing = [path for path in wanted if path not in there and self._failed.get(path, 0.0) < retry]
        if missing:
            self._loading = asyncio.get_running_loop().create_task(self._add(missing[0]))

    async def _add(self, path: Path) -> None:
        try:
            model = await asyncio.to_thread(self._load, path)
        except Exception:  # of any kind: the model that is there goes on
            log.exception("the model in %s could not be loaded; it is tried again", path)
            self._failed[path] = time.monotonic()
            return
        log.info("the model %s is loaded beside %s", model.fingerprint, ", ".join(o.fingerprint for o in self.models))
        self.models.append(model)


def _replica() -> str:
    from ray import serve

    return serve.get_replica_context().replica_id.unique_id


def encoder_deployment(plan: Plan) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    options = replica_options(plan.serve.encoder, drain_seconds=plan.serve.drain_seconds)
    return serve.deployment(Encoder, name="Encoder", **options)
