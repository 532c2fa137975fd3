"""A byte-level tokenizer and a causal LM (Qwen2 architecture), trained from scratch on a corpus of texts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import TinySettings
from notellm2_ray.models.quiet import quiet_loading
from notellm2_ray.models.tiny.exercises import Question
from notellm2_ray.models.tiny.loop import fit, mixed_precision, one_thread, summarise

log = logging.getLogger("notellm2_ray")

# In this order, so that EOS is not number 2, which a CLIP text tower misreads (see clip._tokenizer).
PAD, EOS, BOS = "<|pad|>", "<|end|>", "<|start|>"

_LEARNING_RATE = 3e-3
_LENGTH = 128  # most tokens of a training row
_MAX_HELD_OUT = 256
_MAX_POSITIONS = 2048
_MAX_CHARACTERS = 30_000_000  # more text than the steps can read; it bounds the memory


@one_thread()
def train_tiny_llm(questions: Iterable[Question], settings: TinySettings, directory: Path, seed: int) -> dict[str, Any]:
    """Train a tokenizer and a causal LM to continue prompts and to answer them; save both in Hugging Face layout.

    The loss is the mean over the prompts' tokens plus the mean over the answers' tokens. An answer has one token in
    fifty. In the mean over all tokens it hardly counts, and then rounding decides whether a short training ever finds
    out that the answer depends on the prompt: one seed ended with 69% right answers on one CPU and 29% on another.

    The same questions, settings and seed give the same weights on one kind of CPU.

    Args:
        questions: in order of the notes that they are about; blank ones are skipped. The last ones are held out.
        settings: sizes, steps, batch.
        directory: where config.json, model.safetensors and the tokenizer are written; created if missing.
        seed: of the initial weights and of the choice of batches.

    Returns:
        vocab, parameters, first_loss and last_loss (nats), accuracy (share of held-out questions of which the first
        token of the answer is the likeliest), seconds.

    Raises:
        DataError: there is no text.
    """
    started = time.perf_counter()
    asked = _read(questions)
    tokenizer = train_tokenizer(
        [part for question in asked for part in (question.prompt, question.answer)], settings.vocab_size
    )
    rows = _rows(tokenizer, asked)
    held_out = min(_MAX_HELD_OUT, len(rows) // 20)
    rows, unseen = rows[: len(rows) - held_out], rows[len(rows) - held_out :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "tiny", "llm", "weights"))
        # On a CPU, plain attention is faster than fused attention at these lengths and widths.
        model = Qwen2ForCausalLM._from_config(_config(settings, tokenizer), attn_implementation="eager")
    order = torch.Generator().manual_seed(stream_seed(seed, "tiny", "llm", "batches"))

    def batch_loss(_: int) -> Tensor:
        drawn = torch.randint(len(rows), (settings.llm_batch_size,), generator=order).tolist()
        return _loss(model, [rows[number] for number in drawn])

    log.info("tiny LLM: %d questions, %d steps", len(asked), settings.llm_steps)
    losses = fit("tiny LLM", model, batch_loss, steps=settings.llm_steps, learning_rate=_LEARNING_RATE)
    with quiet_loading():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    sizes = {"vocab": len(tokenizer), "parameters": model.num_parameters()}
    return {**sizes, "accuracy": round(_accuracy(model, unseen), 4), **summarise(losses, started)}


def train_tokenizer(
    corpus: Iterable[str], vocab_size: int, marks: Sequence[str] = (PAD, EOS, BOS), **roles: str | None
) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer. It encodes any text, and decodes it again in Unicode's composed form (NFC).

    It adds no start or end token. Text that may contain a special token's name must be encoded with
    ``split_special_tokens=True``.

    Args:
        corpus: texts to learn words from.
        vocab_size: entries, special tokens included.
        marks: special tokens, numbered from 0.
        roles: which of them is ``pad_token``, ``eos_token`` and ``bos_token``; by default those of the tiny LLM.
    """
    # AutoTokenizer loads any tokenizer beside a Qwen2 as this class, with this class's normaliser and pre-tokenizer.
    # Trained with others, the tokenizer would be another one after loading.
    frame = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = frame.normalizer, frame.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(marks),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    learned: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    # With all bytes in the alphabet, no text is unknown.
    special: dict[str, Any] = {**(roles or {"pad_token": PAD, "eos_token": EOS, "bos_token": BOS}), "unk_token": None}
    others = [mark for mark in marks if mark not in special.values()]
    if others:
        special["extra_special_tokens"] = others
    merges: Any = [tuple(merge) for merge in learned["merges"]]
    return Qwen2Tokenizer(learned["vocab"], merges, model_max_length=_MAX_POSITIONS, **special)


