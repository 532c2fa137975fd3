"""The questions for the tiny LLM: excerpts in the prompt, answered by a characteristic word."""

import pyarrow as pa
import pytest

from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.schema import NOTE_SCHEMA
from notellm2_ray.lessons.corpus import questions_for_llm


@pytest.mark.parametrize(
    ("language", "content", "answer"),
    [
        ("en", "We like the harbour. The harbour is calm.", 'harbour"'),
        ("zh", "我们喜欢巧克力。巧克力很甜。", "巧克力”"),
    ],
)
def test_the_answer_is_the_characteristic_word_of_the_note(tmp_path, language, content, answer):
    filler = "我们喜欢今天。" if language == "zh" else "We like the day."
    rows = [{"note_id": str(n), "title": "", "topics": [], "content": content if n < 4 else filler} for n in range(12)]
    path = tmp_path / "notes.arrow"
    NoteStore.write(path, [pa.RecordBatch.from_pylist(rows, schema=NOTE_SCHEMA)])
    questions = list(questions_for_llm(NoteStore(path), language, 42))
    assert questions == list(questions_for_llm(NoteStore(path), language, 42))
    about = [question for question in questions if (question.prompt + question.answer).count(answer[:-1]) > 1]
    assert about
    for question in about:
        assert question.answer == answer
        assert max(question.words, key=question.words.__getitem__) == answer[:-1]
        assert all(word in question.prompt.lower() for word in question.words)
