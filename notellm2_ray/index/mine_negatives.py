"""Mining hard negatives: notes that an embedder puts near a training query, though nothing relates them.

A query's neighbours are looked at from ``min_rank`` to ``max_rank``: nearer ones are too likely to be related, although
no log says so. Of these, a negative of a pair (query, target)

- is not related to the query by any training or validation pair, in either direction;
- has neither the text nor the image of the query or of a note that is related to it;
- has no user who clicked both it and the query (``max_common_users``): pairs are only a note's most related ones;
- is less similar to the query than the target is, by the margins (positive-aware mining: Moreira et al.,
  NV-Retriever, arXiv 2407.15831).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.progress import Progress
from notellm2_ray.core.schema import NEGATIVES, PAIR_SCHEMA
from notellm2_ray.core.settings.retrieval import IndexSettings, NegativeSettings
from notellm2_ray.index.ann import AnnIndex
from notellm2_ray.index.table import read_vectors
from notellm2_ray.index.unrelated import CommonClicks, Related, copies_among

log = logging.getLogger("notellm2_ray")

_NUMBERS_AT_ONCE = 1 << 24  # of the neighbours' vectors in memory: 64 MB
_MANY = 0.5  # if more of the pairs have no negative, a warning says so


class _Pool(NamedTuple):
    """The notes that have a vector."""

    ids: np.ndarray  # (N,) object
    vectors: np.ndarray  # (N, D) float32, unit length


def mine_negatives(
    pairs: Path,
    table: Path,
    output: Path,
    settings: NegativeSettings,
    index: IndexSettings,
    seed: int,
    *,
    events: Path,
    click_actions: Sequence[str],
) -> dict[str, Any]:
    """Write negatives.parquet into ``output``: the training pairs in their order, with lists of their negatives.

    Its columns are those of the pairs, ``negatives`` (note ids, nearest first) and ``negative_cosines``. A pair whose
    query or target has no vector has none.

    Args:
        pairs: directory with train.parquet, valid.parquet, train_notes.arrow and train_log.json.
        table: the embedding table of the training notes.
        index, seed: of the ANN index that is built to search them, and not kept.
        events: Parquet directory of the events, of which the training log is read.
        click_actions: that count as a click.

    Returns:
        counts for the manifest: pairs, pairs_without, negatives; means of the cosines of targets and of negatives; and
        how many neighbours were left out as related or copies, as clicked by the same users, and as too similar.

    Raises:
        DataError: no pair has a negative, or the notes and the vectors do not fit.
    """
    ids, vectors = read_vectors(table)
    pool = _Pool(ids, vectors)
    trained = pq.read_table(pairs / "train.parquet").select(PAIR_SCHEMA.names)
    ends = _rows_of(trained, ids)
    valid = _rows_of(pq.read_table(pairs / "valid.parquet"), ids)
    copies = copies_among(NoteStore(pairs / "train_notes.arrow"), ids)
    related = Related(copies, np.concatenate([ends, valid]))
    common = None
    if settings.max_common_users is not None:
        window = json.loads((pairs / "train_log.json").read_text(encoding="utf-8"))
        common = CommonClicks(events, ids, click_actions, window["start"], window["end"])
    rules = _Rules(settings, related, common)
    mined = _mine(AnnIndex.build(ids, vectors, index, seed), pool, ends, rules)
    counts = _counts(mined, pool, ends)
    _check(counts, settings)
    offsets = pa.array(np.append(0, np.cumsum(mined.lengths)), pa.int32())
    flat = pa.array(ids, pa.string()).take(pa.array(mined.notes, pa.int64()))
    for name, values in ((NEGATIVES, flat), ("negative_cosines", pa.array(mined.cosines, pa.float32()))):
        lists = pa.ListArray.from_arrays(offsets, values).take(pa.array(np.argsort(mined.pairs)))
        trained = trained.append_column(name, lists)
    pq.write_table(trained, output / "negatives.parquet")
    return counts


class _Rules(NamedTuple):
    settings: NegativeSettings
    related: Related
    common: CommonClicks | None


class _Mined(NamedTuple):
    """The negatives of all pairs, those of the same query together."""

    pairs: np.ndarray  # (P,) the number of each pair
    lengths: np.ndarray  # (P,) of its list
    notes: np.ndarray  # (M,) rows of the pool, list after list, nearest first
    cosines: np.ndarray  # (M,) float32
    left_out: dict[str, int]  # neighbours within the ranks, by the reason: the first that holds


def _mine(index: AnnIndex, pool: _Pool, ends: np.ndarray, rules: _Rules) -> _Mined:
    settings = rules.settings
    usable = (ends >= 0).all(axis=1)
    order = np.lexsort((ends[:, 0], ~usable))  # pairs without a vector come last
    lengths, notes, cosines = np.zeros(len(ends), np.int64), [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    left_out = dict.fromkeys(("related", "clicked_together", "too_similar"), 0)
    with Progress("mine-negatives", "pairs", int(usable.sum())) as progress:
        together = max(1, _NUMBERS_AT_ONCE // (settings.max_rank * pool.vectors.shape[1]))
        for start, stop in _chunks(ends[order[: usable.sum()], 0], together):
            query, target = ends[order[start:stop]].T
            queries, line = np.unique(query, return_inverse=True)
            near = _Near.of(index, pool, queries, rules)
            own = np.einsum("pd,pd->p", pool.vectors[query], pool.vectors[target])
            close = near.cosines[line] > _limit(own, settings)[:, None]
            free = near.free[line]
            kept = free & ~close
            kept &= np.cumsum(kept, axis=1) <= settings.per_pair
            lengths[start:stop] = kept.sum(axis=1)
            notes.append(near.notes[line][kept])
            cosines.append(near.cosines[line][kept])
            left_out["related"] += int(near.related[line].sum())
            left_out["clicked_together"] += int(near.together[line].sum())
            left_out["too_similar"] += int((free & close).sum())
            progress.add(stop - start)
    return _Mined(order, lengths, np.concatenate(notes), np.concatenate(cosines), left_out)


class _Near(NamedTuple):
    """The neighbours of Q queries within the ranks, nearest first."""

    notes: np.ndarray  # (Q, K) rows of the pool
    cosines: np.ndarray  # (Q, K) float32
    free: np.ndarray  # (Q, K) bool: within the ranks, and neither of the following
    related: np.ndarray  # (Q, K) bool: within the ranks, and related or a copy
    together: np.ndarray  # (Q, K) bool: of the others, those clicked by the same users

    @classmethod
    def of(cls, index: AnnIndex, pool: _Pool, queries: np.ndarray, rules: _Rules) -> _Near:
        asked, settings = pool.vectors[queries], rules.settings
        notes, _ = index.search_rows(asked, min(settings.max_rank + 1, len(index)))
        others = (notes != queries[:, None]) & (notes >= 0)
        ranks = np.cumsum(others, axis=1)
        within = others & (ranks >= settings.min_rank) & (ranks <= settings.max_rank)
        notes = np.where(within, notes, 0)
        cosines = np.einsum("qd,qkd->qk", asked, pool.vectors[notes])
        related = within & rules.related(queries, notes)
        together = np.zeros_like(related)
        if rules.common is not None:
            together = within & ~related & (rules.common(queries, notes) > settings.max_common_users)
        return cls(notes, cosines, within & ~related & ~together, related, together)


def _limit(cosines: np.ndarray, settings: NegativeSettings) -> np.ndarray:
    """(P,) the largest cosine of a pair's negatives, for the cosines of the targets."""
    limit = np.full(len(cosines), np.inf, np.float32)
    if settings.relative_margin is not None:
        limit = np.minimum(limit, cosines - settings.relative_margin * np.abs(cosines))
    if settings.absolute_margin is not None:
        limit = np.minimum(limit, cosines - settings.absolute_margin)
    return limit


