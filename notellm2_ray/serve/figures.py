"""Metrics of one replica, and the replicas' metrics together as a Prometheus page or a JSON summary."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Sample(NamedTuple):
    """One value of a metric."""

    name: str
    labels: dict[str, str]
    value: float


class Family(NamedTuple):
    """A metric and its values, as plain data that can be sent between processes."""

    name: str
    help: str
    kind: str
    samples: list[Sample]


class Figures:
    """Counters and histograms of one replica, in a registry of its own.

    Args:
        replica: name of the replica, a label of every value.
    """

    def __init__(self, replica: str) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.replica = replica
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "notellm2"}
        self._requests = Counter("http_requests", "Requests answered", ["route", "status"], **own)
        self._seconds = Histogram(
            "http_seconds", "Time from a request's head to its answer's end", ["route"], buckets=_SECONDS, **own
        )
        self._stages = Histogram("stage_seconds", "Time of one stage of an answer", ["stage"], buckets=_SECONDS, **own)
        self._sizes = Histogram("batch_size", "Items that were worked on together", ["stage"], buckets=_SIZES, **own)
        self._refused = Counter("refused", "Requests refused, by the error's type", ["type"], **own)
        self._fallbacks = Counter("recommend_fallbacks", "Recommendations without the ranker", ["reason"], **own)
        self._notes = Counter("notes_written", "Notes upserted or deleted", ["change"], **own)
        self._gauge = Gauge("state", "Index notes, fresh notes, seq, freshness in seconds, queues", ["what"], **own)
        self._stage_of: dict[str, Any] = {}
        self._children: dict[tuple[str, int], tuple[Any, Any]] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request when it ends; status 0 if the client disconnected."""
        children = self._children.get((route, status))
        if children is None:  # cached, because the look-up by labels costs more than counting
            children = self._requests.labels(route, str(status)), self._seconds.labels(route)
            self._children[route, status] = children
        children[0].inc()
        children[1].observe(seconds)

    def refused(self, kind: str) -> None:
        """Count a refused request."""
        self._refused.labels(kind).inc()

    def fallback(self, reason: str) -> None:
        """Count a recommendation that was not ranked; ``reason`` is one of a few fixed words."""
        self._fallbacks.labels(reason).inc()

    def wrote(self, change: str, notes: int) -> None:
        """Count notes that were upserted or deleted."""
        self._notes.labels(change).inc(notes)

    def batch(self, stage: str, size: int) -> None:
        """Record the size of a micro-batch or a commit."""
        self._sizes.labels(stage).observe(size)

    def state(self, **values: float) -> None:
        """Set values that go up and down."""
        for what, value in values.items():
            self._gauge.labels(what).set(value)

    def took(self, stage: str, seconds: float) -> None:
        """Record the time of one stage."""
        if stage not in self._stage_of:
            self._stage_of[stage] = self._stages.labels(stage)
        self._stage_of[stage].observe(seconds)

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Measure and record the time of a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.took(stage, time.perf_counter() - started)

    def snapshot(self) -> list[Family]:
        """All metrics as plain data."""
        return [
            Family(
                one.name,
                one.documentation,
                one.type,
                [
                    Sample(s.name, {**s.labels, "replica": self.replica}, s.value)
                    for s in one.samples
                    if not s.name.endswith("_created")
                ],
            )
            for one in self.registry.collect()
        ]


def render(snapshots: Iterable[Iterable[Family]]) -> bytes:
    """Several replicas' metrics in Prometheus's text format."""
    from prometheus_client import generate_latest
    from prometheus_client.metrics_core import Metric

    merged: dict[str, Metric] = {}
    for family in (family for snapshot in snapshots for family in snapshot):
        metric = merged.setdefault(family.name, Metric(family.name, family.help, family.kind))
        for sample in family.samples:
            metric.add_sample(sample.name, sample.labels, sample.value)

    class Merged:
        def collect(self) -> Iterable[Metric]:
            return merged.values()

    return generate_latest(Merged())  # type: ignore[arg-type]


def summary(snapshots: Iterable[Iterable[Family]]) -> dict[str, Any]:
    """A JSON summary over all replicas: counts, and mean, p50 and p99 of the histograms."""
    sums: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in (family for snapshot in snapshots for family in snapshot):
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "replica"))
            numbers = sums.setdefault(sample.name.removeprefix("notellm2_"), {})
            numbers[labels] = numbers.get(labels, 0.0) + sample.value
    return {
        "requests": _by_label(sums.get("http_requests_total", {}), "route", "status"),
        "refused": _by_label(sums.get("refused_total", {}), "type"),
        "fallbacks": _by_label(sums.get("recommend_fallbacks_total", {}), "reason"),
        "notes_written": _by_label(sums.get("notes_written_total", {}), "change"),
        "latency_ms": _quantiles(sums, "http_seconds", "route", 1000),
        "stage_ms": _quantiles(sums, "stage_seconds", "stage", 1000),
        "batch_sizes": _quantiles(sums, "batch_size", "stage", 1),
    }


def _by_label(numbers: Mapping[tuple[tuple[str, str], ...], float], *names: str) -> dict[str, int]:
    return {" ".join(dict(labels)[name] for name in names): int(value) for labels, value in sorted(numbers.items())}


def _quantiles(sums: Mapping[str, Any], name: str, label: str, scale: float) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for labels, count in sums.get(f"{name}_count", {}).items():
        value = dict(labels)[label]
        buckets = sorted(
            (float(dict(key)["le"]), number)
            for key, number in sums[f"{name}_bucket"].items()
            if dict(key)[label] == value
        )
        found[value] = {
            "count": int(count),
            "mean": round(scale * sums[f"{name}_sum"][labels] / count, 3) if count else 0.0,
            "p50": round(scale * quantile(buckets, 0.5), 3),
            "p99": round(scale * quantile(buckets, 0.99), 3),
        }
    return found


def quantile(buckets: list[tuple[float, float]], share: float) -> float:
    """A quantile from cumulative (upper bound, count) buckets.

    Linear within a bucket; the largest finite bound if the quantile lies beyond it.
    """
    if not buckets or not buckets[-1][1]:
        return 0.0
    wanted, lower, below = share * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return lower
