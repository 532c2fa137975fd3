"""Tokenises text that users wrote, without ever producing a special token or another mark of the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class UserTextEncoder:
    """Encodes users' texts with a tokenizer. Picklable; not thread-safe.

    Args:
        tokenizer: any tokenizer; it is not changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Users' texts may contain unknown characters. All other special tokens may come only from this package.
        self.forbidden = {i for i, token in tokenizer.added_tokens_decoder.items() if _is_mark(token)}
        self.forbidden |= set(tokenizer.all_special_ids)
        self.forbidden -= {tokenizer.unk_token_id}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without any id in ``forbidden``."""
        return [
            ids if self.forbidden.isdisjoint(ids) else self._defused(text)
            for text, ids in zip(texts, self.encode_raw(texts), strict=True)
        ]

    def encode_raw(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. Special tokens are split; other marks that the tokenizer matches stay as they are."""
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids

    def _defused(self, text: str) -> list[int]:
        """Encode a text with such a mark (<think>, say) character by character, so that the mark is not matched."""
        return [i for ids in self.encode_raw(list(text)) for i in ids if i not in self.forbidden]


def _is_mark(token: object) -> bool:
    """Whether an added token is a mark, and not a word. Marks such as <think> need not be special tokens."""
    text = str(token)
    return getattr(token, "special", False) or (text[:1] in "<[" and text[-1:] in ">]")


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text: <s> for Llama, none for Qwen."""
    with_start, without = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return with_start[: with_start.index(without[0])] if without and without[0] in with_start else []