def _chunks(queries: np.ndarray, together: int) -> Iterator[tuple[int, int]]:
    """Ranges of pairs, sorted by query, with so many queries each."""
    starts = np.flatnonzero(np.diff(queries, prepend=-1))[::together]
    yield from zip(starts.tolist(), [*starts[1:].tolist(), len(queries)], strict=True)


def _rows_of(pairs: pa.Table, ids: np.ndarray) -> np.ndarray:
    """(P, 2) int64, rows of queries and targets; -1 for a note without a vector."""
    known = pa.array(ids, pa.string())
    rows = [pc.fill_null(pc.index_in(pairs[name], value_set=known), -1) for name in ("query_id", "target_id")]
    return np.stack([one.to_numpy().astype(np.int64) for one in rows], axis=1)


def _counts(mined: _Mined, pool: _Pool, ends: np.ndarray) -> dict[str, Any]:
    query, target = ends[(ends >= 0).all(axis=1)].T
    own = np.einsum("pd,pd->p", pool.vectors[query], pool.vectors[target])
    return {
        "notes": len(pool.ids),
        "pairs": len(ends),
        "pairs_without": int((mined.lengths == 0).sum()),
        "negatives": len(mined.notes),
        "target_cosine": round(float(own.mean()), 4) if len(own) else None,
        "negative_cosine": round(float(mined.cosines.mean()), 4) if len(mined.notes) else None,
        **mined.left_out,
    }


def _check(counts: dict[str, Any], settings: NegativeSettings) -> None:
    without = f"{counts['pairs_without']:,} of {counts['pairs']:,} pairs have no negative"
    remedy = (
        f"of the neighbours at ranks {settings.min_rank} to {settings.max_rank}, {counts['related']:,} are related or "
        f"copies, {counts['clicked_together']:,} clicked by the same users, and {counts['too_similar']:,} within the "
        "margins; raise negatives.max_rank or negatives.max_common_users, or lower negatives.min_rank, "
        "negatives.relative_margin or negatives.absolute_margin"
    )
    if not counts["negatives"]:
        raise DataError(f"mine-negatives: {without}: {remedy}")
    if counts["pairs_without"] > _MANY * counts["pairs"]:
        log.warning("mine-negatives: %s: %s", without, remedy)
