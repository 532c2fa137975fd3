"""From notes to tensors: prompt, truncation, pixels, padding. Holds no weights, so it can be sent to any process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.prompts import PromptKind, Slot, join_topics, note_prompt, shown_texts
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.models.embedder.kinds import Inputs
from notellm2_ray.models.embedder.variants import VARIANTS
from notellm2_ray.models.llm import IMAGE_TOKEN, VISUAL_MARK_TOKEN
from notellm2_ray.models.user_text import UserTextEncoder, leading_ids
from notellm2_ray.models.vision.pixels import ImageSettings

_MIN_TEXT_TOKENS = 8
_KEPT_SHARE = 4  # a quarter of the text's tokens is kept for each later part of the prompt


class NoteFeatures(NamedTuple):
    """One preprocessed note."""

    note_id: str
    input_ids: np.ndarray  # (T,) int64; with L_c copies of <IMG> for the image; empty without an LLM
    image_start: int  # where the visual tokens begin; -1: there are none
    visual_end: int  # where the visual vector is read; -1: there is none
    pixels: np.ndarray | None  # (3, S, S) uint8
    num_tokens: int  # length in a batch: T; without an LLM, the tower's number of patches


class NoteBatch(NamedTuple):
    """N notes, K of them with an image; texts padded on the right to T tokens."""

    input_ids: torch.Tensor  # (N, T) int64
    attention_mask: torch.Tensor  # (N, T) int64, 0 on padding
    last: torch.Tensor  # (N,) int64, position of the last token: the multimodal vector is read there
    pixels: torch.Tensor  # (K, 3, S, S) uint8
    image_rows: torch.Tensor  # (K,) int64, the row of each image's note
    image_starts: torch.Tensor  # (K,) int64, where its visual tokens begin; -1: there are none
    visual_ends: torch.Tensor  # (K,) int64, where its visual vector is read; -1: there is none

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NoteBatch:
        """The same batch on ``device``."""
        return NoteBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def pin_memory(self) -> NoteBatch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return NoteBatch(*(tensor.pin_memory() for tensor in self))


class NotePreprocessor:
    """Makes features and batches of notes, in the same way for training, bulk embedding and serving. Picklable.

    Args:
        settings: of the embedder.
        tokenizer: the LLM's, with <IMG> and <IMG_EMB> added (:func:`notellm2_ray.models.llm.load_tokenizer`).
        image: the tower's input format; None for a variant without a tower.
        num_patches: L of the tower.

    Raises:
        ModelError: ``max_body_tokens`` leaves no room for the note's text.
    """

    def __init__(
        self,
        settings: ModelSettings,
        tokenizer: PreTrainedTokenizerBase,
        image: ImageSettings | None,
        num_patches: int = 0,
    ) -> None:
        self.settings, self.tokenizer, self.image, self.num_patches = settings, tokenizer, image, num_patches
        self.variant = VARIANTS[settings.variant]
        self.image_id: int = tokenizer.get_vocab()[IMAGE_TOKEN]
        self.mark_id: int = tokenizer.get_vocab()[VISUAL_MARK_TOKEN]
        self.pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        self._first, self._texts = UserTextEncoder(tokenizer), UserTextEncoder(tokenizer, inside=True)
        self._start = leading_ids(tokenizer)
        kinds: set[PromptKind] = {self.variant.prompt or "text", "text"}
        self._templates = {kind: self._encode_template(kind) for kind in kinds}

    def features(self, note: Note, inputs: Inputs = "multimodal") -> NoteFeatures:
        """One note's features.

        Args:
            inputs: ``text`` treats the note as one without an image (``settings.missing_image``); ``image`` leaves the
                texts of the prompt empty (Table 3).

        Raises:
            DataError: the image cannot be decoded; the message names the note.
        """
        pixels = self._pixels(note, inputs)
        if self.variant.prompt is None:
            return NoteFeatures(note.note_id, np.empty(0, np.int64), -1, -1, pixels, self.num_patches)
        if inputs == "image":
            note = Note(note.note_id)
        in_prompt = self.variant.visual_tokens and pixels is not None
        ids, start, end = self._prompt_ids(note, self.variant.prompt if in_prompt else "text")
        return NoteFeatures(note.note_id, np.asarray(ids, np.int64), start, end, pixels, len(ids))

    def collate(self, features: Sequence[NoteFeatures]) -> NoteBatch:
        """A batch of features, in the same order."""
        lengths = np.array([len(item.input_ids) for item in features], np.int64)
        longest = int(lengths.max(initial=0))
        input_ids = np.full((len(features), longest), self.pad_id, np.int64)
        for row, item in enumerate(features):
            input_ids[row, : lengths[row]] = item.input_ids
        mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        images = [(row, item, item.pixels) for row, item in enumerate(features) if item.pixels is not None]
        side = self.image.size if self.image else 0
        pixels = np.stack([values for _, _, values in images]) if images else np.empty((0, 3, side, side), np.uint8)
        return NoteBatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(mask),
            torch.from_numpy(np.maximum(lengths - 1, 0)),
            torch.from_numpy(pixels),
            torch.tensor([row for row, _, _ in images], dtype=torch.int64),
            torch.tensor([item.image_start for _, item, _ in images], dtype=torch.int64),
            torch.tensor([item.visual_end for _, item, _ in images], dtype=torch.int64),
        )

    def text_length(self, note: Note) -> int:
        """Tokens of title, topics and content before truncation, which tell short notes from long ones."""
        topics = join_topics(note.topics, self.settings.prompt_language)
        return sum(len(ids) for ids in self.encode_texts([note.title, topics, note.content]))

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of users' texts, which never include special tokens or other marks of the tokenizer."""
        return self._texts.encode(texts)

    @property
    def max_tokens(self) -> int:
        """Length of the longest possible prompt."""
        return max(template.max_tokens for template in self._templates.values())

    def _pixels(self, note: Note, inputs: Inputs) -> np.ndarray | None:
        """Pixels of the note's image. For a note without one: a blank image or None, as the settings say.

        Without an LLM it is always a blank image, since the model has no other input.
        """
        if self.image is None or not self.variant.sees_images:
            return None
        if note.image is None or inputs == "text":
            blank = self.settings.missing_image == "zero" or self.variant.prompt is None
            return self.image.blank() if blank else None
        from notellm2_ray.core.images import decode_image

        try:
            # JPEG is decoded at twice the needed size, so that the resize hides the coarse scaling of the decoder.
            return self.image.pixels(decode_image(note.image, min_side=2 * self.image.resize_to))
        except DataError as error:
            raise DataError(f"note {note.note_id}: {error}") from error

    def _prompt_ids(self, note: Note, kind: PromptKind) -> tuple[list[int], int, int]:
        """Token ids, where the visual tokens begin and where the visual vector is read (-1 where there are none)."""
        template = self._templates[kind]
        texts = fit_texts(self._slot_texts(note), template.text_budget)
        ids, start, end = list(self._start), -1, -1
        for part in template.parts:
            if part is Slot.IMAGE:
                start = len(ids)
                ids += [self.image_id] * self.settings.qformer.num_queries
            elif part is Slot.VISUAL_MARK:
                end = len(ids) - 1
                ids.append(self.mark_id)
            else:
                ids += texts[part] if isinstance(part, Slot) else part
        return ids, start, end

    def _slot_texts(self, note: Note) -> dict[Slot, list[int]]:
        texts = shown_texts(note, self.settings)
        return dict(zip(texts, self.encode_texts(list(texts.values())), strict=True))

    def _encode_template(self, kind: PromptKind) -> _Template:
        parts = note_prompt(kind, self.settings.prompt_language)
        encoders = [self._first, *[self._texts] * (len(parts) - 1)]
        encoded = [
            part if isinstance(part, Slot) else encoder.encode_raw([part])[0]
            for encoder, part in zip(encoders, parts, strict=True)
        ]
        # max_body_tokens counts the half of the prompt with the text, up to its closing words, and the image as one
        # token. It does not count the visual half of mICL: in the paper the longest prompts grow with it, as the
        # slower inference shows (Table 7).
        begins = parts.index(Slot.VISUAL_MARK) + 1 if Slot.VISUAL_MARK in parts else 0
        taken = sum(len(part) for part in encoded[begins:-1] if not isinstance(part, Slot)) + (Slot.IMAGE in parts)
        budget = text_budget(self.settings, taken)
        fixed = len(self._start) + sum(1 if isinstance(part, Slot) else len(part) for part in encoded)
        fixed -= sum(slot in parts for slot in (Slot.TITLE, Slot.TOPICS, Slot.CONTENT))
        fixed += (self.settings.qformer.num_queries - 1) * (Slot.IMAGE in parts)
        return _Template(tuple(encoded), budget, fixed + budget)


