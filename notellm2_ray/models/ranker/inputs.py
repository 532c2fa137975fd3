"""The ranker's input for a user and a candidate: prompt, budgets, pixels, labels, padding. No weights are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.images import scaled_image
from notellm2_ray.core.recommend_prompts import ranker_prompt
from notellm2_ray.core.settings.ranking import PromptLanguage, RankerSettings
from notellm2_ray.models.chat import ChatTokenizer
from notellm2_ray.models.chat_images import process_image
from notellm2_ray.models.image_frames import ImageFrame
from notellm2_ray.models.image_inputs import joined_images

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORED = -100  # the label of tokens that do not count in the loss


class Question(NamedTuple):
    """One candidate for one user."""

    title: str
    image: bytes | None = None  # encoded; None: the note has no image
    preference: str | None = None  # None: the user has no history
    history_titles: tuple[str, ...] = ()  # oldest first


class RankerFeatures(NamedTuple):
    """One question, ready to be put into a batch."""

    input_ids: np.ndarray  # (T,) int64, with the tokens that an image becomes
    labels: np.ndarray  # (T,) int64, IGNORED for tokens that do not count in the loss
    last: int  # place of the token before the one that tells Yes from No
    vision: Mapping[str, torch.Tensor]  # inputs of the vision tower, (1 or more, ...) each; empty without an image


class RankerBatch(NamedTuple):
    """N questions, padded on the right to T tokens."""

    input_ids: torch.Tensor  # (N, T) int64
    attention_mask: torch.Tensor  # (N, T) int64, 0 on padding
    labels: torch.Tensor  # (N, T) int64
    is_image: torch.Tensor  # (N, T) int64, 1 on an image's tokens
    last: torch.Tensor  # (N,) int64, place of the token before the one that tells Yes from No
    vision: Mapping[str, torch.Tensor]  # of all images, in order

    def to(self, device: torch.device | str) -> RankerBatch:
        """The same batch on ``device``."""
        vision = {name: tensor.to(device, non_blocking=True) for name, tensor in self.vision.items()}
        ids, mask, labels, is_image, last = (tensor.to(device, non_blocking=True) for tensor in self[:5])
        return RankerBatch(ids, mask, labels, is_image, last, vision)


class RankerPrompter:
    """Turns questions into token ids, for tuning and scoring alike. Picklable; may be used from several threads."""

    def __init__(self, chat: ChatTokenizer, settings: RankerSettings, language: PromptLanguage = "en") -> None:
        """A prompter for one model.

        Raises:
            ModelError: the variant shows images and the model reads none.
        """
        if settings.variant != "tallrec" and chat.image_token_id is None:
            raise ModelError(
                f"ranker.model is a text-only model, but ranker.variant={settings.variant} shows images: choose an "
                "image-text model, or ranker.variant=tallrec"
            )
        self.chat, self.settings, self.language = chat, settings, language

    def prompt(self, question: Question, frames: Sequence[ImageFrame] | None = None) -> list[int]:
        """Token ids up to the place of the answer; an image is a single placeholder, or the frame that is given.

        Texts are cut to their budgets before they are put into the prompt, so that the question itself is never cut.
        """
        settings, chat = self.settings, self.chat
        preference = question.preference
        if preference is not None:
            preference = chat.truncate(preference, settings.max_preference_tokens)
        history = [self._title(title) for title in question.history_titles[-settings.max_history :]]
        parts = ranker_prompt(
            self.language,
            settings.variant,
            settings.layout,
            preference,
            history,
            self._title(question.title),
            question.image is not None,
        )
        return [*chat.prompt(parts, frames=frames), *chat.answers.common]

    def image(self, question: Question) -> Image | None:
        """The candidate's image as the model sees it; None if it has none, or if the variant shows none.

        Raises:
            DataError: the image cannot be decoded.
        """
        if question.image is None or self.settings.variant == "tallrec":
            return None
        return scaled_image(question.image, self.settings.max_image_pixels)

    def _title(self, title: str) -> str:
        return self.chat.truncate(title.strip(), self.settings.max_title_tokens)


class RankerPreprocessor:
    """Turns questions into features and features into batches, for a Hugging Face model.

    Picklable; not safe in several threads.

    Args:
        prompter: makes the prompts.
        processor: of the model; its tokenizer must be another object than the prompter's, which other threads may use.
        loss_on: which tokens get labels, ``answer`` or ``everything``.
    """

    def __init__(self, prompter: RankerPrompter, processor: Any, loss_on: str = "answer") -> None:
        self.prompter, self._processor, self._loss_on = prompter, processor, loss_on
        tokenizer = prompter.chat.tokenizer
        self._pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)

    def features(self, question: Question, label: bool | None = None) -> RankerFeatures:
        """One question's features.

        Args:
            label: the answer, which is appended with labels; None: the prompt alone.

        Raises:
            DataError: the image cannot be decoded.
        """
        chat = self.prompter.chat
        vision: dict[str, torch.Tensor] = {}
        frames: list[ImageFrame] = []
        image = self.prompter.image(question)
        if image is not None:
            frame, vision = process_image(chat, self._processor, image)
            frames.append(frame)
        ids = self.prompter.prompt(question, frames)
        answer = [] if label is None else chat.answer(label)[len(chat.answers.common) :]
        input_ids = np.array([*ids, *answer], np.int64)
        labels = np.full(len(input_ids), IGNORED)
        if label is not None:
            begin = 0 if self._loss_on == "everything" else len(ids)
            labels[begin:] = input_ids[begin:]
            # An image's tokens are the same whatever it shows, so there is nothing to learn from them.
            labels[input_ids == chat.image_token_id] = IGNORED
        return RankerFeatures(input_ids, labels, len(ids) - 1, vision)

    def blank(self) -> RankerFeatures:
        """A prompt with a small white image that does not count in the loss.

        If weights are sharded, a rank adds it to a batch without images, because the other ranks wait for this rank's
        shard of the vision tower.
        """
        from io import BytesIO

        from PIL import Image as Images

        file = BytesIO()
        Images.new("RGB", (56, 56), "white").save(file, "PNG")
        return self.features(Question("", file.getvalue()))

    def collate(self, features: Sequence[RankerFeatures]) -> RankerBatch:
        """A batch of features, in their order."""
        lengths = np.array([len(item.input_ids) for item in features])
        shape = (len(features), int(lengths.max()))
        ids, labels = np.full(shape, self._pad_id), np.full(shape, IGNORED)
        for row, item in enumerate(features):
            ids[row, : lengths[row]], labels[row, : lengths[row]] = item.input_ids, item.labels
        mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        is_image = ((ids == self.prompter.chat.image_token_id) & (mask == 1)).astype(np.int64)
        with_image = [item.vision for item in features if item.vision]
        names = with_image[0] if with_image else {}
        return RankerBatch(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            torch.from_numpy(labels),
            torch.from_numpy(is_image),
            torch.tensor([item.last for item in features]),
            {name: joined_images([vision[name] for vision in with_image]) for name in names},
        )
