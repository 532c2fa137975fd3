"""Joining a Ray cluster, or starting the small one inside this process."""

from __future__ import annotations

import logging
import os
from typing import Any

from notellm2_ray.core.settings import RaySettings


def connect(settings: RaySettings) -> Any:
    """Connect to the cluster this process was submitted to, or start one here; a second call does nothing.

    Under ``ray job submit`` and wherever RAY_ADDRESS is set, Ray finds the cluster itself. An embedded cluster declares
    at least four logical CPUs, because a Ray Data pipeline whose stages each reserve one waits for ever on fewer.

    Returns:
        the ``ray`` module, connected.
    """
    import ray

    if ray.is_initialized():
        return ray
    # Threads of GNU OpenMP spin while they wait for each other. Beside Ray's own processes on two cores that made
    # training steps up to ten times slower; workers inherit this. (A thousand turns, not none: waking costs too.)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
    else:
        ray.init(
            address="local",
            num_cpus=settings.num_cpus or max(4, os.cpu_count() or 1),
            object_store_memory=int(settings.object_store_gb * 2**30),
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
    # Stages log their own progress; Ray Data's plans and bars would bury it.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
