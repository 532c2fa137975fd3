"""Settings of the online service: address, scaling of its deployments, request limits, recommendation."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen


class DeploymentSettings(Frozen):
    """Replicas of one deployment."""

    replicas: int = Field(1, ge=1, description="replicas; with max_replicas the minimum")
    max_replicas: int | None = Field(
        None, ge=1, description="scale up to so many replicas with the load; null: do not scale"
    )
    target_ongoing: float = Field(4, gt=0, description="requests in progress per replica that scaling aims at")
    cpus: float = Field(0.5, ge=0, description="CPUs reserved for a replica")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs reserved for a replica, which uses no more; below 1: its share of one; null: "
        "generation.gpus_per_engine for `ranker` and `preferences`, none for others",
    )
    max_ongoing: int = Field(64, ge=1, description="requests that a replica works on at once")
    max_queued: int = Field(64, ge=0, description="requests that may wait for a replica; further ones are refused")

    @model_validator(mode="after")
    def _order(self) -> DeploymentSettings:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below replicas ({self.replicas})")
        return self

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.replicas

    @property
    def slots(self) -> int:
        """Most requests that a replica accepts at a time; further ones are refused."""
        return self.max_ongoing + self.max_queued

    @property
    def slots_of_one(self) -> int:
        """Most slots that calls to one other deployment may take: while that one is down, all of its calls wait."""
        return max(4, self.slots // 4)


class LimitSettings(Frozen):
    """Limits of a request. Above them the answer is 413 or 422, before parsing where possible."""

    body_bytes: int = Field(32_000_000, ge=1024, description="bytes of a request's body")
    bodies_bytes: int = Field(
        256_000_000, ge=1024, description="bytes of all bodies that a replica holds at once; above: 429"
    )
    body_seconds: float = Field(30, gt=0, description="time a body may take to arrive")
    json_depth: int = Field(16, ge=4, description="nesting depth of a body's JSON")
    notes: int = Field(64, ge=1, description="notes in a request")
    ids: int = Field(1000, ge=1, description="ids in a list of a request")
    events: int = Field(1000, ge=1, description="events in a request")
    k: int = Field(1000, ge=1, description="neighbours asked for")
    recommend_k: int = Field(100, ge=1, description="recommendations asked for")
    id_characters: int = Field(256, ge=8, description="characters of an id")
    title_characters: int = Field(2_000, ge=1, description="characters of a title or of a search text")
    content_characters: int = Field(100_000, ge=1, description="characters of a note's content")
    topics: int = Field(100, ge=1, description="topics of a note or of a filter")
    topic_characters: int = Field(200, ge=1, description="characters of a topic")
    image_bytes: int = Field(10_000_000, ge=1024, description="bytes of an encoded image")
    image_pixels: int = Field(25_000_000, ge=1024, description="declared width times height of an image")


class FetchSettings(Frozen):
    """Images given by URL; nothing is fetched unless hosts are listed."""

    hosts: tuple[str, ...] = Field((), description="hosts that images may come from; *.example.org: its subdomains")
    seconds: float = Field(5, gt=0, description="time for one image, redirects included")
    redirects: int = Field(3, ge=0, description="most redirects followed; each is checked like the first address")
    plain_http: bool = Field(False, description="also fetch http:// addresses")


class EncodeSettings(Frozen):
    """Micro-batches of the encoder's replicas."""

    batch: int = Field(32, ge=1, description="most notes in a micro-batch (and in a forward pass)")
    threads: int = Field(1, ge=1, description="threads that decode and tokenise, beside the model's")
    batch_tokens: int = Field(16_384, ge=64, description="padded tokens in a forward pass")
    timeout_seconds: float = Field(20, gt=0, description="time limit for the vectors of one request; after it: 503")


class RecommendSettings(Frozen):
    """Recommendation: recall from the recent history, then ranking."""

    history_notes: int = Field(10, ge=1, description="latest notes of the history, each used as a query")
    per_note: int = Field(30, ge=1, description="neighbours taken for each of these notes")
    recency_decay: float = Field(0.85, gt=0, le=1, description="weight of a note relative to the next more recent one")
    score_power: float = Field(2.0, gt=0, description="score of a neighbour: weight * max(cosine, 0) ** score_power")
    ranked: int = Field(20, ge=1, description="best candidates of recall that the ranker scores")
    budget_ms: float = Field(800, gt=0, description="time limit of an answer; ranking that takes longer is skipped")
    use_ranker: bool = Field(True, description="rank by P(yes) if a ranker is deployed")


