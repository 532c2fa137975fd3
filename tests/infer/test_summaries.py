"""Image summaries through ray.data.llm, with a real vLLM over a random tiny Qwen2-VL."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from notellm2_ray.core.errors import ConfigError, DataError, ModelError
from notellm2_ray.core.images import scaled_image
from notellm2_ray.core.schema import SUMMARY_SCHEMA, Note
from notellm2_ray.core.settings import GenerationSettings, SummarySettings
from notellm2_ray.infer.answers import cut_at_sentence, is_repetitive, one_paragraph
from notellm2_ray.infer.chunks import list_note_files, plan_chunks
from notellm2_ray.infer.summaries import sort_rows, summarize_images
from notellm2_ray.infer.summary_parts import commit, compile_summaries, described_parts, read_described
from notellm2_ray.infer.summary_rows import ERROR, NO_IMAGE, Asking, ImageReader, pixels_of
from tests.support.encoded_pictures import LOSSLESS, LOSSY, encoded
from tests.support.tiny_mllm import picture, save_mllm
from tests.support.tiny_models import write_notes

# Sampled, because a random model's greedy answers repeat themselves.
SETTINGS = SummarySettings(max_tokens=16, batch_rows=8, temperature=1.0, min_characters=0, max_bad_share=0.2)
GENERATION = GenerationSettings(dtype="float32", max_model_len=512, max_sequences=16)


def test_images_are_decoded_and_scaled_down_before_the_engine(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((1200, 900), 50).convert("RGB").save(buffer, "JPEG")
    notes = [Note("a", image=buffer.getvalue()), Note("b", image=picture(1)), Note("c", image=b"no image"), Note("d")]
    (chunk,) = plan_chunks(list_note_files(Path(write_notes(tmp_path / "n.parquet", notes))), 8, "").chunks
    rows = ImageReader(frozenset("abcd"), {chunk.file: "v"}, 262_144)(pa.Table.from_pylist([chunk._asdict()]))
    asking = Asking([1], SETTINGS, [])
    asked = {row["note_id"]: asking(row) for row in rows.to_pylist()}
    large, small = (pickle.loads(pickle.dumps(asked[key]["multimodal_data"]["image"])) for key in "ab")
    assert isinstance(large, Image.Image) and large.mode == "RGB" and small.size == (56, 56)
    assert np.array_equal(np.asarray(large), np.asarray(scaled_image(buffer.getvalue(), 262_144)))
    assert 0.95 * 262_144 < large.width * large.height <= 262_144
    assert "not a readable" in asked["c"][ERROR] and asked["d"] == {ERROR: NO_IMAGE}
    assert "cannot be decoded" in pixels_of(picture(1)[:300], 262_144)[1]


def test_answers_are_cut_cleaned_and_judged() -> None:
    assert one_paragraph(" a\n\n b\tc ") == "a b c"
    assert cut_at_sentence("One. Two is 3.5 long. Thr") == "One. Two is 3.5 long."
    assert cut_at_sentence("红色的猫。蓝色的") == "红色的猫。"
    assert cut_at_sentence("no end") == "no end"
    assert is_repetitive("a red cat and " * 30) and not is_repetitive(
        "A red cat sleeps on the blue sofa by the window."
    )
    thai = (
        "แมวสีแดงนอนหลับอยู่บนโซฟาในห้องนั่งเล่นที่มีแสงแดดอบอุ่นส่องเข้ามาทางหน้าต่าง ภาพนี้แสดงให้เห็นสีสันสดใสของดอกไม้และต้นไม้ด้านนอก "
        "พร้อมกับข้อความเขียนด้วยลายมือที่มุมขวาบนของภาพ และมีถ้วยกาแฟวางอยู่บนโต๊ะไม้ข้างหนังสือเล่มหนึ่ง"
    )
    assert is_repetitive(thai[:30] * 8) and not is_repetitive(thai)


def test_a_prompt_that_cannot_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    model, small = save_mllm(tmp_path / "mllm"), GENERATION.model_copy(update={"max_model_len": 64})
    settings = SETTINGS.model_copy(update={"max_tokens": 50})
    remedy = r"14 fit\. Raise generation\.max_model_len=64, or lower summaries\.max_tokens=50"
    with pytest.raises(ConfigError, match=remedy):
        summarize_images(model, tmp_path / "notes.parquet", tmp_path / "out", settings, small, "en")


def test_rows_are_sorted_into_good_and_bad() -> None:
    settings = SummarySettings(max_tokens=10)

    def row(note_id: str, summary: str = "", tokens: int = 5, **more: str) -> dict:
        return {"note_id": note_id, "version": "v", "summary": summary, "generated_tokens": tokens, **more}

    rows = [
        row("good", "A cat.\n"),
        row("cut", "A cat. And a", 10),
        row("empty", " "),
        row("circles", "red cat " * 40, 10),
        row("failed", **{ERROR: "too long", "error": ""}),
        row("broken", **{ERROR: "image is empty", "error": "image is empty"}),
    ]
    good, bad = sort_rows(rows, settings)
    assert [(one["note_id"], one["summary"]) for one in good] == [("good", "A cat."), ("cut", "A cat.")]
    assert [one["note_id"] for one in bad] == ["empty", "circles", "failed", "broken"]
    assert [one["passing"] for one in bad] == [False, False, True, False]


def test_an_unusable_answer_is_asked_for_once_more_with_another_draw() -> None:
    asking = Asking([1], SummarySettings(max_tokens=10), [7])
    row = {"note_id": "n", "sampling_params": asking.sampling("n", 0), "tokenized_prompt": [1]}
    assert row["sampling_params"] == {"max_tokens": 10, "temperature": 0.0, "stop_token_ids": [7]}
    answers = [("A cat.", 5, ""), (" ", 1, ""), ("red cat " * 40, 10, ""), ("", 0, "the engine failed")]
    again = [
        asking.again(row, {"generated_text": text, "num_generated_tokens": tokens, ERROR: error})
        for text, tokens, error in answers
    ]
    assert again[0] is None
    for second in again[1:]:
        assert second is not None and second["tokenized_prompt"] == [1]
        assert second["sampling_params"]["temperature"] > 0 and "seed" in second["sampling_params"]


def test_valid_parts_of_earlier_runs_are_reused(tmp_path: Path) -> None:
    store = described_parts(tmp_path)

    def good(note_id: str, version: str = "v1") -> dict:
        return {"note_id": note_id, "summary": "s", "prompt_tokens": 1, "generated_tokens": 1, "version": version}

    def bad(note_id: str, reason: str = "bad", version: str = "v1", passing: bool = False) -> dict:
        return {"note_id": note_id, "reason": reason, "version": version, "passing": passing}

    assert read_described(store, {"v1"}) == ((set(), set(), set()), 0)
    commit(store, "m", [good("b"), good("a", "v0")], [bad("c"), bad("d", NO_IMAGE), bad("e", passing=True)])
    commit(store, "m", [], [bad("f")])
    commit(store, "m", [], [bad("g", passing=True)])
    commit(store, "m", [good("x", "v0")], [bad("y", version="v0")])
    first = read_described(store, {"v1"})
    assert first == (({"b"}, {"c", "f"}, {"d"}), 1), "of the fourth part nothing is valid; e and g are asked for again"
    assert read_described(store, {"v1"}) == (first[0], 0) and len(store.part_ids()) == 2
    assert store.first_reasons(leave_out=NO_IMAGE) in (["c: bad", "f: bad"], ["f: bad", "c: bad"])
    commit(store, "m", [good("a")], [])
    assert compile_summaries(store, {"v1"})["note_id"].to_pylist() == ["a", "b"]
    assert pq.read_schema(tmp_path / "summaries.parquet").equals(SUMMARY_SCHEMA)
    (tmp_path / "empty").mkdir()
    assert len(compile_summaries(described_parts(tmp_path / "empty"), {"v1"})) == 0
    assert read_described(store, {"v2"})[1] == 3 and store.part_ids() == []


@pytest.fixture(scope="module")
def mllm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_mllm(tmp_path_factory.mktemp("mllm"))


def test_unfit_models_are_named(tmp_path: Path, mllm: str) -> None:
    from tests.support import tiny_models

    path = write_notes(tmp_path / "n.parquet", [Note("a", image=picture(0))])
    with pytest.raises(ModelError, match="there is no model directory"):
        summarize_images(tmp_path / "absent", path, tmp_path / "out", SETTINGS, GENERATION, "en")
    text_only = tiny_models.save_llm(tmp_path / "llm")
    with pytest.raises(ModelError, match="Qwen2ForCausalLM reads no images"):
        summarize_images(text_only, path, tmp_path / "out", SETTINGS, GENERATION, "en")


@pytest.mark.slow
def test_images_become_summaries(tmp_path: Path, ray_cluster, mllm: str) -> None:
    notes = [Note(f"n{i:03d}", f"title {i}", image=picture(i)) for i in range(60)]
    notes[3] = notes[3]._replace(image=None)
    notes[7] = notes[7]._replace(image=b"broken")
    buffer = io.BytesIO()
    Image.effect_noise((3000, 2000), 50).convert("RGB").save(buffer, "JPEG")
    notes[9] = notes[9]._replace(image=buffer.getvalue())
    odd = [(1, 1), (1, 2000), (2000, 1), (20, 27)]
    strips = [encoded(Image.new("RGB", size, "red"), "PNG") for size in odd]
    others = [LOSSLESS["TIFF turned 6"], LOSSLESS["RGBA"], LOSSLESS["grey of 16 bits"], LOSSY["AVIF"], LOSSY["MPO"]]
    for place, image in enumerate([*strips, *others], start=10):
        notes[place] = notes[place]._replace(image=image)
    write_notes(tmp_path / "notes" / "a.parquet", notes[:40])
    write_notes(tmp_path / "notes" / "b.parquet", notes[40:])
    pq.write_table(pa.table({"note_id": [note.note_id for note in notes[:55]]}), tmp_path / "only.parquet")

    def run(only: Path | None) -> dict:
        return summarize_images(mllm, tmp_path / "notes", tmp_path / "out", SETTINGS, GENERATION, "en", only_ids=only)

    counts = run(tmp_path / "only.parquet")
    # A random model may give an unusable answer twice.
    empty = counts["quarantined"] - 1
    assert (counts["notes"], counts["without_image"], counts["summaries"]) == (55, 1, 53 - empty) and empty < 8
    table = pq.read_table(tmp_path / "out" / "summaries.parquet")
    assert table.schema.equals(SUMMARY_SCHEMA)
    bad = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    reasons = {row["key"]: row["reason"] for row in bad}
    assert "not a readable" in reasons["n007"] and reasons["n003"] == "the note has no image"
    assert all(", twice (" in reasons[key] for key in reasons if key not in ("n003", "n007"))
    described = [note.note_id for note in notes[:55] if note.note_id not in reasons]
    assert table["note_id"].to_pylist() == described and "n009" in described
    assert len(set(table["summary"].to_pylist())) > 35
    # nothing is left to do: no engine is started
    again = run(tmp_path / "only.parquet")
    assert again["reused"] == 55 and again["startup_seconds"] == 0
    assert pq.read_table(tmp_path / "out" / "summaries.parquet").equals(table)
    # all notes, with a strict share: five more are described, and one broken image is too many
    with pytest.raises(DataError, match=r"of the first \d+ images .*max_bad_share=0.01.*note n0"):
        strict = SETTINGS.model_copy(update={"max_bad_share": 0.01})
        summarize_images(mllm, tmp_path / "notes", tmp_path / "out", strict, GENERATION, "en")
