"""At which step the recommender loses knowledge of a taste: pooled AUC on the synthetic world, from truth to P(yes).

    python benchmarks/taste_ceilings.py                            # runs/world, as `make demo` leaves it
    python benchmarks/taste_ceilings.py --workspace runs/by_time

Every row ranks the test candidates of the first protocol by one source of knowledge: the world's own click rate; the
true kinds of the notes in the history; what their titles and captions show; the two topics and two palettes that the
rule of the tiny MLLM's lessons (``taste_of``) names; those that the MLLM wrote; P(yes). For the rows between the first
ones and P(yes) a logistic regression turns the knowledge into scores. It is fitted on the ranker's training candidates.
Patterns, from which the ranker could guess some subjects, are left out. "Exact" sentences equal the rule's word for
word, given the same notes and the same previous sentence.

The script only reads a finished workspace, with the settings in its manifests, and takes five seconds.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow.parquet as pq
from sklearn.linear_model import LogisticRegression

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError, NoteLLMError, OutputError
from notellm2_ray.core.run import MANIFEST, read_manifest
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.ranking import PreferenceVariant
from notellm2_ray.data.sources.world import note_id, user_id
from notellm2_ray.data.world.factors import LOG_START, telling, traits
from notellm2_ray.data.world.settings import WorldSettings
from notellm2_ray.data.world.users import _click_rate, catalogue, tastes, week_of
from notellm2_ray.evaluate.ranking.metrics import PooledAuc
from notellm2_ray.evaluate.ranking.task import RankingTask
from notellm2_ray.evaluate.tables import Table
from notellm2_ray.infer.preference_plan import read_summaries
from notellm2_ray.lessons.tastes import Taste, Teacher, Told, say, taste_of

SMOOTHING = 0.02  # added to a share of the history before its logarithm is taken
# Weights of a history's notes, from (n,) int64 how many notes came after each, and the size of the last block.
SPANS: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "whole history": lambda later, last: np.ones(len(later)),
    "recency 0.8^k": lambda later, last: 0.8**later,
    "last block": lambda later, last: (later < last).astype(np.float64),
}
# The rule applied to what the notes of each block tell.
IDEALS: Mapping[str, Callable[[list[list[Told]]], Taste]] = {
    "recurrent chain": lambda blocks: reduce(lambda taste, block: taste_of(block, taste), blocks, Taste()),
    "whole history": lambda blocks: taste_of([note for block in blocks for note in block]),
    "last block": lambda blocks: taste_of(blocks[-1]),
}
Row = tuple[str, str, float, str]  # source of knowledge, which one of its kind, AUC in percent, remark


class Side(NamedTuple):
    """R candidates of E examples, with the histories before them."""

    task: RankingTask
    notes: np.ndarray  # (R,) int64, number of each candidate
    examples: list[dict[str, Any]]  # (E,) rows of EXAMPLE_SCHEMA
    blocks: list[list[list[int]]]  # (E,) numbers of the notes of the history, block by block, oldest first

    def auc(self, scores: np.ndarray) -> float:
        return 100 * PooledAuc(self.task.groups, self.task.labels, scores)()

    def shares(self, kinds: np.ndarray, span: str) -> np.ndarray:
        """(R,) weighted share of the history that is of the candidate's kind; NaN where the candidate shows no kind.

        Args:
            kinds: (N,) int64 kind of every note, -1 where it shows none.
            span: key of SPANS.
        """
        counts = np.zeros((len(self.blocks), kinds.max() + 1))
        for row, blocks in zip(counts, self.blocks, strict=True):
            found = kinds[np.concatenate(blocks)]
            weights = SPANS[span](np.arange(len(found))[::-1], len(blocks[-1]))
            np.add.at(row, found[found >= 0], weights[found >= 0])
        counts /= np.maximum(counts.sum(axis=1, keepdims=True), 1e-9)
        own = kinds[self.notes]
        return np.where(own >= 0, counts[self.task.groups, own], np.nan)


class World:
    """The truth about each of N notes, and what it shows; notes are numbered."""

    def __init__(self, settings: Settings) -> None:
        assert isinstance(settings.source, WorldSettings)
        self.workspace, self.source, self.seed = settings.workspace, settings.source, settings.seed
        self.teacher = teacher = Teacher(settings)
        index = np.arange(self.source.num_notes)
        self.number = {note_id(one): one for one in index.tolist()}
        hidden, tells = traits(self.source, self.seed, index), telling(self.source, self.seed, index)
        self.subject, self.style = hidden.subject, hidden.style  # (N,) int64
        topic = np.where(tells.unit_subject[:, 0], hidden.subject, -1)  # (N,) int64, -1: the title does not tell
        patterns = (*teacher.patterns, teacher.names.no_pattern)
        meant = {teacher.caption(one, name): at for one in patterns for at, name in enumerate(teacher.palettes)}
        summaries = read_summaries(self.workspace / "image_summaries" / "summaries.parquet")
        palette = np.array([meant.get(summaries.get(one, ""), -1) for one in self.number])  # (N,) int64
        self.shown = ((topic, teacher.topics), (palette, teacher.palettes))
        names = ((*teacher.topics, None), (*teacher.palettes, None))
        self.told = [Told(names[0][one], names[1][other]) for one, other in zip(topic, palette, strict=True)]
        self.blocks: dict[str, list[list[int]]] = defaultdict(list)
        for row in pq.read_table(self.workspace / "sequences" / "blocks.parquet").sort_by("block").to_pylist():
            self.blocks[row["user_id"]].append([self.number[one] for one in row["note_ids"]])

    def side(self, examples: str, candidates: str) -> Side:
        """One split of the examples of make-sequences, with one set of candidates."""
        directory = self.workspace / "sequences"
        table, asked = (pq.read_table(directory / f"{one}.parquet") for one in (examples, f"candidates/{candidates}"))
        task = RankingTask.build(candidates, asked, table, {})
        by_id = {row["example_id"]: row for row in table.to_pylist()}
        rows = [by_id[one] for one in task.example_ids]
        notes = np.array([self.number[one] for one in task.note_ids])
        return Side(task, notes, rows, [self.blocks[row["user_id"]][: row["block"] + 1] for row in rows])

    def click_rates(self, side: Side) -> np.ndarray:
        """(R,) probability that the user clicks each candidate if it is shown at the target's time."""
        ids = [user_id(one) for one in range(self.source.num_users)]
        users = np.array([ids.index(row["user_id"]) for row in side.examples])
        week = week_of(self.seed, users, np.array([row["timestamp"].timestamp() for row in side.examples]) - LOG_START)
        at = (side.task.groups, week[side.task.groups])
        subjects, styles = tastes(self.source, self.seed, users)
        return _click_rate(catalogue(self.source, self.seed), side.notes, (subjects[at], styles[at]))

    def tell(self, blocks: list[list[int]]) -> list[list[Told]]:
        return [[self.told[note] for note in notes] for notes in blocks]

    def read(self, sentence: str) -> Taste:
        """The first two topics and palettes that a sentence names."""
        found = (re.findall("|".join(map(re.escape, names)), sentence) for _, names in self.shown)
        return Taste(*(tuple(dict.fromkeys(names))[:2] for names in found))

    def rule(self, variant: PreferenceVariant, blocks: list[list[int]], previous: str) -> str:
        """The sentence that the rule gives for the last block and the previous sentence, or for all blocks (direct)."""
        told = [self.told[one] for block in (blocks if variant == "direct" else blocks[-1:]) for one in block]
        if variant == "no_image_summary":
            told = [note._replace(palette=None) for note in told]
        return say(taste_of(told, None if variant == "direct" else self.read(previous)), self.teacher.language)

    def count_features(self, side: Side, span: str) -> np.ndarray:
        """(R, 6) features: how much of the history shows the candidate's topic, and how much its palette."""
        shares = np.stack([side.shares(kinds, span) for kinds, _ in self.shown], axis=1)
        return np.hstack([np.nan_to_num(shares), np.nan_to_num(np.log(shares + SMOOTHING)), np.isnan(shares)])

    def taste_features(self, side: Side, told: Sequence[Taste]) -> np.ndarray:
        """(R, 6) features: for topic and for palette, whether the taste names the candidate's first or second, and
        whether the candidate shows one.

        Args:
            told: E tastes, one an example.
        """
        columns: list[np.ndarray] = []
        for (kinds, names), parts in zip(self.shown, zip(*told, strict=True), strict=True):
            own = kinds[side.notes]
            named = np.array([[*map(names.index, part), -2, -2][:2] for part in parts])  # (E, 2)
            columns += [*(own == named[side.task.groups].T), own >= 0]
        return np.stack(columns, axis=1).astype(np.float64)


