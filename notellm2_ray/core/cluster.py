"""Joining a Ray cluster, or starting a small one in this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from notellm2_ray.core.settings import RaySettings


def started_here() -> bool:
    """Whether Ray was started by this process. Another cluster may grow, and Ray does not say how far."""
    from ray._private import worker

    node = worker._global_node
    return node is not None and node.is_head()


def connect(settings: RaySettings, environment: Mapping[str, str] | None = None) -> Any:
    """Connect to the cluster that this process was submitted to, or start one here; a second call does nothing.

    Under ``ray job submit``, and wherever RAY_ADDRESS is set, Ray finds the cluster itself. An embedded cluster has at
    least four logical CPUs: with fewer, a Ray Data pipeline whose steps each reserve one would wait forever.

    Args:
        environment: variables for all processes that this job starts in a cluster that it joins.

    Returns:
        the ``ray`` module, connected.
    """
    import ray

    if ray.is_initialized():
        return ray
    # Threads of GNU OpenMP spin while they wait for each other. On two cores, beside Ray's own processes, that made
    # training steps up to ten times slower. Workers inherit this. (Some spinning is left, because waking a thread has a
    # cost too.)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True, runtime_env={"env_vars": dict(environment)} if environment else None)
    else:
        ray.init(
            address="local",
            num_cpus=settings.num_cpus or max(4, os.cpu_count() or 1),
            object_store_memory=int(settings.object_store_gb * 2**30),
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
    # Stages log their own progress, which would be lost between Ray Data's plans and progress bars.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
