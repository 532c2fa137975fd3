"""Tokenizers of three families, trained in a moment: byte-level BPE (GPT, Qwen, Llama 3), Llama 2's and Gemma's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from notellm2_ray.core.recommend_prompts import PREFERENCE_TEMPLATES, SUMMARY_TEMPLATES, ranker_prompt
from notellm2_ray.models.tiny.llm import train_tokenizer

_VOCABULARY = 700
_SPIECE = 700  # entries besides the bytes
_BYTES = [f"<0x{number:02X}>" for number in range(256)]


def qwen(marks: Sequence[str], named: Mapping[str, str] | None = None, **roles: str | None) -> Qwen2Tokenizer:
    """Qwen's: no token before a text. ``named`` are special tokens that the tokenizer has as attributes."""
    vocabulary, merges = _byte_level(tuple(marks))
    special: dict[str, Any] = {"bos_token": None, "unk_token": None, **roles}
    others = [mark for mark in marks if mark not in special.values() and mark not in (named or {}).values()]
    made = Qwen2Tokenizer(dict(vocabulary), list(merges), **special, extra_special_tokens=dict(named or {}))
    made.add_tokens(others, special_tokens=True)
    return made


def byte_level(marks: Sequence[str], bos: str, **roles: str) -> PreTrainedTokenizerFast:
    """GPT-2's and Llama 3's: ``bos`` before a text."""
    from tokenizers.processors import TemplateProcessing

    trained = Tokenizer.from_str(train_tokenizer(_corpus(), _VOCABULARY, marks).backend_tokenizer.to_str())
    first = f"{bos}:0"
    trained.post_processor = TemplateProcessing(
        single=f"{first} $A:0", pair=f"{first} $A:0 {first} $B:1", special_tokens=[(bos, trained.token_to_id(bos))]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=bos, **roles)
    made.add_tokens([mark for mark in marks if mark not in (bos, *roles.values())], special_tokens=True)
    return made


def llama(marks: Sequence[str]) -> LlamaTokenizer:
    """Llama 2's, of SentencePiece: <s> before a text, spaces as part of words, unknown characters as bytes."""
    vocabulary, merges = _sentence_piece(("<unk>", "<s>", "</s>"), False)
    made = LlamaTokenizer(dict(vocabulary), list(merges), pad_token="<unk>")
    made.add_tokens(list(marks), special_tokens=True)
    return made


def gemma(marks: Sequence[str], named: Mapping[str, str]) -> GemmaTokenizer:
    """Gemma's, of SentencePiece: up to four line breaks are one token."""
    vocabulary, merges = _sentence_piece(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), True)
    made = GemmaTokenizer(dict(vocabulary), list(merges), extra_special_tokens=dict(named))
    made.add_tokens(list(marks), special_tokens=True)
    return made


def _corpus() -> list[str]:
    asked = ranker_prompt("en", "mllm_msr", "shared_prefix", "cats", (), "red cat", True)
    words = [part for part in asked if isinstance(part, str)]
    roles = "user User assistant Assistant ASSISTANT USER model system Yes No"
    return [*PREFERENCE_TEMPLATES.values(), *SUMMARY_TEMPLATES.values(), *words, *[roles] * 9, *["Yes", "No"] * 9] * 9


@cache
def _byte_level(marks: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    return _learned(train_tokenizer(_corpus(), _VOCABULARY, marks).backend_tokenizer)


@cache
def _sentence_piece(marks: tuple[str, ...], breaks: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Args: breaks: line breaks are words of their own, as for Gemma; otherwise they are bytes, as for Llama."""
    trained = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if breaks:
        trained.normalizer = normalizers.Replace(" ", "▁")
        spaces = pre_tokenizers.Split("▁", "merged_with_previous")
        trained.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex("\n+"), "isolated")])
    else:
        trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    texts = [text.replace("\n", "\n" if breaks else " ") for text in _corpus()] + ["\n\n\n\n", "\n\n\n"] * 99 * breaks
    special = [*marks, *_BYTES]
    trainer = trainers.BpeTrainer(vocab_size=len(special) + _SPIECE, special_tokens=special, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    return _learned(trained)


def _learned(trained: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
