"""Prompts: a note's text stays in its field, whatever it contains."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_ray.core.prompts import Slot, note_prompt, quote, truncate

LANGUAGES = ("zh", "en")


@pytest.mark.parametrize("language", LANGUAGES)
def test_both_halves_of_micl_end_in_the_same_words(language):
    parts = note_prompt("micl", language)
    before_mark = parts[parts.index(Slot.VISUAL_MARK) - 1]
    assert before_mark == parts[-1]
    assert parts[parts.index(Slot.IMAGE) + 1] is before_mark


@pytest.mark.parametrize(
    ("kind", "slots"),
    [
        ("basic", [Slot.IMAGE, Slot.TITLE, Slot.TOPICS, Slot.CONTENT]),
        ("micl", [Slot.IMAGE, Slot.VISUAL_MARK, Slot.TITLE, Slot.TOPICS, Slot.CONTENT]),
        ("text", [Slot.TITLE, Slot.TOPICS, Slot.CONTENT]),
    ],
)
@pytest.mark.parametrize("language", LANGUAGES)
def test_slots_stand_between_words_and_words_come_last(kind, slots, language):
    parts = note_prompt(kind, language)
    assert [part for part in parts if isinstance(part, Slot)] == slots
    assert isinstance(parts[0], str)
    assert isinstance(parts[-1], str)


def test_the_paper_s_chinese_prompts():
    show = {Slot.IMAGE: "I", Slot.VISUAL_MARK: "M", Slot.TITLE: "t", Slot.TOPICS: "p", Slot.CONTENT: "c"}
    basic, micl = ("".join(show.get(part, part) for part in note_prompt(kind, "zh")) for kind in ("basic", "micl"))
    assert basic == '笔记：{"图片":"I","标题":"t","话题":"p","内容":"c"}，压缩为一个词：“'
    assert micl == '笔记：{"图片":"I"}，压缩为一个词：“M”。笔记：{"标题":"t","话题":"p","内容":"c"}，压缩为一个词：“'


@pytest.mark.parametrize("language", LANGUAGES)
@given(title=st.text(), content=st.text())
def test_the_note_is_one_json_object_whatever_its_text(language, title, content):
    texts = {Slot.TITLE: title, Slot.TOPICS: "a", Slot.CONTENT: content}
    parts = note_prompt("text", language)
    prompt = "".join(part if isinstance(part, str) else quote(texts[part], language) for part in parts)
    assert "\n" not in prompt
    assert "\r" not in prompt
    shown, _ = json.JSONDecoder().raw_decode(prompt[prompt.index("{") :])
    assert len(shown) == 3


def test_a_text_cannot_close_its_own_field():
    assert quote('a"}, done', "en") == 'a\\"}, done'


def test_line_breaks_become_the_stop_of_the_language():
    assert quote("一\n\n二\r\n三", "zh") == "一。二。三"
    assert quote(" one \n two", "en") == "one two"


@pytest.mark.parametrize(
    ("text", "limit", "unit", "expected"),
    [
        ("one two  three", 2, "auto", "one two"),
        ("one two", 5, "auto", "one two"),
        ("one two", 0, "auto", ""),
        ("红色的猫睡觉", 4, "auto", "红色的猫"),
        ("我的 iPhone 很好看很好看", 4, "auto", "我的 i"),
        ("my iPhone 很好", 2, "auto", "my iPhone"),
        ("かわいい猫が眠る", 4, "auto", "かわいい"),
        ("빨간 고양이가 잔다", 2, "auto", "빨간 고양이가"),
        ("แมวสีแดงนอนหลับ", 3, "auto", "แมว"),
        ("แมวสีแดงนอนหลับ", 4, "auto", "แมว"),  # not without the vowel above the next letter
        ("ແມວສີແດງ", 3, "auto", "ແມວ"),
        ("ឆ្មាពណ៌ក្រហម", 4, "auto", "ឆ្មា"),
        ("ကြောင်နီ", 4, "auto", "ကြော"),
        ("红色的猫 睡觉", 1, "words", "红色的猫"),
        ("one two", 4, "characters", "one "),
        ("", 4, "auto", ""),
    ],
)
def test_truncation_by_words_or_characters(text, limit, unit, expected):
    assert truncate(text, limit, unit) == expected
