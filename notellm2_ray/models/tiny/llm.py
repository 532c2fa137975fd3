"""A byte-level tokenizer and a causal LM (Qwen2 architecture), trained from scratch on a corpus of texts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import TinySettings
from notellm2_ray.models.quiet import quiet_loading
from notellm2_ray.models.tiny.loop import fit, mixed_precision, one_thread, summarise

log = logging.getLogger("notellm2_ray")

# In this order, so that EOS is not number 2, which a CLIP text tower misreads (see clip._tokenizer).
PAD, EOS, BOS = "<|pad|>", "<|end|>", "<|start|>"

_LEARNING_RATE = 3e-3
_LENGTH = 128  # tokens of a training row
_MAX_POSITIONS = 2048
_MAX_CHARACTERS = 30_000_000  # more text than the steps can read; it bounds the memory


@one_thread()
def train_tiny_llm(texts: Iterable[str], settings: TinySettings, directory: Path, seed: int) -> dict[str, Any]:
    """Train a tokenizer and a causal LM by next-token prediction, and save both in Hugging Face layout.

    The same texts, settings and seed give the same weights.

    Args:
        texts: the corpus, one document each; blank ones are skipped.
        settings: sizes, steps, batch.
        directory: where config.json, model.safetensors and the tokenizer are written; created if missing.
        seed: of the initial weights and of the choice of batches.

    Returns:
        vocab, parameters, first_loss and last_loss (nats per token), seconds.

    Raises:
        DataError: there is no text.
    """
    started = time.perf_counter()
    corpus = _read(texts)
    tokenizer = train_tokenizer(corpus, settings.vocab_size)
    stream = _token_stream(tokenizer, corpus, _LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "tiny", "llm", "weights"))
        # On a CPU, plain attention is faster than fused attention at these lengths and widths.
        model = Qwen2ForCausalLM._from_config(_config(settings, tokenizer), attn_implementation="eager")
    order = torch.Generator().manual_seed(stream_seed(seed, "tiny", "llm", "batches"))

    def batch_loss(_: int) -> Tensor:
        tokens = _windows(stream, settings.llm_batch_size, _LENGTH, order)
        with mixed_precision():
            return model(input_ids=tokens, labels=tokens).loss

    log.info("tiny LLM: %d texts, %d tokens, %d steps", len(corpus), len(stream), settings.llm_steps)
    losses = fit("tiny LLM", model, batch_loss, steps=settings.llm_steps, learning_rate=_LEARNING_RATE)
    with quiet_loading():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return {"vocab": len(tokenizer), "parameters": model.num_parameters(), **summarise(losses, started)}


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


def _read(texts: Iterable[str]) -> list[str]:
    corpus: list[str] = []
    characters = 0
    for text in texts:
        if not text.strip():
            continue
        corpus.append(text)
        characters += len(text)
        if characters >= _MAX_CHARACTERS:
            log.info("tiny LLM: %d texts are enough for its training; the rest is not read", len(corpus))
            break
    if not corpus:
        raise DataError(
            "there is no text to train the tiny language model on: every title, topic and content is empty. "
            "Check source.columns, or set model.llm to a checkpoint."
        )
    return corpus


def _token_stream(tokenizer: Qwen2Tokenizer, corpus: list[str], at_least: int) -> Tensor:
    """All documents in one row, each between start and end: (T,) int64. A short corpus is repeated."""
    rows = tokenizer(corpus, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream = torch.tensor([token for row in rows for token in (start, *row, end)], dtype=torch.int64)
    return stream.repeat(-(-at_least // len(stream)))


def _windows(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random parts of the stream: (count, length) int64. A part may go beyond a document's end."""
    starts = torch.randint(0, len(stream) - length + 1, (count, 1), generator=generator)
    return stream[starts + torch.arange(length)]


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
