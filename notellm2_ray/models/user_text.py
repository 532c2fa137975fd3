"""Tokenises text that users wrote, without ever producing a special token or another mark of the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

_ANCHOR = "\n"  # merges with no text that follows


class UserTextEncoder:
    """Encodes users' texts with a tokenizer. Picklable; not thread-safe.

    Args:
        tokenizer: any tokenizer; it is not changed.
        marks: further marks that are no tokens, such as [INST] for Llama 2. In users' texts they are split into their
            characters, so that their tokens are other ones than the template's.
        inside: the texts follow other text of a prompt. Then they are encoded without the space that some tokenizers
            (Llama 2, Mistral) put before every text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: Iterable[str] = (), *, inside: bool = False) -> None:
        self.tokenizer = tokenizer
        self._anchor: list[int] = []
        if inside:
            anchor, letter, both = self.encode_raw([_ANCHOR, "a", _ANCHOR + "a"])
            self._anchor = anchor if both != anchor + letter else []
        longest_first = sorted(set(marks), key=lambda mark: (-len(mark), mark))
        self._marks = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")
        # Users' texts may contain unknown characters. All other special tokens may come only from this package.
        self.forbidden = {i for i, token in tokenizer.added_tokens_decoder.items() if _is_mark(token)}
        self.forbidden |= set(tokenizer.all_special_ids)
        self.forbidden -= {tokenizer.unk_token_id}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without any id in ``forbidden``."""
        return [
            ids if self.forbidden.isdisjoint(ids) and not self._marks.search(text) else self._split(text)
            for text, ids in zip(texts, self.encode_raw(texts), strict=True)
        ]

    def encode_raw(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. Special tokens are split; other marks that the tokenizer matches stay as they are."""
        if not self._anchor:
            return self._as_first(texts)
        anchored, start = self._as_first([_ANCHOR + text for text in texts]), len(self._anchor)
        return [
            ids[start:] if ids[:start] == self._anchor else self._as_first([text])[0]
            for text, ids in zip(texts, anchored, strict=True)
        ]

    def _as_first(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids

    def _split(self, text: str) -> list[int]:
        """Encode a text that contains marks."""
        ids: list[int] = []
        for piece in filter(None, self._marks.split(text)):
            (plain,) = self.encode_raw([piece])
            intact = self.forbidden.isdisjoint(plain) and not self._marks.fullmatch(piece)
            ids += plain if intact else self._defused(piece)
        return ids

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
