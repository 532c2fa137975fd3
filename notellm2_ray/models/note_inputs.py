"""Notes from the inputs that sentence-transformers takes: texts, images, dictionaries, chat messages."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import Note

if TYPE_CHECKING:
    from PIL import Image

_KEYS = {"note_id", "title", "topics", "content", "text", "image"}
_UNNAMED = "without an id"


def as_note(given: Any, *, reads_text: bool = True) -> Note:
    """A note of one input.

    Args:
        given: one of

            - a :class:`Note`;
            - a dictionary of its fields, of which each may be missing; ``text`` is another name of ``content``, topics
              may also be one text, as in ``a|b``, and an image is anything that :func:`image_bytes` reads;
            - a text: the content of a note, unless it names an image as sentence-transformers understands it (a data
              URI, the path of an image file that exists, an address that ends like an image);
            - a picture or an array, as in :func:`image_bytes`: the image of a note without text;
            - a chat message, or a list of them, with ``role`` and ``content``: their texts in lines, and their image.
        reads_text: whether the model reads texts; for others a text is an error.

    Raises:
        DataError: the input is none of these.
    """
    if isinstance(given, Note):
        return given
    if isinstance(given, str):
        return _of_string(given, reads_text)
    if isinstance(given, Mapping) and "role" in given:
        return _of_messages([given])
    if isinstance(given, list) and given and all(isinstance(one, Mapping) and "role" in one for one in given):
        return _of_messages(given)
    if isinstance(given, Mapping):
        return _of_fields(given)
    if given is None or isinstance(given, (list, tuple)):
        raise DataError(
            f"a {type(given).__name__} is no note: give a list of texts, images, dictionaries or notes "
            "(a single note goes into a list too)"
        )
    return Note(_UNNAMED, image=image_bytes(given))


def image_bytes(given: Any) -> bytes | None:
    """An encoded image.

    Args:
        given: None, encoded bytes, a ``PIL.Image``, a path, a data URI, Hugging Face's ``{"bytes", "path"}``, or an
            array or tensor of uint8 colours, (H, W, 3) or (3, H, W). Nothing is fetched from the network.

    Raises:
        DataError: it is none of these, or a file that cannot be read.
    """
    if given is None or isinstance(given, bytes):
        return given
    if isinstance(given, (bytearray, memoryview)):
        return bytes(given)
    if isinstance(given, Mapping) and given.keys() <= {"bytes", "path"}:
        return image_bytes(given.get("bytes") or given.get("path"))
    if isinstance(given, (str, Path)):
        return _read(str(given))
    if hasattr(given, "getexif"):
        return _encoded(given)
    if hasattr(given, "__array__"):
        return _encoded(_picture(np.asarray(given)))
    raise DataError(f"a {type(given).__name__} is no image: give bytes, a PIL image, a path or an array of colours")


def _of_string(given: str, reads_text: bool) -> Note:
    from sentence_transformers.base.modality import is_image_url_or_path

    if is_image_url_or_path(given):
        return Note(_UNNAMED, image=_read(given))
    if not reads_text:
        raise DataError(f"this model sees images only, and {given[:40]!r} is a text or a file that does not exist")
    return Note(_UNNAMED, content=given)


def _of_fields(given: Mapping[str, Any]) -> Note:
    if unknown := sorted(str(key) for key in given.keys() - _KEYS):
        raise DataError(f"a note has no {', '.join(unknown)}: its keys are {', '.join(sorted(_KEYS))}")
    if given.get("text") is not None and given.get("content") is not None:
        raise DataError("a note has both text and content, which are two names of one thing")
    for name in ("title", "content", "text"):
        if not isinstance(text := given.get(name) or "", str):
            raise DataError(f"{name} is {text!r}, and has to be a text")
    topics = given.get("topics") or ()
    return Note(
        str(given.get("note_id", _UNNAMED)),
        given.get("title") or "",
        tuple(topics.split("|") if isinstance(topics, str) else topics),
        given.get("content") or given.get("text") or "",
        image_bytes(given.get("image")),
    )


def _of_messages(messages: Sequence[Mapping[str, Any]]) -> Note:
    parts = [part for message in messages for part in _message_parts(message.get("content"))]
    images = [image for kind, image in parts if kind == "image"]
    if len(images) > 1:
        raise DataError(f"a note has one image, and these messages have {len(images)}")
    content = "\n".join(text for kind, text in parts if kind == "text")
    return Note(_UNNAMED, content=content, image=image_bytes(images[0]) if images else None)


def _message_parts(content: Any) -> Iterator[tuple[str, Any]]:
    """("text", text) and ("image", image) of a message's content."""
    if isinstance(content, str):
        yield "text", content
        return
    for part in content or ():
        kind = part.get("type")
        if kind not in ("text", "image") or kind not in part:
            raise DataError(f"a part of a message is a text or an image, not {kind!r}")
        yield kind, part[kind]


def _read(place: str) -> bytes:
    """The file of a path, or what a data URI holds."""
    if place.startswith(("http://", "https://")):
        raise DataError(f"{place}: images are not fetched from the network: load it, and give its bytes or a PIL image")
    try:
        if place.startswith("data:"):
            return base64.b64decode(place.partition(",")[2], validate=True)
        return Path(place).read_bytes()
    except (OSError, ValueError, binascii.Error) as error:
        raise DataError(f"the image {place[:80]!r} cannot be read: {error}") from error


def _picture(colours: np.ndarray) -> Image.Image:
    from PIL import Image

    if colours.ndim == 3 and colours.shape[2] != 3 and colours.shape[0] == 3:
        colours = colours.transpose(1, 2, 0)
    if colours.ndim != 3 or colours.shape[2] != 3 or colours.dtype != np.uint8:
        raise DataError(
            f"an image of shape {colours.shape} and type {colours.dtype} cannot be used: (H, W, 3) or (3, H, W) of "
            "uint8 is needed"
        )
    return Image.fromarray(np.ascontiguousarray(colours))


def _encoded(picture: Image.Image) -> bytes:
    """A lossless PNG, with the picture's orientation."""
    exif = picture.getexif()  # a converted picture has none
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):  # those that PNG has
        picture = picture.convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1, exif=exif)
    return buffer.getvalue()