class _Row(NamedTuple):
    ids: list[int]  # start, prompt, answer, end
    begin: int  # position of the answer's first token
    firsts: list[int]  # first tokens of the possible answers
    weights: list[float]  # of each, 1 in sum


def _read(questions: Iterable[Question]) -> list[Question]:
    asked: list[Question] = []
    characters = 0
    for question in questions:
        length = len(question.prompt) + len(question.answer)
        if not (question.prompt + question.answer).strip():
            continue
        asked.append(question)
        characters += length
        if characters >= _MAX_CHARACTERS:
            log.info("tiny LLM: %d texts are enough for its training; the rest is not read", len(asked))
            break
    if not asked:
        raise DataError(
            "there is no text to train the tiny language model on: every title, topic and content is empty. "
            "Check source.columns, or set model.llm to a checkpoint."
        )
    return asked


def _rows(tokenizer: Qwen2Tokenizer, asked: Sequence[Question]) -> list[_Row]:
    """Tokens of each question; a long prompt loses its beginning. Prompt and answer are tokenised apart, as in use."""
    prompts, answers = (
        tokenizer([question[place] for question in asked], add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        for place in (0, 1)
    )
    words = sorted({word for question in asked for word in question.words})
    encoded = tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"] if words else []
    first_token = {word: tokens[0] for word, tokens in zip(words, encoded, strict=True)}
    found = []
    for question, prompt, answer in zip(asked, prompts, answers, strict=True):
        answer = [*answer[: _LENGTH // 2], tokenizer.eos_token_id]
        start = [tokenizer.bos_token_id, *prompt[max(0, len(prompt) - (_LENGTH - len(answer) - 1)) :]]
        total = sum(question.words.values())
        firsts = [first_token[word] for word in question.words]
        found.append(_Row([*start, *answer], len(start), firsts, [each / total for each in question.words.values()]))
    return found


def _loss(model: Qwen2ForCausalLM, rows: Sequence[_Row]) -> Tensor:
    """The mean loss of the prompts' tokens plus that of the answers' tokens, end included; a scalar."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    length = torch.tensor([[len(row.ids)] for row in rows])
    place = torch.arange(1, tokens.shape[1])
    answers = (place >= torch.tensor([[row.begin] for row in rows])) & (place < length)
    prompts = place < torch.tensor([[row.begin] for row in rows])
    with mixed_precision():
        logits = model(input_ids=tokens).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    losses = losses.view_as(answers)
    return losses[prompts].sum() / prompts.sum().clamp(min=1) + losses[answers].mean() + _word_loss(logits, rows)


def _word_loss(logits: Tensor, rows: Sequence[_Row]) -> Tensor:
    """Cross-entropy at the answer's place (B, T, V) against the weights of all words that could be answered."""
    owner = torch.tensor([number for number, row in enumerate(rows) for _ in row.firsts], dtype=torch.int64)
    if not len(owner):
        return logits.new_zeros(())
    place = torch.tensor([row.begin - 1 for row in rows])
    log_share = logits[torch.arange(len(rows)), place].float().log_softmax(-1)
    first = torch.tensor([token for row in rows for token in row.firsts])
    weight = torch.tensor([each for row in rows for each in row.weights])
    return -(weight * log_share[owner, first]).sum() / len(rows)


@torch.inference_mode()
def _accuracy(model: Qwen2ForCausalLM, rows: Sequence[_Row]) -> float:
    """Share of the rows of which the first token of the answer is the likeliest."""
    right = 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids[: row.begin]])).logits[0, -1]
        right += int(logits.argmax()) == row.ids[row.begin]
    return right / max(1, len(rows))


def _config(settings: TinySettings, tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.llm_hidden_size,
        intermediate_size=3 * settings.llm_hidden_size,  # gated, so about as many weights as a plain 4h
        num_hidden_layers=settings.llm_layers,
        num_attention_heads=settings.llm_heads,
        num_key_value_heads=settings.llm_heads,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
