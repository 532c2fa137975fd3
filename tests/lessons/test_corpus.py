"""The texts for the tiny LLM: excerpts in the prompt, answered by a characteristic word."""

import pyarrow as pa
import pytest

from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.schema import NOTE_SCHEMA
from notellm2_ray.lessons.corpus import texts_for_llm


@pytest.mark.parametrize(
    ("language", "content", "answer"),
    [
        ("en", "We like the harbour. The harbour is calm.", '"harbour"'),
        ("zh", "我们喜欢巧克力。巧克力很甜。", "“巧克力”"),
    ],
)
def test_the_answer_is_the_characteristic_word_of_the_note(tmp_path, language, content, answer):
    filler = "我们喜欢今天。" if language == "zh" else "We like the day."
    rows = [{"note_id": str(n), "title": "", "topics": [], "content": content if n < 4 else filler} for n in range(12)]
    path = tmp_path / "notes.arrow"
    NoteStore.write(path, [pa.RecordBatch.from_pylist(rows, schema=NOTE_SCHEMA)])
    texts = list(texts_for_llm(NoteStore(path), language, 42))
    assert texts == list(texts_for_llm(NoteStore(path), language, 42))
    about = [text for text in texts if text.count(answer[1:-1]) > 1]
    assert about
    assert all(text.endswith(answer) for text in about)
