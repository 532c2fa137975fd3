"""A Qwen2-VL of a few million parameters, trained from scratch to caption, summarise tastes, and answer yes or no."""

from __future__ import annotations

import logging
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2VLForConditionalGeneration

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.recommend_prompts import Text
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import TinySettings
from notellm2_ray.models.chat import ChatTokenizer
from notellm2_ray.models.image_frames import ImageFrame
from notellm2_ray.models.quiet import quiet_loading
from notellm2_ray.models.tiny.exercises import Exercise, Lessons
from notellm2_ray.models.tiny.loop import fit, mixed_precision, one_thread, summarise
from notellm2_ray.models.tiny.mllm_batches import Pictures, Row, answer_logits, encode_pictures
from notellm2_ray.models.tiny.mllm_files import new_model, new_processor, new_tokenizer, save

log = logging.getLogger("notellm2_ray")

_FIRST_RATE, _RATE = 2e-3, 2e-3
_MAX_TEXTS = 20_000  # more than the steps can read
_TEXT_TOKENS = 64  # in a row of plain text
# Rows of a kind in a batch, relative to captions. A share of less than one row is a row in every few batches.
_SHARES: Mapping[str, float] = {
    "caption": 1.0,
    "topic": 0.25,
    "question": 3.0,
    "text": 0.125,
    "preference": 0.5,
    "history": 0.03,
}
# Kinds of similar length share a forward pass.
_FORWARD_PASSES = (("caption", "topic", "question", "text"), ("preference",), ("history",))
_OF_VARYING_LENGTH = ("preference", "history")
_NEAR = 16  # a batch is drawn from so many batches' worth of rows of similar length, so that little is padded
_SHORT_FIRST = 0.6  # share of the steps until which longer and longer preferences are added to the shortest
_FIRST_SHARE = 0.15  # share of the preferences, the shortest, that the first step draws from
_BAG_ROWS = {"caption": 64, "topic": 64}  # rows in a batch of the first training
_BAG_SCALE = 10.0  # of the mean of word vectors, such that its largest logits differ by a few nats


@one_thread()
def train_tiny_mllm(
    lessons: Lessons, texts: Iterable[str], settings: TinySettings, directory: Path, seed: int
) -> dict[str, Any]:
    """Train a Qwen2-VL on exercises, and save it as a complete Hugging Face directory that vLLM loads too.

    First the word vectors learn which words belong to which topic, and the vision tower learns the words of a drawing's
    caption. This is quick, because neither needs attention. Words and drawings of one thing then have similar vectors,
    which the new model's attention looks for. Then the whole model learns all exercises together, by the tokens of
    their answers.

    The same input, settings and seed give the same weights.

    Args:
        lessons: drawings and exercises, with some held out to measure with.
        texts: the notes' texts, for the tokenizer and as plain text to learn from.
        settings: ``vocab_size`` and the sizes and steps that begin with ``mllm_``.
        directory: created if missing.
        seed: of the initial weights and of the order of exercises.

    Returns:
        parameters, vocab, first_loss, last_loss, seconds, and for each kind of exercise ``KIND_accuracy``: the share of
        its held-out exercises that greedy decoding answers word for word.

    Raises:
        DataError: there is no exercise with a drawing.
        ModelError: the vocabulary is too small.
    """
    started = time.perf_counter()
    if not any(exercise.image is not None for exercise in lessons.exercises) or not lessons.held_out:
        raise DataError("the tiny MLLM needs exercises with drawings, and some held out: raise tiny.mllm_drawings")
    corpus = [text for text in islice(texts, _MAX_TEXTS) if text.strip()]
    tokenizer = new_tokenizer([*corpus, *_words(lessons.exercises)], settings.vocab_size)
    processor = new_processor(tokenizer, settings.mllm_image_side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "tiny", "mllm", "weights"))
        model = new_model(settings, tokenizer)
    with quiet_loading():
        save(model, processor, directory)
    chat = ChatTokenizer.from_pretrained(str(directory))
    pictures = Pictures(lessons.drawings, processor)
    rows = _by_kind(lessons.exercises, chat, pictures)
    if corpus:
        rows["text"] = _text_rows(tokenizer, corpus)
    log.info("tiny MLLM: %d parameters, %d exercises", model.num_parameters(), len(lessons.exercises))
    _train_words_and_vision(model, rows, pictures, settings, seed)
    losses = _train(model, rows, pictures, settings, seed)
    measured = {
        f"{kind}_accuracy": round(accuracy(model, some, pictures), 4)
        for kind, some in _by_kind(lessons.held_out, chat, pictures).items()
    }
    with quiet_loading():
        save(model, processor, directory)
    sizes = {"parameters": model.num_parameters(), "vocab": len(tokenizer)}
    return {**sizes, **measured, **summarise(losses, started)}


@torch.inference_mode()
def accuracy(model: Qwen2VLForConditionalGeneration, rows: Sequence[Row], pictures: Pictures) -> float:
    """Share of the rows whose answer greedy decoding gives, word for word.

    One forward pass is enough: greedy decoding gives the answer if each of its tokens is the likeliest after those
    before it.
    """
    right = 0
    for start in range(0, len(rows), 32):
        some = rows[start : start + 32]
        with mixed_precision():
            logits, wanted = answer_logits(model, some, pictures)
        hits = (logits.argmax(-1) == wanted).split([len(row.ids) - row.begin for row in some])
        right += sum(bool(answer.all()) for answer in hits)
    return right / max(1, len(rows))


def _words(exercises: Iterable[Exercise]) -> Iterator[str]:
    for exercise in exercises:
        yield from (part.value if isinstance(part, Text) else str(part) for part in exercise.prompt)
        yield exercise.answer