class ArmSettings(Frozen):
    """One arm of an experiment: the settings that differ for its users."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_.-]{1,40}$", description="name of the arm in answers, exposures and the lift table"
    )
    share: float = Field(gt=0, le=1, description="share of users")
    use_ranker: bool | None = Field(None, description="overrides recommend.use_ranker")
    recency_decay: float | None = Field(None, gt=0, le=1, description="overrides recommend.recency_decay")
    score_power: float | None = Field(None, gt=0, description="overrides recommend.score_power")
    history_notes: int | None = Field(None, ge=1, description="overrides recommend.history_notes")


class ServeSettings(Frozen):
    """The online service: one Ray Serve application."""

    host: str = Field("127.0.0.1", description="address to listen at; API keys are required unless it is loopback")
    port: int = Field(8000, ge=1, le=65535, description="port of the API and the web page")
    name: str = Field("notellm2", pattern=r"^[a-z0-9-]{1,40}$", description="name of the Ray Serve application")
    haproxy: bool = Field(
        True, description="use Ray's HAProxy, which handles four times the requests of its Python proxy"
    )
    auth: Literal["auto", "on", "off"] = Field(
        "auto", description="API keys; auto: on unless the host is loopback; off is refused on other hosts"
    )
    keys_file: Path | None = Field(
        None, description="file of hashed API keys; null: serving/keys.json of the workspace"
    )
    ready_seconds: float = Field(300, gt=0, description="time limit for the deployments to start")
    drain_seconds: float = Field(20, ge=0, description="time that open requests have to finish at a shutdown")
    gateway: DeploymentSettings = Field(
        DeploymentSettings(cpus=0.5, target_ongoing=16, max_ongoing=64, max_queued=128),
        description="handles HTTP and holds a copy of the index, so that a search by id stays in one process",
    )
    encoder: DeploymentSettings = Field(
        DeploymentSettings(cpus=1, target_ongoing=8, max_ongoing=64, max_queued=64),
        description="computes vectors of notes",
    )
    writer_cpus: float = Field(0.5, ge=0, description="CPUs reserved for the writer (a single actor)")
    users_cpus: float = Field(0.2, ge=0, description="CPUs reserved for the user store (a single actor)")
    state_resource: str | None = Field(
        None,
        description="Ray resource that marks the node for the writer and the user store, in a cluster of several "
        "nodes; the user database must be on a local disk",
    )
    users_file: Path | None = Field(None, description="user database; null: serving/users.sqlite of the workspace")
    preferences: DeploymentSettings | None = Field(
        None, description="vLLM engine that updates preferences when a user's block is full; null: none"
    )
    ranker: DeploymentSettings | None = Field(
        None, description="vLLM engine that scores candidates by P(yes); null: none"
    )
    ranker_model: str | None = Field(None, description="directory of the tuned ranker; null: the workspace's own")
    encode: EncodeSettings = Field(EncodeSettings(), description="micro-batches of the encoder")
    limits: LimitSettings = Field(LimitSettings(), description="limits of a request")
    fetch: FetchSettings = Field(FetchSettings(), description="images given by URL")
    recommend: RecommendSettings = Field(RecommendSettings(), description="recall and ranking for a user")
    experiment: str = Field(
        "default", pattern=r"^[A-Za-z0-9_.-]{1,40}$", description="name; a new one assigns users to arms anew"
    )
    arms: tuple[ArmSettings, ...] = Field((), description="arms that users are split into; empty: no experiment")
    poll_ms: float = Field(
        50, ge=5, description="how often a replica looks for commits: the delay until a new note is found"
    )
    commit_wait_ms: float = Field(2, ge=0, description="time that a commit waits for further rows")
    commit_rows: int = Field(512, ge=1, description="most rows in a commit")
    rebuild_share: float = Field(0.1, gt=0, description="rebuild the index at this share of new and deleted rows")
    rebuild_rows: int = Field(2000, ge=1, description="fewest new and deleted rows for a rebuild")

    @model_validator(mode="before")
    @classmethod
    def _keep_what_is_not_given(cls, values: Any) -> Any:
        """Complete a partly given ``gateway`` or ``encoder`` with its own defaults, not DeploymentSettings'."""
        if not isinstance(values, dict):
            return values
        parts = {name: values[name] for name in ("gateway", "encoder") if isinstance(values.get(name), dict)}
        own = {name: cls.model_fields[name].default.model_dump() for name in parts}
        return {**values, **{name: {**own[name], **part} for name, part in parts.items()}}

    @model_validator(mode="after")
    def _consistent(self) -> ServeSettings:
        if self.auth == "off" and not self.on_loopback:
            raise ValueError(
                f"serve.auth=off with serve.host={self.host}: anyone who can reach it could write. Keep "
                "serve.auth=auto and make a key with `notellm2 keys create`, or listen at 127.0.0.1"
            )
        if self.arms and abs(sum(arm.share for arm in self.arms) - 1) > 1e-6:
            raise ValueError(f"serve.arms: the shares add up to {sum(arm.share for arm in self.arms):g}, not to 1")
        if len({arm.name for arm in self.arms}) != len(self.arms):
            raise ValueError("serve.arms: two arms have the same name")
        return self

    def with_engine_gpus(self, gpus: float) -> ServeSettings:
        """The same settings, in which deployments around an engine reserve ``gpus`` if they do not say how many."""
        engines = {"ranker": self.ranker, "preferences": self.preferences}
        open_ones = {name: one for name, one in engines.items() if one is not None and one.gpus is None}
        return self.model_copy(update={name: one.model_copy(update={"gpus": gpus}) for name, one in open_ones.items()})

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def needs_key(self) -> bool:
        return self.auth == "on" or not self.on_loopback
