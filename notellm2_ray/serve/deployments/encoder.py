"""The deployment that embeds notes."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from notellm2_ray.core.cards import USED, only_start
from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.memory import keep_freed_memory
from notellm2_ray.core.schema import Note
from notellm2_ray.index.table import table_info
from notellm2_ray.live.current import current, upcoming
from notellm2_ray.live.durability import manifests
from notellm2_ray.live.table import LiveTable
from notellm2_ray.serve.deployments.loaded_model import LoadedModel, Vectors, Workers
from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.spec import ServiceSpec, replica_options

log = logging.getLogger("notellm2_ray.serve")

_SWITCH_SECONDS = 2e-4  # as in bulk embedding: if threads hold the interpreter longer, a small model has to wait
_KEPT_SECONDS = 60.0  # how long a model is kept after its last use, once it is no longer served
_RETRY_SECONDS = 30.0  # after a model could not be loaded
_MOST_FAILURES = 3
_LOOK_SECONDS = 1.0
_NOTICE_SECONDS = 0.5


class Encoder:
    """One replica.

    It holds the served model and, during a swap, the next one as well; a call names the model it wants by fingerprint.
    The old model is dropped when no call has asked for it for a minute.
    """

    def __init__(self, spec: ServiceSpec) -> None:
        import torch

        torch.set_num_threads(max(1, int(spec.serve.encoder.cpus)))
        keep_freed_memory()
        sys.setswitchinterval(_SWITCH_SECONDS)
        self.spec, self.device = spec, "cuda" if spec.serve.encoder.gpus else "cpu"
        self.figures = Figures(f"encoder-{_replica()}")
        if 0 < (share := spec.serve.encoder.gpus or 0) < 1:
            torch.cuda.set_per_process_memory_fraction(USED * share)  # engines beside it have the rest of the card
        self.workers = Workers(spec.serve.encode, spec.precision, self.figures, spec.dimensions)
        self.models = [self._load(self._served())]
        self.loading: Path | None = None
        self._failed: dict[Path, tuple[int, float]] = {}  # number of failed loads, and time of the last (monotonic)
        self._look_now, self._looking = threading.Event(), threading.Lock()
        threading.Thread(target=self._keep_looking, name="models", daemon=True).start()

    async def encode(self, notes: Sequence[Note], columns: Sequence[str], fingerprint: str) -> Vectors:
        """Vectors of N notes; waits while the model is being loaded.

        Args:
            notes: to be embedded.
            columns: which of ``embedding``, ``embedding_image``, ``embedding_text``.
            fingerprint: of the model.

        Raises:
            OverloadedError: the notes in hand would take too long.
            ModelError: this replica does not have that model.
        """
        model = self._model(fingerprint)
        if model is None:
            self._look_now.set()
            await asyncio.sleep(_NOTICE_SECONDS)
            while (model := self._model(fingerprint)) is None and self.loading is not None:
                await asyncio.sleep(0.05)
        if model is None:
            there = ", ".join(one.fingerprint for one in self.models)
            raise ModelError(f"the model {fingerprint} is needed, but the encoder runs {there}")
        return await model.encode(notes, columns)

    def describe(self, needed: str) -> dict[str, Any]:
        """The models that this replica holds.

        Args:
            needed: fingerprint of the model that the caller needs; it is kept for some longer.
        """
        model = self._model(needed)
        if model is not None:
            model.used = time.monotonic()
        models = [{"path": str(one.path), "fingerprint": one.fingerprint, "files": one.files} for one in self.models]
        return {"models": models}

    def report(self) -> list[Family]:
        """This replica's figures."""
        return self.figures.snapshot()

    def _model(self, fingerprint: str) -> LoadedModel | None:
        return next((one for one in self.models if one.fingerprint == fingerprint), None)

    def _served(self) -> Path:
        return current(self.spec.directory).model or self.spec.model

    def _load(self, path: Path) -> LoadedModel:
        # An engine that starts on the same card measures its memory.
        with only_start() if self.device == "cuda" else nullcontext():
            return LoadedModel(path, self.device, self.workers, _fingerprint(self.spec, path))

    def _keep_looking(self) -> None:
        while True:
            self._look_now.wait(_LOOK_SECONDS)
            self._look_now.clear()
            try:
                with self._looking:
                    self._look()
            except Exception:  # any kind, for example a damaged CURRENT: the loaded models stay in use
                log.exception("cannot find out which model to serve; trying again")

    def _look(self) -> None:
        """Load the models that are needed and drop those that are not."""
        next_served = upcoming(self.spec.directory)  # NEXT before CURRENT: a switch writes CURRENT, then removes NEXT
        wanted = [self._served()] + ([next_served.model] if next_served is not None and next_served.model else [])
        late = time.monotonic() - _KEPT_SECONDS
        for one in self.models:
            own_copy = next((path for path in wanted if path.name == one.fingerprint), None)
            one.path = own_copy or one.path  # the same model, copied into the serving directory
            if one.path in wanted:
                one.wanted = time.monotonic()
        if any(one.path in wanted for one in self.models):  # otherwise the old model is the only one
            kept = [one for one in self.models if max(one.used, one.wanted) > late or one.path in wanted]
            if len(kept) < len(self.models):
                self.models = kept
                self._free()
        there = {one.path for one in self.models}
        for path in wanted:
            if path not in there and self._may_be_loaded(path):
                self._add(path)

    def _may_be_loaded(self, path: Path) -> bool:
        """False for a while after a failure, and after several: each attempt takes memory from the running model."""
        times, last = self._failed.get(path, (0, 0.0))
        return times < _MOST_FAILURES and (not times or time.monotonic() > last + _RETRY_SECONDS)

    def _add(self, path: Path) -> None:
        self.loading = path
        try:
            model = self._load(path)
            log.info("the model %s was loaded beside %s", model.fingerprint, [one.fingerprint for one in self.models])
            self.models = [*self.models, model]
        except Exception:  # any kind: the running model stays in use
            log.exception("the model in %s cannot be loaded", path)
            self._failed[path] = (self._failed.get(path, (0, 0.0))[0] + 1, time.monotonic())
            self._free()
        finally:
            self.loading = None

    def _free(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.empty_cache()


def _fingerprint(spec: ServiceSpec, model: Path) -> str | None:
    """Of a model when the vectors were made that are served, or served next, with it; None: there are none yet."""
    served, next_served = current(spec.directory), upcoming(spec.directory)
    if next_served is not None and next_served.model == model:
        return LiveTable(next_served.table).model_fingerprint
    if manifests(served.table):
        return LiveTable(served.table).model_fingerprint
    return table_info(spec.embeddings).model_fingerprint if spec.embeddings.exists() else None


def _replica() -> str:
    from ray import serve

    return serve.get_replica_context().replica_id.unique_id


def encoder_deployment(spec: ServiceSpec) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    options = replica_options(spec.serve.encoder, drain_seconds=spec.serve.drain_seconds)
    return serve.deployment(Encoder, name="Encoder", **options)
