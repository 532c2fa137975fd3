"""Exercises for the tiny MLLM: the rule of a taste, and answers that follow from the words and pictures shown."""

from __future__ import annotations

import pytest

from notellm2_ray.core.recommend_prompts import IMAGE, PREFERENCE_BEGINS, Text
from notellm2_ray.core.settings import Settings
from notellm2_ray.data.world.lexicon import lexicon
from notellm2_ray.lessons.tastes import TOPICS, Taste, Told, lessons, say, taste_of

SMALL = {"mllm_drawings": 30, "mllm_topics": 10, "mllm_questions": 120, "mllm_preferences": 60, "mllm_held_out": 10}


def _settings(**values) -> Settings:
    return Settings(tiny=SMALL, **values)


def _told(*topics: str | None) -> list[Told]:
    return [Told(topic, None) for topic in topics]


@pytest.mark.parametrize(
    ("topics", "previous", "expected"),
    [
        ([], (), ()),
        ([None, None], (), ()),
        (["cats"], (), ("cats",)),
        (["cats", "dogs"], (), ("dogs", "cats")),  # the later weighs more
        (["cats", "dogs", "yoga"], (), ("yoga", "dogs")),
        (["cats", "cats", "yoga"], (), ("cats", "yoga")),  # .81 + .9 over 1
        (["cats", None, None, None, None, None, None, None, "yoga", "cats"], (), ("cats", "yoga")),
        (["dogs", "dogs", *[None] * 8, "yoga"], (), ("yoga", "dogs")),  # old ones fade: .9^10 + .9^9 < 1
        (["yoga", "books", "music"], ("cats", "dogs"), ("cats", "music")),  # 1.5 * .9^3 = 1.09, 1, .9, .81, .73
        (["yoga"], ("cats", "dogs"), ("cats", "yoga")),  # 1.35, 1, .9
        ([None, None, None], ("cats", "dogs"), ("cats", "dogs")),
        (["dogs", None, "dogs"], ("cats", "dogs"), ("dogs", "cats")),
    ],
)
def test_a_taste_names_what_weighs_most_and_recent_notes_weigh_more(topics, previous, expected):
    assert taste_of(_told(*topics), Taste(previous)).topics == expected


def test_topics_and_palettes_have_separate_weights():
    notes = [Told("cats", "ivory and black"), Told("cats", None), Told(None, "ivory and black"), Told("yoga", "grey")]
    assert taste_of(notes) == Taste(("cats", "yoga"), ("ivory and black", "grey"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_vocabulary_has_a_topic_and_every_taste_a_sentence(language):
    assert len(set(TOPICS[language])) == len(TOPICS[language]) == len(lexicon(language).subjects)
    pictures = lexicon(language).palettes[:2]
    sentences = [
        say(Taste(topics, palettes), language)
        for topics in ((), TOPICS[language][:1], TOPICS[language][:2])
        for palettes in ((), pictures[:1], pictures)
    ]
    assert len(set(sentences)) == 9
    assert all(sentence.startswith(PREFERENCE_BEGINS[language]) for sentence in sentences)


def test_a_taste_reads_as_a_sentence():
    whole = Taste(("cats", "yoga"), ("ivory and black", "mint and plum"))
    assert say(whole, "en") == (
        "The user appears to have a preference for notes about cats and yoga, in pictures of ivory and black or mint "
        "and plum."
    )
    assert say(Taste(), "en") == "The user appears to have a preference for notes about many things."


@pytest.mark.parametrize("source", [{"language": "zh"}, {"kind": "movielens", "directory": "nowhere"}])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_lessons_depend_only_on_the_settings(source, language):
    split = {"by": "notes"} if source.get("kind") else {}
    settings = _settings(source=source, split=split, prompts={"language": language})
    made = lessons(settings)
    assert made == lessons(settings)
    assert made != lessons(settings.model_copy(update={"seed": 7}))
    assert {exercise.kind for exercise in made.exercises} == {"caption", "topic", "question", "preference", "history"}
    captions = [exercise for exercise in made.exercises if exercise.kind == "caption"]
    assert [exercise.image for exercise in captions] == list(range(30))


def test_no_held_out_exercise_shows_a_drawing_to_train_on():
    made = lessons(_settings())
    assert len(made.drawings) == 40
    assert {exercise.image for exercise in made.exercises} <= {None, *range(30)}
    assert {exercise.image for exercise in made.held_out} <= {None, *range(30, 40)}


def test_a_question_is_answered_by_what_the_drawing_or_the_title_shows():
    made = lessons(_settings())
    caption = {exercise.image: exercise.answer for exercise in made.exercises if exercise.kind == "caption"}
    words = dict(zip(TOPICS["en"], lexicon("en").subjects, strict=True))
    answers = []
    for exercise in made.exercises:
        if exercise.kind != "question":
            continue
        asked = "".join(part for part in exercise.prompt if isinstance(part, str))
        shown = next((part.value for part in exercise.prompt if isinstance(part, Text)), None)
        assert (IMAGE in exercise.prompt) == (shown is None) == (exercise.image is not None)
        if shown is None:
            names = [*lexicon("en").patterns, *lexicon("en").palettes]
            truth = any(name in asked and name in caption[exercise.image] for name in names)
        else:
            truth = any(topic in asked and any(word in shown for word in words[topic]) for topic in words)
        assert exercise.answer == ("Yes" if truth else "No")
        answers.append(truth)
    assert 0.3 < sum(answers) / len(answers) < 0.6
