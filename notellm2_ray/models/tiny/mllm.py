"""A Qwen2-VL of a few million parameters, trained from scratch to caption, to sum up tastes, and to say yes or no."""

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
from notellm2_ray.models.chat import ChatTokenizer, expand_images
from notellm2_ray.models.quiet import quiet_loading
from notellm2_ray.models.tiny.lessons import Exercise, Lessons
from notellm2_ray.models.tiny.loop import fit, mixed_precision, one_thread, summarise
from notellm2_ray.models.tiny.mllm_batches import Pictures, Row, answer_logits, see
from notellm2_ray.models.tiny.mllm_files import new_model, new_processor, new_tokenizer, save

log = logging.getLogger("notellm2_ray")

_FIRST_RATE, _RATE = 2e-3, 2e-3
_MAX_TEXTS = 20_000  # more than the steps could read
_TEXT_TOKENS = 64  # of a stretch of plain text
# Rows of a kind in a batch, for one caption; below one row in every few batches only.
_SHARES: Mapping[str, float] = {
    "caption": 1.0,
    "topic": 0.25,
    "question": 3.0,
    "text": 0.125,
    "preference": 0.5,
    "history": 0.03,
}
# Kinds of about one length share a forward pass.
_TOGETHER = (("caption", "topic", "question", "text"), ("preference",), ("history",))
_OF_ANY_LENGTH = ("preference", "history")
_NEAR = 16  # batches' worth of rows of about one length that a batch is drawn from, so that little is padded
_SHORT_FIRST = 0.6  # of the steps: over these the shortest preferences come first, and longer ones join them
_FIRST_SHARE = 0.15  # of the preferences: the shortest ones, that the first step draws from
_BAG_ROWS = {"caption": 64, "topic": 64}  # rows in a batch that words and looks are learned from
_BAG_SCALE = 10.0  # of the mean of word vectors: about what makes its largest products differ by a few nats


@one_thread()
def train_tiny_mllm(
    lessons: Lessons, texts: Iterable[str], settings: TinySettings, directory: Path, seed: int
) -> dict[str, Any]:
    """Train a Qwen2-VL on exercises, and save it as a complete Hugging Face directory that vLLM loads too.

    First the word vectors learn which words go with which topic, and the vision tower which words of its caption a
    drawing shows, each alone and therefore quickly: what is about the same thing then looks alike, which is what the
    new model's attention looks for. Then all of it learns all exercises together, by the tokens of their answers.

    The same input, settings and seed give the same weights.

    Args:
        lessons: drawings and exercises, with some held out to measure by.
        texts: the notes' texts, for the tokenizer and to know their words.
        settings: sizes and steps, those that begin with ``mllm_``, and ``vocab_size``.
        directory: made if absent.
        seed: of initialisation and of the order of exercises.

    Returns:
        parameters, vocab, first_loss, last_loss, seconds, and for each kind of exercise ``KIND_accuracy``: the share of
        the held-out ones that greedy decoding answers word for word.

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
        rows["text"] = _stretches(tokenizer, corpus)
    log.info("tiny MLLM: %d parameters, %d exercises", model.num_parameters(), len(lessons.exercises))
    _learn_what_goes_together(model, rows, pictures, settings, seed)
    losses = _learn(model, rows, pictures, settings, seed)
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

    It does exactly if, the answer given so far, each of its tokens is the likeliest: one forward pass tells.
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
        prompt = chat.prompt(exercise.prompt)
        if exercise.image is not None:
            assert chat.image_token_id is not None
            prompt = expand_images(prompt, [pictures.tokens], chat.image_token_id)
        answer = [*chat.encode(exercise.answer), chat.end_ids[0]]
        rows[exercise.kind].append(Row(prompt + answer, len(prompt), exercise.image))
    return rows


def _stretches(tokenizer: PreTrainedTokenizerBase, corpus: Sequence[str]) -> list[Row]:
    """Plain texts as rows of which every token but the first is an answer."""
    rows = tokenizer(list(corpus), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    stream = [token for row in rows for token in (*row, tokenizer.eos_token_id)]
    return [Row(stream[i : i + _TEXT_TOKENS], 1, None) for i in range(0, len(stream) - 1, _TEXT_TOKENS)]


def _learn_what_goes_together(
    model: Qwen2VLForConditionalGeneration,
    rows: Mapping[str, Sequence[Row]],
    pictures: Pictures,
    settings: TinySettings,
    seed: int,
) -> None:
    """Train word vectors and vision tower: what a title or a drawing is made of is, on average, to be like its answer.

    Both at once, for word vectors that follow drawings alone forget what titles taught them.
    """
    words, visual = model.get_input_embeddings(), model.model.visual
    dealt = {
        kind: _deal(rows[kind], _BAG_ROWS[kind], random.Random(stream_seed(seed, "tiny", "mllm", "together", kind)))
        for kind in _BAG_ROWS
        if kind in rows
    }

    def batch_loss(_: int) -> Tensor:
        losses = []
        for kind, order in dealt.items():
            some = next(order)
            if kind == "caption":
                with mixed_precision():
                    mean = see(visual, pictures.inputs([int(row.image or 0) for row in some]), pictures.grid).mean(1)
            else:
                mean = _BAG_SCALE * torch.stack([words(torch.tensor(row.ids[: row.begin])).mean(0) for row in some])
            losses.append(_bag_loss(model.lm_head(mean.float()), some))
        return torch.stack(losses).sum()

    parts = nn.ModuleList([visual, words])
    fit("tiny MLLM, words and looks", parts, batch_loss, steps=settings.mllm_first_steps, learning_rate=_FIRST_RATE)


def _bag_loss(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Cross-entropy of each row's logits (B, V) against every token of its answer."""
    answers = [row.ids[row.begin : -1] for row in rows]
    owner = torch.tensor([number for number, answer in enumerate(answers) for _ in answer])
    return nn.functional.cross_entropy(logits.float()[owner], torch.tensor([i for answer in answers for i in answer]))


