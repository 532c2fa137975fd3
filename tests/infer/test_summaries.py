"""Image summaries through ray.data.llm, with a real vLLM over a random tiny Qwen2-VL."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from notellm2_ray.core.errors import ConfigError, DataError, ModelError
from notellm2_ray.core.schema import SUMMARY_SCHEMA, Note
from notellm2_ray.core.settings import GenerationSettings, SummarySettings
from notellm2_ray.infer.answers import cut_at_sentence, is_repetitive, one_paragraph
from notellm2_ray.infer.summaries import sort_rows, summarize_images
from notellm2_ray.infer.summary_parts import commit, compile_summaries, described_parts, read_described
from notellm2_ray.infer.summary_rows import ERROR, NO_IMAGE, EncodedImage, checked
from tests.support.encoded_pictures import LOSSLESS, LOSSY, encoded
from tests.support.tiny_mllm import picture, save_mllm
from tests.support.tiny_models import write_notes

# Sampled, because a random model's greedy answers repeat themselves.
SETTINGS = SummarySettings(max_tokens=16, batch_rows=8, temperature=1.0, min_characters=0, max_bad_share=0.2)
GENERATION = GenerationSettings(dtype="float32", max_model_len=512, max_sequences=16)


def test_images_travel_encoded_and_arrive_scaled_down() -> None:
    buffer = io.BytesIO()
    Image.effect_noise((1200, 900), 50).convert("RGB").save(buffer, "JPEG")
    sent = pickle.dumps({"image": EncodedImage(buffer.getvalue(), 262_144)})
    assert len(sent) < len(buffer.getvalue()) + 500
    arrived = pickle.loads(sent)["image"]
    assert isinstance(arrived, Image.Image) and arrived.mode == "RGB"
    assert 0.95 * 262_144 < arrived.width * arrived.height <= 262_144
    assert abs(arrived.width / arrived.height - 4 / 3) < 0.01
    assert pickle.loads(pickle.dumps(EncodedImage(picture(1), 262_144))).size == (56, 56)


def test_bad_images_are_known_before_the_engine() -> None:
    assert checked(picture(1)) == (picture(1), "")
    assert checked(None)[1] == "the note has no image"
    assert checked(b"no image")[0] is None and "not a readable" in checked(b"no image")[1]
    assert "cannot be decoded" in checked(picture(1)[:300])[1]


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


def test_rows_are_sorted_into_good_bad_and_to_ask_again() -> None:
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
    good, bad, again = sort_rows(rows, settings, 0)
    assert [(one["note_id"], one["summary"]) for one in good] == [("good", "A cat."), ("cut", "A cat.")]
    assert [one["note_id"] for one in bad] == ["broken"] and again == {"empty", "circles", "failed"}
    good, bad, again = sort_rows(rows, settings, 1)
    assert [one["note_id"] for one in bad] == ["empty", "circles", "failed", "broken"] and not again


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
