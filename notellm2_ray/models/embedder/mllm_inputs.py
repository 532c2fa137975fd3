"""From notes to the inputs of a multimodal LLM: prompt, truncation, images, padding. Holds no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from notellm2_ray.core.config import build
from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.images import scaled_image
from notellm2_ray.core.prompts import Slot, cut_texts, joined, note_prompt, shown_texts
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings.model import MllmOptions, ModelSettings
from notellm2_ray.models.chat import ChatTokenizer
from notellm2_ray.models.embedder.kinds import Inputs
from notellm2_ray.models.embedder.preprocess import fit_texts, text_budget
from notellm2_ray.models.image_inputs import ImageTokenizer, ImageTokens, blank_image, joined_images
from notellm2_ray.models.user_text import leading_ids

INSTRUCTION = "Represent the user's input."  # Qwen3-VL-Embedding's own, for what is searched
_ANCHOR = "\n"  # merges with no text that follows
_RATIOS = (1, 2, 1 / 2, 4, 1 / 4, 16, 1 / 16)  # width to height of the images that are tried for the most tokens


class MllmFeatures(NamedTuple):
    """One preprocessed note."""

    note_id: str
    rows: Mapping[str, np.ndarray]  # input_ids and the processor's token types, (T,) int64 each
    vision: Mapping[str, torch.Tensor]  # inputs of the image encoder; empty without an image
    num_tokens: int  # T


class MllmBatch(NamedTuple):
    """N notes, padded on the right to T tokens."""

    rows: Mapping[str, torch.Tensor]  # input_ids, attention_mask and the token types, (N, T) int64 each
    last: torch.Tensor  # (N,) int64, position of the last token: the vector is read there
    vision: Mapping[str, torch.Tensor]  # of all images, in the order of their notes; empty if there are none
    blank: MllmBatch | None = None  # where no note has an image: a note with a blank one

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MllmBatch:
        """The same batch on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MllmBatch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._each(lambda tensor: tensor.pin_memory())

    def with_blank(self) -> MllmBatch:
        """The batch with ``blank`` as its last row."""
        assert self.blank is not None
        both = [(values, self.blank.rows[name]) for name, values in self.rows.items()]
        width = max(part.shape[1] for part in both[0])
        joined = [torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts]) for parts in both]
        return MllmBatch(
            dict(zip(self.rows, joined, strict=True)), torch.cat([self.last, self.blank.last]), self.blank.vision
        )

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MllmBatch:
        rows = {name: change(tensor) for name, tensor in self.rows.items()}
        vision = {name: change(tensor) for name, tensor in self.vision.items()}
        return MllmBatch(rows, change(self.last), vision, self.blank and self.blank._each(change))


class _Prompt(NamedTuple):
    parts: tuple[Slot | list[int], ...]
    text_budget: int  # tokens that the note's texts may take together
    max_tokens: int  # of the whole prompt, without the image