def learned(sides: Sequence[Side], features: Sequence[np.ndarray]) -> float:
    """AUC on the test side of a logistic regression on (R, F) features, fitted on the training side."""
    reader = LogisticRegression().fit(features[0], sides[0].task.labels)
    return sides[1].auc(reader.decision_function(features[1]))


def known_rows(world: World, sides: Sequence[Side]) -> Iterator[Row]:
    """Rows from the truth to the ideal sentence."""
    test = sides[1]
    yield "the world's click rate", "", test.auc(world.click_rates(test)), ""
    for span in SPANS:
        subject, style = (test.shares(kinds, span) + SMOOTHING for kinds in (world.subject, world.style))
        yield "true subjects x styles, counted", span, test.auc(subject * style), ""
    for span in SPANS:
        area = learned(sides, [world.count_features(side, span) for side in sides])
        yield "topics and palettes shown, counted", span, area, ""
    for name, rule in IDEALS.items():
        told = [[rule(world.tell(blocks)) for blocks in side.blocks] for side in sides]
        yield "ideal sentence", name, learned(sides, list(map(world.taste_features, sides, told))), ""


def written_rows(world: World, sides: Sequence[Side]) -> Iterator[Row]:
    """Rows of the sentences that the MLLM wrote, for every variant."""
    for variant in get_args(PreferenceVariant):
        directory = world.workspace / "preferences" / variant
        if not (directory / MANIFEST).exists():
            continue
        table = pq.read_table(directory / "preferences.parquet").to_pylist()
        written = {(row["user_id"], row["block"]): row["preference"] for row in table}
        keys = ([(row["user_id"], row["block"]) for row in side.examples] for side in sides)
        told = [[world.read(written.get(key, "")) for key in asked] for asked in keys]
        exact = [
            sentence == world.rule(variant, world.blocks[user][: block + 1], written.get((user, block - 1), ""))
            for (user, block), sentence in written.items()
        ]
        area = learned(sides, list(map(world.taste_features, sides, told)))
        yield "written sentence", variant, area, f"{np.mean(exact):.1%} of {len(exact):,} exact"