def _learn(
    model: Qwen2VLForConditionalGeneration,
    rows: Mapping[str, Sequence[Row]],
    pictures: Pictures,
    settings: TinySettings,
    seed: int,
) -> list[float]:
    """Train all of it on all kinds at once; the losses."""
    groups = [_mixed({kind: rows[kind] for kind in kinds if kind in rows}, settings, seed) for kinds in _TOGETHER]

    def batch_loss(_: int) -> Tensor:
        return torch.stack([_loss(model, batch, pictures) for batch in map(next, groups) if batch]).mean()

    return fit("tiny MLLM", model, batch_loss, steps=settings.mllm_steps, learning_rate=_RATE)


def _loss(model: Qwen2VLForConditionalGeneration, rows: Sequence[Row], pictures: Pictures) -> Tensor:
    """Mean over the rows of their answers' mean losses: a long answer counts no more than a short one."""
    with mixed_precision():
        logits, wanted = answer_logits(model, rows, pictures)
    lengths = torch.tensor([len(row.ids) - row.begin for row in rows])
    losses = nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    return (losses / lengths.repeat_interleave(lengths)).sum() / len(rows)


def _mixed(rows: Mapping[str, Sequence[Row]], settings: TinySettings, seed: int) -> Iterator[list[Row]]:
    """Batches without end, of every kind its share."""
    shares = {kind: _SHARES[kind] * settings.mllm_batch_size for kind in rows}
    dealt = {}
    for kind, some in rows.items():
        size, rng = max(1, round(shares[kind])), random.Random(stream_seed(seed, "tiny", "mllm", kind))
        grown = round(_SHORT_FIRST * settings.mllm_steps)
        dealt[kind] = _deal_alike(some, size, rng, grown) if kind in _OF_ANY_LENGTH else _deal(some, size, rng)
    for step in count():
        due = [kind for kind in rows if step % max(1, round(1 / shares[kind])) == 0]
        yield [row for kind in due for row in next(dealt[kind])]


def _deal(rows: Sequence[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Batches of random rows, without end."""
    while True:
        yield rng.sample(rows, min(size, len(rows)))


def _deal_alike(rows: Sequence[Row], size: int, rng: random.Random, grown: int) -> Iterator[list[Row]]:
    """Batches of random rows of about one length, without end; by step ``grown`` the longest ones have joined."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    size = min(size, len(rows))
    for step in count():
        share = 1.0 if step >= grown else _FIRST_SHARE + (1 - _FIRST_SHARE) * step / grown
        end = max(size, round(share * len(rows)))
        begin = rng.randrange(max(1, end - _NEAR * size + 1))
        yield rng.sample(rows[begin : min(end, begin + _NEAR * size)], size)
