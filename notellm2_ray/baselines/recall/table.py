"""The recall baselines that ``evaluate.baselines`` can name.

A baseline is one file, which ends in a :class:`RecallBaseline`, and one row here. A script adds its own row before it
calls :func:`notellm2_ray.cli.main`::

    RECALL_BASELINES.add("newest", RecallBaseline("-", newest_ranks))

`notellm2 run` starts processes of its own, which find only installed rows; for it, another package declares the row::

    [project.entry-points."notellm2_ray.recall_baselines"]
    newest = "my_package.my_module:BASELINE"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from notellm2_ray.core.registry import Registry

if TYPE_CHECKING:
    from notellm2_ray.baselines.recall.baseline import RecallBaseline

RECALL_BASELINES: Registry[RecallBaseline] = Registry(
    "recall baseline",
    "notellm2_ray.recall_baselines",
    {
        "bm25": "notellm2_ray.baselines.recall.bm25:BASELINE",
        "item_cf": "notellm2_ray.baselines.recall.item_cf:BASELINE",
        "swing": "notellm2_ray.baselines.recall.swing:BASELINE",
        "popularity": "notellm2_ray.baselines.recall.popularity:BASELINE",
        "sentence_encoder": "notellm2_ray.baselines.recall.sentence_encoder:BASELINE",
        "random": "notellm2_ray.baselines.recall.random:BASELINE",
    },
)
