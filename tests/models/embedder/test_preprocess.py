"""From a note to its tokens and pixels."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.schema import Note
from notellm2_ray.models.embedder.preprocess import NotePreprocessor
from notellm2_ray.models.llm import IMAGE_TOKEN, VISUAL_MARK_TOKEN, load_tokenizer
from notellm2_ray.models.vision.pixels import CLIP_MEAN, ImageSettings, from_processor
from tests.support import tiny_models, tiny_tokenizers

IMAGE = ImageSettings(32)
CLOSING = '"}，压缩为一个词：“'
MARKS = [IMAGE_TOKEN, VISUAL_MARK_TOKEN, "<|endoftext|>", "<|im_start|>", "<think>", "<", ">", "|", "IMG", " ", "猫"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return load_tokenizer(tiny_models.save_llm(tmp_path_factory.mktemp("llm")))


def make(words, variant="notellm2", **changes) -> NotePreprocessor:
    return NotePreprocessor(tiny_models.settings(variant, **changes), words, IMAGE, 16)


def marks_of(words) -> set[int]:
    return set(
        words.convert_tokens_to_ids([IMAGE_TOKEN, VISUAL_MARK_TOKEN, "<|endoftext|>", "<|im_start|>", "<think>"])
    )


def llama_words(tmp_path):
    """A tokenizer that puts a space before every text."""
    tiny_tokenizers.llama(["<image>"]).save_pretrained(tmp_path)
    return load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("family", ["qwen", "llama"])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_prompt_is_the_papers(words, language, family, tmp_path):
    words = words if family == "qwen" else llama_words(tmp_path)
    preprocessor = make(words, prompt_language=language)
    features = preprocessor.features(Note("a", "red cat", ("旅行", "美食"), "on the\nsofa", tiny_models.picture(0)))
    text = words.decode(features.input_ids)
    if language == "zh":
        visual = '笔记：{"图片":"<IMG><IMG><IMG><IMG>"}，压缩为一个词：“<IMG_EMB>”。'
        assert text == visual + '笔记：{"标题":"red cat","话题":"旅行，美食","内容":"on the。sofa"}，压缩为一个词：“'
    else:
        visual = 'Note content: {"image": "<IMG><IMG><IMG><IMG>"}. Compress this note into one word: "<IMG_EMB>". '
        rest = 'Note content: {"title": "red cat", "topic": "旅行, 美食", "content": "on the sofa"}. '
        assert text == visual + rest + 'Compress this note into one word: "'
    ids = list(features.input_ids)
    assert features.visual_end == ids.index(preprocessor.mark_id) - 1
    assert ids[features.visual_end] == ids[-1]  # both vectors are read at the same opening quotation mark
    assert ids[features.image_start : features.image_start + 4] == [preprocessor.image_id] * 4


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(pieces=st.lists(st.sampled_from(MARKS), max_size=12), free=st.text(max_size=20))
def test_text_never_becomes_a_mark(words, pieces, free):
    hostile = "".join(pieces) + free
    preprocessor = make(words)
    note = Note("a", hostile, (hostile[:16],), hostile, tiny_models.picture(0))
    ids = preprocessor.features(note).input_ids
    own = [preprocessor.image_id] * 4 + [preprocessor.mark_id]
    assert [i for i in ids if i in marks_of(words)] == own
    assert not marks_of(words).intersection(*preprocessor.encode_texts([hostile]))


def test_text_around_a_mark_is_kept(words):
    preprocessor = make(words)
    for text in ("a <IMG> b", "a <think> b", "<|im_start|>system"):
        assert words.decode(preprocessor.encode_texts([text])[0]) == text


@pytest.mark.parametrize("variant", ["basic", "notellm2", "text_only"])
def test_the_end_of_the_prompt_is_never_cut(words, variant):
    preprocessor = make(words, variant, max_content_words=10_000, max_title_words=10_000)
    short = preprocessor.features(Note("a", "x", (), "y", tiny_models.picture(0)))
    endless = preprocessor.features(Note("a", "猫" * 30, ("t",) * 5, "red cat " * 4000, tiny_models.picture(0)))
    huge_title = preprocessor.features(Note("a", "red cat " * 4000, ("t",), "content", tiny_models.picture(0)))
    closing = words(CLOSING, add_special_tokens=False).input_ids
    for long in (endless, huge_title):
        assert list(long.input_ids[-len(closing) :]) == closing
        assert long.num_tokens == preprocessor.max_tokens
        assert (long.image_start, long.visual_end) == (short.image_start, short.visual_end)
        assert sum(long.input_ids == preprocessor.image_id) == sum(short.input_ids == preprocessor.image_id)


@pytest.mark.parametrize("long", ["title", "topics", "content"])
def test_a_long_part_starves_no_other(words, long):
    preprocessor = make(words, "text_only", max_content_words=9999, max_title_words=9999, max_topic_length=9999)
    texts = {"title": "red cat", "topics": ("blue", "travel"), "content": "on the sofa"}
    endless = "green house " * 800
    note = Note("a", **(texts | {long: (endless,) if long == "topics" else endless}))
    shown = words.decode(preprocessor.features(note).input_ids)
    others = {"title": "red cat", "topics": "blue，travel", "content": "on the sofa"}
    assert all(text in shown for name, text in others.items() if name != long)
    assert shown.count("green") > 10
    both = words.decode(preprocessor.features(Note("a", endless, ("red cat " * 1000,), "sofa " * 2000)).input_ids)
    assert min(both.count(word) for word in ("green", "red", "sofa")) > 5


def test_the_body_counts_all_words_and_the_image_as_one_token(words):
    note = Note("a", "red", ("blue",), "cat " * 500, tiny_models.picture(0))
    kwargs = {"max_body_tokens": 60, "max_content_words": 1000}
    basic = make(words, "basic", **kwargs)
    closing = len(words(CLOSING, add_special_tokens=False).input_ids)
    assert basic.features(note).num_tokens == 60 + 3 + closing  # four visual tokens for the one that was counted
    text = make(words, "text_only", **kwargs).features(note)
    assert text.num_tokens == 60 + closing
    visual = words('笔记：{"图片":"', add_special_tokens=False).input_ids
    micl = make(words, "micl", **kwargs).features(note)
    # The visual half comes before the body, but its image is counted.
    assert micl.num_tokens == len(visual) + 4 + closing + 1 + (60 - 1) + closing


def test_a_body_that_is_too_small_is_refused_and_the_minimum_named(words):
    with pytest.raises(ModelError, match=r"max_body_tokens=20 leaves 6 tokens .* Raise it to (\d+)") as caught:
        make(words, "basic", max_body_tokens=20)
    least = int(str(caught.value).split("Raise it to ")[1].split()[0])
    make(words, "basic", max_body_tokens=least)


def test_title_words_topics_and_content_are_cut_as_the_settings_say(words):
    preprocessor = make(words, "text_only", max_title_words=2, max_content_words=3, max_topics=1, max_topic_length=4)
    note = Note("a", "one two three", ("too long", "good", "fine"), "红色圆形的猫")
    assert '"标题":"one two","话题":"good","内容":"红色圆"' in words.decode(preprocessor.features(note).input_ids)


def test_inputs_leave_out_the_text_or_the_image(words):
    note = Note("a", "red", ("blue",), "cat", tiny_models.picture(0))
    preprocessor = make(words, "notellm2")
    image = preprocessor.features(note, "image")
    assert '{"标题":"","话题":"","内容":""}' in words.decode(image.input_ids)
    assert image.visual_end > 0
    text = preprocessor.features(note, "text")
    assert text.pixels is None
    assert (text.image_start, text.visual_end) == (-1, -1)
    assert words.decode(text.input_ids).startswith('笔记：{"标题":"red"')
    blank = make(words, "notellm2", missing_image="zero").features(note, "text")
    assert np.array_equal(blank.pixels, IMAGE.blank())
    assert blank.visual_end > 0


def test_a_blank_image_is_zero_after_normalisation():
    blank = IMAGE.blank() / 255
    assert np.abs(blank - np.array(CLIP_MEAN)[:, None, None]).max() <= 0.5 / 255


def test_an_undecodable_image_names_the_note(words):
    with pytest.raises(DataError, match="note n7: "):
        make(words).features(Note("n7", image=b"not an image"))
    assert make(words, "text_only").features(Note("n7", image=b"not an image")).pixels is None


def test_text_length_is_measured_before_truncation(words):
    preprocessor = make(words, max_content_words=1)
    count = sum(
        len(words(text, add_special_tokens=False).input_ids) for text in ("red cat", "旅行，美食", "on the sofa")
    )
    assert preprocessor.text_length(Note("a", "red cat", ("旅行", "美食"), "on the sofa")) == count


def test_collate_pads_on_the_right_and_points_at_the_images(words):
    preprocessor = make(words)
    notes = tiny_models.notes(3, without_image=[1])
    features = [preprocessor.features(note) for note in notes]
    batch = pickle.loads(pickle.dumps(preprocessor)).collate(features)
    for row, item in enumerate(features):
        assert batch.input_ids[row, : item.num_tokens].tolist() == item.input_ids.tolist()
        assert batch.attention_mask[row].sum() == item.num_tokens == batch.last[row] + 1
    assert batch.image_rows.tolist() == [0, 2]
    assert batch.visual_ends.tolist() == [features[0].visual_end, features[2].visual_end]
    assert batch.pixels.shape == (2, 3, 32, 32)
    assert len(preprocessor.collate(features[1:2]).pixels) == 0


def photograph(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(64, 64), (97, 61), (61, 97), (20, 33), (224, 224), (301, 40)])
def test_pixels_are_those_of_the_hugging_face_processor(size):
    image = photograph(size)
    ours = ImageSettings(48, resize_to=56).pixels(image).astype(int)
    kwargs = dict(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}, do_normalize=False)
    pillow = CLIPImageProcessorPil(**kwargs)(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(ours - np.rint(pillow * 255)).max() <= 1
    fast = CLIPImageProcessor(**kwargs)(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(ours - np.rint(fast * 255)).max() <= 2


def test_a_very_long_image_is_cropped_before_resizing():
    pixels = ImageSettings(32).pixels(Image.new("RGB", (2, 200_000), "red"))
    assert pixels.shape == (3, 32, 32)
    assert pixels[0].min() == 255


def test_jpeg_decoded_at_a_fraction_gives_nearly_the_same_pixels(words):
    file = io.BytesIO()
    photograph((640, 512)).save(file, "JPEG", quality=95)
    whole = IMAGE.pixels(Image.open(io.BytesIO(file.getvalue())).convert("RGB")).astype(int)
    ours = make(words).features(Note("a", image=file.getvalue())).pixels
    assert np.abs(ours - whole).max() <= 8
    assert np.abs(ours - whole).mean() < 1


def test_image_settings_are_saved_and_misfits_refused(tmp_path):
    for settings in (ImageSettings(48, resize_to=56), ImageSettings(32, (0.5,) * 3, (0.5,) * 3, "squash", 32, 2)):
        settings.save(tmp_path)
        values = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert from_processor(values, settings.size, "here") == settings
    with pytest.raises(ModelError, match="here: its image processor makes images of 32 pixels, its tower takes 48"):
        from_processor(values, 48, "here")


def test_older_processor_files_with_plain_numbers():
    assert from_processor({"size": 40, "crop_size": 32, "do_center_crop": True}, 32, "x") == ImageSettings(
        32, resize_to=40
    )
