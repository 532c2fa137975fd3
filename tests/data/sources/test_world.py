"""The synthetic world: reproducible, exactly as informative as its knobs say, and worth mining pairs from."""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import ConfigError, DataError
from notellm2_ray.data.sources.world import captions, note_id, raw_events, raw_notes, world_tables, world_truth
from notellm2_ray.data.world.draws import uniforms
from notellm2_ray.data.world.factors import DAY, LOG_START, telling, traits
from notellm2_ray.data.world.images import PALETTES, PATTERNS, draw_image
from notellm2_ray.data.world.lexicon import lexicon
from notellm2_ray.data.world.settings import WorldSettings
from notellm2_ray.data.world.users import tastes

SMALL = WorldSettings(num_notes=300, num_users=40, events_per_user=30, image_size=48, broken_share=0.05)
WHOLE = WorldSettings(broken_share=0.0)


def tokens(row: dict, language: str) -> list[str]:
    text = " ".join([row["title"], *row["topics"], row["content"]])
    return re.findall(r"[\u4e00-\u9fff]" if language == "zh" else r"\w+", text.lower())


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), dtype=np.float64)


@pytest.fixture(scope="module")
def whole_events() -> pa.Table:
    return raw_events(WHOLE, 42, np.arange(WHOLE.num_users))


def test_same_seed_gives_the_same_bytes_in_blocks_of_any_size() -> None:
    notes = raw_notes(SMALL, 7, np.arange(60))
    in_parts = pa.concat_tables([raw_notes(SMALL, 7, part) for part in np.array_split(np.arange(60), 7)])
    assert notes.equals(in_parts.combine_chunks())
    assert not notes["image"].equals(raw_notes(SMALL, 8, np.arange(60))["image"])
    events = raw_events(SMALL, 7, np.arange(40))
    in_parts = pa.concat_tables([raw_events(SMALL, 7, part) for part in np.array_split(np.arange(40), 9)])
    assert events.equals(in_parts.combine_chunks())


def test_a_note_is_the_same_in_a_larger_world() -> None:
    larger = SMALL.model_copy(update={"num_notes": 10_000, "num_users": 5})
    assert raw_notes(SMALL, 7, np.arange(40, 60)).equals(raw_notes(larger, 7, np.arange(40, 60)))