def _by_kind(exercises: Iterable[Exercise], chat: ChatTokenizer, pictures: Pictures) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = defaultdict(list)
    for exercise in exercises:
        assert chat.image_token_id is not None
        image = ImageFrame([chat.image_token_id] * pictures.tokens)
        prompt = chat.prompt(exercise.prompt, frames=[] if exercise.image is None else [image])
        answer = [*chat.encode(exercise.answer), chat.end_ids[0]]
        rows[exercise.kind].append(Row(prompt + answer, len(prompt), exercise.image))
    return rows


def _text_rows(tokenizer: PreTrainedTokenizerBase, corpus: Sequence[str]) -> list[Row]:
    """Plain texts as rows in which every token but the first is part of the answer."""
    rows = tokenizer(list(corpus), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    stream = [token for row in rows for token in (*row, tokenizer.eos_token_id)]
    return [Row(stream[i : i + _TEXT_TOKENS], 1, None) for i in range(0, len(stream) - 1, _TEXT_TOKENS)]


def _train_words_and_vision(
    model: Qwen2VLForConditionalGeneration,
    rows: Mapping[str, Sequence[Row]],
    pictures: Pictures,
    settings: TinySettings,
    seed: int,
) -> None:
    """Train the word vectors and the vision tower: the mean vector of a title or a drawing must predict its answer.

    Both are trained at once, because word vectors that follow drawings alone forget what titles taught them.
    """
    words, visual = model.get_input_embeddings(), model.model.visual
    batches = {
        kind: _random_rows(
            rows[kind], _BAG_ROWS[kind], random.Random(stream_seed(seed, "tiny", "mllm", "together", kind))
        )
        for kind in _BAG_ROWS
        if kind in rows
    }

    def batch_loss(_: int) -> Tensor:
        losses = []
        for kind, batch in batches.items():
            some = next(batch)
            if kind == "caption":
                with mixed_precision():
                    mean = encode_pictures(
                        visual, pictures.inputs([int(row.image or 0) for row in some]), pictures.grid
                    ).mean(1)
            else:
                mean = _BAG_SCALE * torch.stack([words(torch.tensor(row.ids[: row.begin])).mean(0) for row in some])
            losses.append(_bag_loss(model.lm_head(mean.float()), some))
        return torch.stack(losses).sum()

    parts = nn.ModuleList([visual, words])
    fit("tiny MLLM, words and vision", parts, batch_loss, steps=settings.mllm_first_steps, learning_rate=_FIRST_RATE)


def _bag_loss(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Cross-entropy of each row's logits (B, V) against every token of its answer."""
    answers = [row.ids[row.begin : -1] for row in rows]
    owner = torch.tensor([number for number, answer in enumerate(answers) for _ in answer])
    return nn.functional.cross_entropy(logits.float()[owner], torch.tensor([i for answer in answers for i in answer]))


def _train(
    model: Qwen2VLForConditionalGeneration,
    rows: Mapping[str, Sequence[Row]],
    pictures: Pictures,
    settings: TinySettings,
    seed: int,
) -> list[float]:
    """Train the whole model on all kinds at once; returns the losses."""
    groups = [
        _batches({kind: rows[kind] for kind in kinds if kind in rows}, settings, seed) for kinds in _FORWARD_PASSES
    ]

    def batch_loss(_: int) -> Tensor:
        return torch.stack([_loss(model, batch, pictures) for batch in map(next, groups) if batch]).mean()

    return fit("tiny MLLM", model, batch_loss, steps=settings.mllm_steps, learning_rate=_RATE)


def _loss(model: Qwen2VLForConditionalGeneration, rows: Sequence[Row], pictures: Pictures) -> Tensor:
    """Mean over the rows of each answer's mean loss: a long answer counts as much as a short one."""
    with mixed_precision():
        logits, wanted = answer_logits(model, rows, pictures)
    lengths = torch.tensor([len(row.ids) - row.begin for row in rows])
    losses = nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    return (losses / lengths.repeat_interleave(lengths)).sum() / len(rows)


def _batches(rows: Mapping[str, Sequence[Row]], settings: TinySettings, seed: int) -> Iterator[list[Row]]:
    """Batches of all these kinds in their shares, endlessly."""
    shares = {kind: _SHARES[kind] * settings.mllm_batch_size for kind in rows}
    batches = {}
    for kind, some in rows.items():
        size, rng = max(1, round(shares[kind])), random.Random(stream_seed(seed, "tiny", "mllm", kind))
        if kind in _OF_VARYING_LENGTH:
            batches[kind] = _similar_rows(some, size, rng, round(_SHORT_FIRST * settings.mllm_steps))
        else:
            batches[kind] = _random_rows(some, size, rng)
    for step in count():
        due = [kind for kind in rows if step % max(1, round(1 / shares[kind])) == 0]
        yield [row for kind in due for row in next(batches[kind])]


def _random_rows(rows: Sequence[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Batches of random rows, endlessly."""
    while True:
        yield rng.sample(rows, min(size, len(rows)))


def _similar_rows(rows: Sequence[Row], size: int, rng: random.Random, grown: int) -> Iterator[list[Row]]:
    """Batches of random rows of similar length, endlessly; from step ``grown`` on also of the longest rows."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    size = min(size, len(rows))
    for step in count():
        share = 1.0 if step >= grown else _FIRST_SHARE + (1 - _FIRST_SHARE) * step / grown
        end = max(size, round(share * len(rows)))
        begin = rng.randrange(max(1, end - _NEAR * size + 1))
        yield rng.sample(rows[begin : min(end, begin + _NEAR * size)], size)
