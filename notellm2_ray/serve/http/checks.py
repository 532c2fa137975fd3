"""Checks of requests against the limits, and conversion of a request's notes into notes for the model."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from notellm2_ray.core import schema
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.image_formats import content_type
from notellm2_ray.core.images import check_image, decode_image
from notellm2_ray.core.settings.serve import LimitSettings
from notellm2_ray.serve.errors import InvalidError, OverloadedError, TookTooLongError, TooLargeError
from notellm2_ray.serve.http import schemas
from notellm2_ray.serve.http.fetch import ImageFetcher

IMAGES_IN_HAND = 64
PREPARE_SECONDS = 20.0


def check_count(values: Sequence[object], most: int, param: str) -> None:
    """Refuse a list longer than ``most``.

    Raises:
        TooLargeError: the list is longer.
    """
    if len(values) > most:
        raise TooLargeError(f"{param} has {len(values)} entries, the limit is {most}", param)


def check_ids(ids: Sequence[str | None], limits: LimitSettings, param: str) -> None:
    """Refuse ids that are too long or contain a NUL character.

    Raises:
        InvalidError: there is one.
    """
    for one in ids:
        if one is not None and (len(one) > limits.id_characters or "\0" in one):
            raise InvalidError(f"an id has at most {limits.id_characters} characters and no NUL", param)


def check_k(k: int, most: int) -> None:
    """Refuse a k larger than ``most``.

    Raises:
        InvalidError: k is larger.
    """
    if k > most:
        raise InvalidError(f"k is at most {most}", "k")


def check_text(text: str, most: int, param: str) -> None:
    """Refuse a text longer than ``most``.

    Raises:
        InvalidError: the text is longer.
    """
    if len(text) > most:
        raise InvalidError(f"{param} has at most {most} characters", param)


def note_problem(note: schemas.Note, limits: LimitSettings) -> str | None:
    """Why a note is refused, without looking at its image; None if it is not refused."""
    if len(note.note_id) > limits.id_characters or "\0" in note.note_id:
        return f"note_id has at most {limits.id_characters} characters and no NUL"
    if len(note.title) > limits.title_characters:
        return f"title has at most {limits.title_characters} characters"
    if len(note.content) > limits.content_characters:
        return f"content has at most {limits.content_characters} characters"
    if len(note.topics) > limits.topics:
        return f"at most {limits.topics} topics"
    if any(not topic or len(topic) > limits.topic_characters for topic in note.topics):
        return f"a topic has 1 to {limits.topic_characters} characters"
    if note.image is not None and len(note.image) > limits.image_bytes * 4 // 3 + 4:
        return f"image: more than {limits.image_bytes:,} bytes"
    return None


async def prepare_notes(
    notes: Sequence[schemas.Note], limits: LimitSettings, fetcher: ImageFetcher, images: Images
) -> tuple[list[schema.Note], dict[int, str]]:
    """Notes for the model, and the refused rows with their reasons.

    Raises:
        OverloadedError: too many images are in hand already.
        TookTooLongError: fetching and checking the images took too long.
    """
    with images.room_for(sum(note.image is not None or note.image_url is not None for note in notes)):
        try:
            async with asyncio.timeout(PREPARE_SECONDS):
                found = await asyncio.gather(
                    *(prepare_note(note, limits, fetcher, images) for note in notes), return_exceptions=True
                )
        except TimeoutError:
            raise TookTooLongError(f"the images took longer than {PREPARE_SECONDS:g} s: try again later") from None
    problems = {row: str(one) for row, one in enumerate(found) if isinstance(one, DataError)}
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, DataError):
            raise one
    return [one for one in found if isinstance(one, schema.Note)], problems


async def prepare_note(note: schemas.Note, limits: LimitSettings, fetcher: ImageFetcher, images: Images) -> schema.Note:
    """A note for the model; its image is decoded from base64 or fetched, then checked.

    Raises:
        DataError: the note or its image is refused; says why.
    """
    problem = note_problem(note, limits)
    if problem is not None:
        raise DataError(problem)
    image: bytes | None = None
    if note.image is not None:
        image = decode_base64(note.image)
    elif note.image_url is not None:
        image = await fetcher.fetch(note.image_url)
    if image is not None:
        await images.check(image)
    return schema.Note(note.note_id, note.title, tuple(note.topics), note.content, image)


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 image.

    Raises:
        DataError: it is not base64; data: URLs are not accepted.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError("image: not valid base64 (give it without the prefix data:...;base64,)") from None


class Images:
    """Checks images in threads, so that a large image does not delay other requests.

    Args:
        limits: of an image.
        threads: that decode images.
        most: images in hand at once; beyond it requests with images are refused.
    """

    def __init__(self, limits: LimitSettings, threads: int = 1, most: int = IMAGES_IN_HAND) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.limits, self.most, self.in_hand = limits, most, 0
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="images")

    @contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Count a request's images as in hand, before they are fetched. If there are no others, they are accepted.

        Raises:
            OverloadedError: too many images of other requests are in hand.
        """
        if count and self.in_hand and self.in_hand + count > self.most:
            raise OverloadedError(f"{self.in_hand} images are in hand already: try again soon")
        self.in_hand += count
        try:
            yield
        finally:
            self.in_hand -= count

    async def check(self, image: bytes) -> None:
        """Refuse an image that is too large or cannot be decoded.

        Raises:
            DataError: the image is refused; says why.
        """
        await asyncio.get_running_loop().run_in_executor(self.threads, self._check, image)

    async def for_browser(self, image: bytes) -> tuple[bytes, str]:
        """A stored image and its content type; one of a format that browsers do not show becomes a JPEG."""
        kind = content_type(image)
        if kind not in ("image/tiff", "image/heic"):
            return image, kind
        return await asyncio.get_running_loop().run_in_executor(self.threads, _as_jpeg, image), "image/jpeg"

    def _check(self, image: bytes) -> None:
        try:
            check_image(
                image,
                max_pixels=self.limits.image_pixels,
                max_bytes=self.limits.image_bytes,
                knobs=("serve.limits.image_pixels", "serve.limits.image_bytes"),
            )
        except DataError as error:
            raise DataError(f"image: {error}") from None


def _as_jpeg(image: bytes) -> bytes:
    file = io.BytesIO()
    decode_image(image).save(file, "JPEG", quality=90)
    return file.getvalue()