def score_rows(workspace: Path, test: Side) -> Iterator[Row]:
    """Rows of P(yes), one a ranker, the mean over its seeds; mllm_msr first, controls left out."""
    areas: dict[str, list[float]] = defaultdict(list)
    for manifest in sorted(workspace.glob(f"scores/*/{test.task.protocol}/{MANIFEST}")):
        table = read_manifest(manifest.parent)["settings"]["table"]
        if table["control"] is None:
            scores = test.task.align(pq.read_table(manifest.with_name("scores.parquet")), str(manifest.parent))
            areas[table["method"]].append(test.auc(scores))
    if "mllm_msr" not in areas:
        raise OutputError(f"{workspace} holds no scores of mllm_msr under {test.task.protocol}: run score-candidates")
    for method in sorted(areas, key=lambda one: (one != "mllm_msr", one)):
        yield "P(yes)", method, float(np.mean(areas[method])), f"seeds: {len(areas[method])}"


def read_settings(workspace: Path) -> Settings:
    """The settings of the workspace that matter here, from its manifests."""
    prepared = read_manifest(workspace / "prepared")["settings"]
    if (kind := prepared["source"]["kind"]) != "world":
        raise ConfigError(f"{workspace} holds {kind}: what users want is known of the synthetic world alone")
    names = ("sequences", "image_summaries", "preferences/recurrent")
    sequences, summaries, preferences = (read_manifest(workspace / name)["settings"] for name in names)
    if models := {summaries["summaries"]["model"], preferences["preferences"]["model"]} - {"tiny"}:
        raise ConfigError(f"{workspace}: words of {', '.join(models)} cannot be counted, only the tiny MLLM's")
    if sequences["candidates"]["protocols"][0] == "published":
        raise ConfigError(f"{workspace}: the published protocol has histories of its own; name another one first")
    world = {name: prepared[name] for name in ("source", "seed")}
    language = {"language": summaries["language"]}
    return build(
        Settings, {"workspace": workspace, "candidates": sequences["candidates"], "prompts": language, **world}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, default=Path("runs/world"), help="a finished one, of the world")
    try:
        settings = read_settings(parser.parse_args().workspace)
        world, protocol = World(settings), settings.candidates.protocols[0]
        sides = (world.side("train", "train"), world.side("test", protocol))
        rows = [*known_rows(world, sides), *written_rows(world, sides), *score_rows(world.workspace, sides[1])]
    except NoteLLMError as error:
        sys.exit(f"error: {error}")
    cells = [(name, which, f"{area:.1f}", remark) for name, which, area, remark in rows]
    print(Table(("Ranked by", "", f"AUC, {protocol}", ""), cells, num_labels=2))
    auc = {row[:2]: row[2] for row in rows}
    ideal, written = auc["ideal sentence", "recurrent chain"], auc["written sentence", "recurrent"]
    told = auc["P(yes)", "mllm_msr"]
    print(f"Lost in writing: {ideal - written:.1f} points (ideal sentence {ideal:.1f}, written {written:.1f}).")
    print(f"Lost in reading: {written - told:.1f} points (regression {written:.1f}, P(yes) {told:.1f}).")


if __name__ == "__main__":
    main()
