"""Token ids of text that users wrote: never a special token, never another mark of the tokenizer's."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class UserTextEncoder:
    """Encodes users' texts with a tokenizer. Picklable; not for several threads at once.

    Args:
        tokenizer: any; it is used, not changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # An unknown character is no mark; everything else that the tokenizer calls special may come from us alone.
        self.forbidden = {i for i, token in tokenizer.added_tokens_decoder.items() if _is_mark(token)}
        self.forbidden |= set(tokenizer.all_special_ids)
        self.forbidden -= {tokenizer.unk_token_id}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; none of them is in ``forbidden``."""
        return [
            ids if self.forbidden.isdisjoint(ids) else self._defused(text)
            for text, ids in zip(texts, self.encode_raw(texts), strict=True)
        ]

    def encode_raw(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens split, but marks that the tokenizer matches regardless left as they are."""
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids

    def _defused(self, text: str) -> list[int]:
        """A text with a mark in it that the tokenizer matches regardless (<think>, say), character by character."""
        return [i for ids in self.encode_raw(list(text)) for i in ids if i not in self.forbidden]


def _is_mark(token: object) -> bool:
    """Whether an added token is a mark, as <think> is without being called special, and no word of a language."""
    text = str(token)
    return getattr(token, "special", False) or (text[:1] in "<[" and text[-1:] in ">]")


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text by itself: Llama's <s>, nothing of Qwen's."""
    with_start, without = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return with_start[: with_start.index(without[0])] if without and without[0] in with_start else []