class _Template(NamedTuple):
    parts: tuple[Slot | list[int], ...]
    text_budget: int  # tokens that title, topics and content may take together
    max_tokens: int  # of the whole prompt


def text_budget(settings: ModelSettings, taken: int) -> int:
    """The tokens that a note's texts may take together, if the prompt's own words take ``taken``.

    Raises:
        ModelError: there are too few for a text.
    """
    budget = settings.max_body_tokens - taken
    if budget < _MIN_TEXT_TOKENS:
        raise ModelError(
            f"model.max_body_tokens={settings.max_body_tokens} leaves {max(budget, 0)} tokens for a note's "
            f"text: with this tokenizer the prompt's own words take {taken}. Raise it to "
            f"{taken + _MIN_TEXT_TOKENS} or more, or try the other model.prompt_language"
        )
    return budget


def fit_texts(texts: dict[Slot, list[int]], budget: int) -> dict[Slot, list[int]]:
    """Texts cut to ``budget`` tokens in all, without one part starving another.

    The title gets its tokens first, then the topics, then the content; but a quarter of the budget is kept for each
    part that comes later, as far as that part needs it.
    """
    kept = {slot: min(len(ids), budget // _KEPT_SHARE) for slot, ids in texts.items()}
    fitted: dict[Slot, list[int]] = {}
    for slot, ids in texts.items():
        del kept[slot]
        fitted[slot] = ids[: budget - sum(kept.values())]
        budget -= len(fitted[slot])
    return fitted