def test_streams_through_ray_the_same_rows(ray_cluster) -> None:
    tables = world_tables(SMALL, 7)
    notes = pa.concat_tables(tables.notes.iter_batches(batch_size=None, batch_format="pyarrow")).sort_by("_source")
    assert notes.equals(raw_notes(SMALL, 7, np.arange(300)).sort_by("_source"))
    events = pa.concat_tables(tables.events.iter_batches(batch_size=None, batch_format="pyarrow")).sort_by("_source")
    assert events.equals(raw_events(SMALL, 7, np.arange(40)).sort_by("_source"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_texts_have_the_lengths_that_were_asked_for(language: str) -> None:
    settings = WHOLE.model_copy(update={"language": language, "short_share": 0.2, "long_share": 0.15, "image_size": 32})
    rows = raw_notes(settings, 1, np.arange(1000)).to_pylist()
    lengths = np.array([len(tokens(row, language)) for row in rows])
    assert np.mean(lengths < 50) == pytest.approx(0.2, abs=0.04)
    assert np.mean(lengths > 165) == pytest.approx(0.15, abs=0.04)
    bulk = lengths[(lengths >= 50) & (lengths <= 165)]
    assert lengths.min() >= 10
    assert bulk.min() >= 68
    assert bulk.max() <= 140


@pytest.mark.parametrize("language", ["en", "zh"])
def test_texts_tell_exactly_what_the_truth_says(language: str) -> None:
    settings = WHOLE.model_copy(update={"language": language, "text_style": 0.4, "image_size": 32})
    words, truth = lexicon(language), world_truth(settings, 3).slice(0, 400).to_pylist()
    pattern = r"(?<!\w)(?:{})(?!\w)" if language == "en" else "{}"

    def names(vocabularies: list) -> list[re.Pattern]:
        return [re.compile(pattern.format("|".join(map(re.escape, vocabulary)))) for vocabulary in vocabularies]

    subjects, styles = names(words.subjects), names(words.styles)
    for row, told in zip(raw_notes(settings, 3, np.arange(400)).to_pylist(), truth, strict=True):
        text = " ".join([row["title"], *row["topics"], row["content"]]).lower()
        for column, vocabularies, own in (
            ("text_tells_subject", subjects, told["subject"]),
            ("text_tells_style", styles, told["style"]),
        ):
            # Two adjacent Chinese words may contain a third; only the own vocabulary is exact there.
            found = {k for k, vocabulary in enumerate(vocabularies) if vocabulary.search(text)}
            assert (own in found) == told[column]
            assert language == "zh" or found <= {own}


def test_lexicons_are_sound() -> None:
    for words in (lexicon("en"), lexicon("zh")):
        assert len(words.subjects) == len(words.patterns) == len(PATTERNS) == 24
        assert len(words.styles) == len(words.palettes) == len(PALETTES) == 12
        groups = [*words.subjects, *words.styles, words.things, words.qualities]
        assert max(Counter(word for group in groups for word in group).values()) == 1
        telling_words = {word for group in groups[:-2] for word in group}
        grammar = " ".join(words.sentences + words.titles).lower()
        assert not telling_words & set(re.findall(r"\w+", grammar))


@pytest.mark.parametrize("knob", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_knobs_are_the_shares_of_notes_that_tell(knob: float) -> None:
    settings = WorldSettings(
        num_notes=8000, text_subject=knob, text_style=1 - knob, image_subject=knob, image_style=1 - knob
    )
    truth = world_truth(settings, 5)
    for column, share in (
        ("text_tells_subject", knob),
        ("text_tells_style", 1 - knob),
        ("image_shows_subject", knob),
        ("image_shows_style", 1 - knob),
    ):
        assert np.mean(truth[column].to_numpy(zero_copy_only=False)) == pytest.approx(share, abs=0.015)
    if 0 < knob < 1:  # the image is independent of the text
        text, image = (truth[c].to_numpy(zero_copy_only=False) for c in ("text_tells_subject", "image_shows_subject"))
        assert abs(np.corrcoef(text, image)[0, 1]) < 0.04


def test_short_texts_tell_less_and_nothing_else_depends_on_the_factors() -> None:
    settings = WHOLE.model_copy(update={"text_subject": 0.8})
    index = np.arange(20_000)
    told, hidden = telling(settings, 2, index), traits(settings, 2, index)
    tells, short = told.unit_subject.any(axis=1), told.num_sentences <= 3
    assert tells[short].mean() < tells[~short].mean() - 0.2
    for values in (short, tells, told.image_subject, told.image_style, hidden.appeal, hidden.created, hidden.style):
        by_subject = [values[hidden.subject == k].mean() for k in range(settings.num_subjects)]
        spread = np.std(by_subject) / (np.std(values) / np.sqrt(len(index) / settings.num_subjects))
        assert 0.4 < spread < 1.7  # as by chance


def test_images_tell_nothing_when_their_knobs_are_zero() -> None:
    blind = WorldSettings(image_subject=0, image_style=0, text_subject=1, text_style=1, image_size=32, broken_share=0)
    images = raw_notes(blind, 4, np.arange(50))["image"].to_pylist()
    # With more factors the same notes have other subjects and styles, but their images stay the same.
    other = blind.model_copy(update={"num_subjects": 24, "num_styles": 12})
    assert images == raw_notes(other, 4, np.arange(50))["image"].to_pylist()
    assert len(set(images)) == 50


def test_images_show_style_as_colour_and_subject_as_pattern() -> None:
    def colours(image: np.ndarray) -> np.ndarray:  # how often each of 64 colours occurs
        return np.bincount((image // 64).astype(int).reshape(-1, 3) @ [16, 4, 1], minlength=64) / image[..., 0].size

    def texture(image: np.ndarray) -> np.ndarray:
        grey = image.mean(axis=2)
        return np.log1p(np.abs(np.fft.fft2((grey - grey.mean()) / grey.std())))[:16].ravel()

    rng = np.random.default_rng(0)
    labels = [(s, t) for s in range(24) for t in range(12)]
    seen = [[pixels(draw_image(rng, *label, 48)) for label in labels] for _ in range(4)]
    for describe, factor, floor in ((colours, 1, 0.97), (texture, 0, 0.75)):
        vectors = np.array([[describe(image) for image in copy] for copy in seen])
        truth = np.array([label[factor] for label in labels])
        means = np.array([vectors[:3][:, truth == k].mean(axis=(0, 1)) for k in range(truth.max() + 1)])
        nearest = np.argmin(((vectors[3][:, None] - means) ** 2).sum(axis=2), axis=1)
        assert np.mean(nearest == truth) >= floor
    assert len({image.tobytes() for copy in seen for image in copy}) == 4 * len(labels)


def test_captions_name_what_is_drawn_and_no_note_has_their_images() -> None:
    drawn = list(captions(SMALL, 7, 40))
    assert drawn[30:] == list(captions(SMALL, 7, 10, start=30))
    assert not {image for image, _ in drawn} & set(raw_notes(SMALL, 7, np.arange(300))["image"].to_pylist())
    words = lexicon("en")
    for image, caption in drawn:
        named = [k for k, name in enumerate(words.palettes) if name in caption]
        assert pixels(image).shape == (48, 48, 3)
        if named:
            first, second = np.array(PALETTES[named[0]], dtype=float)
            mixed = first + np.linspace(0, 1, 9)[:, None] * (second - first)  # clouds blend the two
            distance = np.sqrt(((pixels(image)[:, :, None] - mixed) ** 2).sum(axis=3)).min(axis=2)
            assert np.median(distance) < 45
        else:
            assert words.no_palette in caption
            assert np.ptp(pixels(image).mean(axis=(0, 1))) < 30
    assert re.search(r"[\u4e00-\u9fff]", next(captions(SMALL.model_copy(update={"language": "zh"}), 7, 1))[1])


def test_truth_lists_each_healthy_note_once() -> None:
    settings = SMALL.model_copy(update={"num_notes": 600, "broken_share": 0.1})
    rows, truth = raw_notes(settings, 11, np.arange(600)), world_truth(settings, 11)
    good = set(truth["note_id"].to_pylist())
    assert len(good) == truth.num_rows
    assert 600 - len(good) == pytest.approx(60, abs=25)
    kinds, delivered = Counter(), {}
    for number, row in enumerate(rows.to_pylist()):
        if note_id(number) in good:
            assert row["note_id"] == note_id(number)
            delivered[row["note_id"]] = {**row, "_source": None}
            pixels(row["image"])
        else:
            kinds[_reason(number, row, delivered)] += 1
    assert set(kinds) == {"id", "repeated", "truncated", "not an image", "huge", "empty"}


def _reason(number: int, row: dict, delivered: dict) -> str:
    from notellm2_ray.core.images import check_image

    if row["note_id"] is None:
        return "id"
    if row["note_id"] != note_id(number):
        assert {**row, "_source": None} == delivered[row["note_id"]]
        return "repeated"
    if row["image"] is None:
        assert not row["title"]
        assert not row["topics"]
        assert not row["content"]
        return "empty"
    with pytest.raises(DataError):
        check_image(row["image"], max_pixels=50_000_000, max_bytes=20_000_000)
    if row["image"].startswith(b"\x89PNG"):
        return "huge"
    return "truncated" if row["image"].startswith(b"\xff\xd8") else "not an image"


def test_events_are_of_notes_that_existed_and_broken_ones_are_as_many_as_asked() -> None:
    events = raw_events(SMALL, 7, np.arange(40)).to_pylist()
    index = np.arange(300)
    hidden = traits(SMALL, 7, index)
    created = {note_id(i): LOG_START + hidden.created[i] for i in index if hidden.healthy[i]}
    broken = [e for e in events if e["note_id"] not in created or e["timestamp"] is None or e["user_id"] is None]
    assert len(broken) / len(events) == pytest.approx(0.05, abs=0.025)
    sound = [event for event in events if event not in broken]
    seconds = np.array([event["timestamp"].timestamp() for event in sound])
    assert all(at >= created[event["note_id"]] for at, event in zip(seconds, sound, strict=True))
    assert seconds.min() >= LOG_START
    assert seconds.max() <= LOG_START + SMALL.days * DAY
    views = Counter((event["user_id"], event["note_id"]) for event in sound if event["action"] == "view")
    assert max(views.values()) == 1


def test_every_click_follows_its_view_within_the_visit(whole_events: pa.Table) -> None:
    viewed: dict[tuple, tuple] = {}
    clicks = 0
    for event in whole_events.to_pylist():
        key = (event["user_id"], event["note_id"])
        if event["action"] == "view":
            viewed[key] = (event["timestamp"], event["session_id"])
        else:
            clicks += 1
            at, session = viewed[key]
            assert session == event["session_id"]
            assert 0 < (event["timestamp"] - at).total_seconds() < 20
    assert 0.2 * len(viewed) < clicks < 0.7 * len(viewed)


def test_tastes_drift_week_by_week() -> None:
    subjects, styles = tastes(WorldSettings(days=70), 1, np.arange(500))
    for taste in (subjects, styles):
        moved = np.mean(taste[:, 1:] != taste[:, :-1])
        assert 0.1 < moved < 0.35
        assert np.mean(taste[:, -1] == taste[:, 0]) < 0.3


def test_mined_pairs_share_subject_and_style_far_above_chance(whole_events: pa.Table) -> None:
    hidden = traits(WHOLE, 42, np.arange(WHOLE.num_notes))
    boundary = 0.67 * WHOLE.days * DAY
    shares = {}
    for period, low, high, among in (
        ("train", 0.0, boundary, hidden.created < boundary),
        ("test", boundary, np.inf, hidden.created >= boundary),
    ):
        query, target = _related(whole_events, low, high, among)
        same_subject = hidden.subject[query] == hidden.subject[target]
        same_style = hidden.style[query] == hidden.style[target]
        shares[period] = np.array([same_subject.mean(), same_style.mean(), (same_subject & same_style).mean()])
        assert len(set(query)) > 0.8 * min(among.sum(), 1400)
    chance = np.array([1 / 12, 1 / 8, 1 / 96])
    assert np.all(shares["train"] > [0.75, 0.7, 0.6])
    assert np.all(shares["test"] > [0.55, 0.5, 0.35])
    assert np.all(shares["test"] > 4 * chance)


def _related(events: pa.Table, low: float, high: float, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 2 by brute force within [low, high) seconds, the three best related notes; queries and targets ``among``."""
    notes = np.array([int(value[1:]) for value in events["note_id"].to_pylist()])
    seconds = events["timestamp"].cast(pa.int64()).to_numpy() / 1e6 - LOG_START
    is_click = np.array(events["action"].to_pylist()) == "click"
    by_user = defaultdict(list)
    for row in np.flatnonzero((seconds >= low) & (seconds < high)):
        by_user[events["user_id"][int(row)].as_py()].append(row)
    scores: dict[int, Counter] = defaultdict(Counter)
    for rows in by_user.values():
        clicked = [row for row in rows if is_click[row]]
        for view in rows:
            if is_click[view] or not among[notes[view]]:
                continue
            for click in clicked:
                if seconds[click] > seconds[view] and notes[click] != notes[view] and among[notes[click]]:
                    scores[notes[view]][notes[click]] += 1 / len(clicked)  # no note is clicked twice by a user
    pairs = [
        (query, target)
        for query, targets in scores.items()
        for target, _ in sorted(
            (pair for pair in targets.items() if 0.01 <= pair[1] <= 30), key=lambda p: (-p[1], p[0])
        )[:3]
    ]
    return np.array(pairs).T


def test_uniforms_are_uniform_and_streams_independent() -> None:
    index = np.arange(200_000)
    first, second = uniforms(1, "a", index), uniforms(1, "b", index)
    assert np.all((first >= 0) & (first < 1))
    assert np.histogram(first, 20, (0, 1))[0] == pytest.approx(np.full(20, 10_000), rel=0.05)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.01
    assert first[7] == uniforms(1, "a", np.array([7]))[0]


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="short_share"):
        build(WorldSettings, {"short_share": 0.7, "long_share": 0.5})