class MllmPreprocessor:
    """Makes features and batches of notes, in the same way for training, bulk embedding and serving. Picklable.

    Args:
        settings: of the embedder.
        processor: of the multimodal LLM.

    Raises:
        ModelError: the processor reads no images, or ``max_body_tokens`` leaves no room for the note's text.
    """

    def __init__(self, settings: ModelSettings, processor: Any) -> None:
        self.settings, self.processor = settings, processor
        self.options: MllmOptions = build(MllmOptions, settings.options)
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise ModelError("model.llm has no processor for images: model.kind=mllm needs a multimodal LLM")
        self._chat = ChatTokenizer.of(processor)
        self._images = ImageTokenizer(processor, self._chat.template.image.strip())
        self._image_token: str = tokenizer.convert_ids_to_tokens(self._images.image_id)
        self._anchor = self._literal(_ANCHOR)
        blank = self._images(blank_image())
        self._types = tuple(blank.types)
        self._prompts = {shown: self._prompt(shown) for shown in (True, False)}
        self._blank = self._features(Note(""), blank)

    def features(self, note: Note, inputs: Inputs = "multimodal") -> MllmFeatures:
        """One note's features.

        Args:
            inputs: ``text`` treats the note as one without an image; ``image`` leaves its texts empty (Table 3).

        Raises:
            DataError: the image cannot be decoded; the message names the note.
        """
        image = None
        if note.image is not None and inputs != "text":
            try:
                image = self._images(scaled_image(note.image, self.options.max_image_pixels))
            except DataError as error:
                raise DataError(f"note {note.note_id}: {error}") from error
        return self._features(Note(note.note_id) if inputs == "image" else note, image)

    def collate(self, features: Sequence[MllmFeatures]) -> MllmBatch:
        """A batch of features, in the same order."""
        batch = self._collated(features)
        return batch if batch.vision else batch._replace(blank=self._collated([self._blank]))

    def max_tokens(self) -> int:
        """Length of the longest prompt, found by trying images of several shapes."""
        from PIL import Image

        area = self.options.max_image_pixels
        shapes = [(max(28, int((area * ratio) ** 0.5)), max(28, int((area / ratio) ** 0.5))) for ratio in _RATIOS]
        longest = max(len(self._images(Image.new("RGB", shape)).ids) for shape in shapes)
        return max(self._prompts[True].max_tokens + longest, self._prompts[False].max_tokens)

    def _features(self, note: Note, image: ImageTokens | None) -> MllmFeatures:
        prompt = self._prompts[image is not None]
        texts = fit_texts(self._slot_texts(note), prompt.text_budget)
        ids: list[int] = []
        types: dict[str, list[int]] = {name: [] for name in self._types}
        for part in prompt.parts:
            shown = image if part is Slot.IMAGE else None
            added = shown.ids if shown else texts[part] if isinstance(part, Slot) else part
            ids += added
            for name, values in types.items():
                values += shown.types[name] if shown else [0] * len(added)
        rows = {name: np.array(values, np.int64) for name, values in {"input_ids": ids, **types}.items()}
        return MllmFeatures(note.note_id, rows, {} if image is None else image.vision, len(ids))

    def _collated(self, features: Sequence[MllmFeatures]) -> MllmBatch:
        lengths = np.array([item.num_tokens for item in features], np.int64)
        # Padding is masked, so any token would do that is not an image's.
        shape = (len(features), int(lengths.max(initial=0)))
        rows = {name: np.zeros(shape, np.int64) for name in self._blank.rows}
        for row, item in enumerate(features):
            for name, values in item.rows.items():
                rows[name][row, : lengths[row]] = values
        rows["attention_mask"] = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        images = [item.vision for item in features if item.vision]
        return MllmBatch(
            {name: torch.from_numpy(values) for name, values in rows.items()},
            torch.from_numpy(np.maximum(lengths - 1, 0)),
            {name: joined_images([image[name] for image in images]) for name in (images[0] if images else ())},
        )

    def _slot_texts(self, note: Note) -> dict[Slot, list[int]]:
        if self.options.prompt == "chat":
            texts = {Slot.CONTENT: "\n".join(text for text in cut_texts(note, self.settings).values() if text)}
        else:
            texts = shown_texts(note, self.settings)
        return {slot: self._continued(self._chat.encode, text) for slot, text in texts.items()}

    def _prompt(self, with_image: bool) -> _Prompt:
        parts = self._chat_parts(with_image) if self.options.prompt == "chat" else self._compression_parts(with_image)
        taken = sum(1 if part is Slot.IMAGE else 0 if isinstance(part, Slot) else len(part) for part in parts[:-1])
        budget = text_budget(self.settings, taken)
        fixed = sum(len(part) for part in parts if not isinstance(part, Slot))
        return _Prompt(tuple(parts), budget, fixed + budget)

    def _compression_parts(self, with_image: bool) -> list[Slot | list[int]]:
        words = note_prompt("basic" if with_image else "text", self.settings.prompt_language)
        return self._encoded_parts([self._image_token if part is Slot.IMAGE else part for part in words])

    def _chat_parts(self, with_image: bool) -> list[Slot | list[int]]:
        """The instruction as system message, then image and text as the user's turn, up to where the answer begins."""
        words, instruction = self._chat.template, self.options.instruction or INSTRUCTION
        if words.before_system is None:
            before = f"{words.before}{instruction}\n\n"
        else:
            before = words.before_system + instruction + words.after_system
        if with_image:
            before += words.image.replace(self._images.words or words.image, self._image_token)
        return self._encoded_parts([before, Slot.CONTENT, words.after])

    def _encoded_parts(self, parts: Iterable[str | Slot]) -> list[Slot | list[int]]:
        """A prompt's words as token ids. The image's token becomes a slot."""
        tokenizer, image_id = self._chat.tokenizer, self._images.image_id
        encoded: list[Slot | list[int]] = []
        for part in joined(parts):
            if isinstance(part, Slot):
                encoded.append(part)
                continue
            ids = self._continued(self._literal, part) if encoded else self._literal(part)
            if not encoded and ids[:1] not in ([i] for i in tokenizer.all_special_ids if i != image_id):
                ids = leading_ids(tokenizer) + ids  # a chat template begins with its own
            while image_id in ids:
                place = ids.index(image_id)
                encoded += [ids[:place], Slot.IMAGE]
                ids = ids[place + 1 :]
            encoded.append(ids)
        return encoded

    def _literal(self, text: str) -> list[int]:
        return self._chat.tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids

    def _continued(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        """Token ids of a text inside of a prompt: without the space that Llama's tokenizer puts before a text."""
        ids = encode(_ANCHOR + text)
        return ids[len(self._anchor) :] if ids[: len(self._anchor)] == self._anchor else encode(text)


def make_preprocessor(settings: ModelSettings, processor: Any, config: PretrainedConfig) -> MllmPreprocessor:
    """The preprocessor that goes with a multimodal LLM.

    Raises:
        ModelError: the longest prompts are longer than the LLM supports.
    """
    preprocessor = MllmPreprocessor(settings, processor)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and (longest := preprocessor.max_tokens()) > limit:
        raise ModelError(
            f"the longest prompts take {longest} tokens, but the LLM supports {limit}: lower "
            f"model.options.max_image_pixels ({preprocessor.options.max_image_pixels:,}) or model.max_body_tokens "
            f"({settings.max_body_tokens})"
        )
    return preprocessor
