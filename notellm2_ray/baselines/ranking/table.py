"""The ranking baselines that ``ranking.baselines`` can name, and what the named ones need.

A baseline is one file, which ends in a :class:`RankingBaseline`, and one row here. A script adds its own row before it
calls :func:`notellm2_ray.cli.main`::

    RANKING_BASELINES.add("longest_title", RankingBaseline(longest_title_scores))

`notellm2 run` starts processes of its own, which find only installed rows; for it, another package declares the row::

    [project.entry-points."notellm2_ray.ranking_baselines"]
    longest_title = "my_package.my_module:BASELINE"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from notellm2_ray.core.registry import Registry
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.ranking import RankerVariant

if TYPE_CHECKING:
    from notellm2_ray.baselines.ranking.baseline import Need, RankingBaseline

RANKING_BASELINES: Registry[RankingBaseline] = Registry(
    "ranking baseline",
    "notellm2_ray.ranking_baselines",
    {
        "random": "notellm2_ray.baselines.ranking.random:BASELINE",
        "popularity": "notellm2_ray.baselines.ranking.popularity:BASELINE",
        "newest": "notellm2_ray.baselines.ranking.newest:BASELINE",
        "gru4rec": "notellm2_ray.baselines.ranking.gru4rec:BASELINE",
        "sasrec": "notellm2_ray.baselines.ranking.sasrec:BASELINE",
        "gru4rec_image": "notellm2_ray.baselines.ranking.gru4rec_image:BASELINE",
        "gru4rec_summary": "notellm2_ray.baselines.ranking.gru4rec_summary:BASELINE",
        "untuned": "notellm2_ray.baselines.ranking.untuned:BASELINE",
        "untuned_text": "notellm2_ray.baselines.ranking.untuned_text:BASELINE",
    },
)


def named(settings: Settings) -> dict[str, RankingBaseline]:
    """Name to row of the baselines that ``ranking.baselines`` names, in its order.

    Raises:
        ConfigError: a name is unknown.
    """
    return {name: RANKING_BASELINES.get(name) for name in settings.ranking.baselines}


def in_table_order(settings: Settings) -> dict[str, RankingBaseline]:
    """The same rows in the order of the table above."""
    rows = named(settings)
    return {name: rows[name] for name in RANKING_BASELINES.names() if name in rows}


def needs(settings: Settings) -> set[Need]:
    """What the named rows need from earlier stages, besides sequences and notes."""
    return {need for row in named(settings).values() for need in row.needs}


def untuned_rows(settings: Settings) -> dict[str, RankerVariant]:
    """The named rows whose scores come from the untuned model: name to the ranker variant that it is prompted like."""
    return {name: row.untuned for name, row in named(settings).items() if row.untuned is not None}
