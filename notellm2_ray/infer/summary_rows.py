"""The steps around the engine that describes images: read, check, pass on encoded, ask, keep the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.images import check_image, scaled_image
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import SummarySettings
from notellm2_ray.infer.chunks import Chunk, read_chunk

if TYPE_CHECKING:
    from PIL import Image

ERROR = "__inference_error__"  # Ray's column: a row with an error bypasses the engine
NO_IMAGE = "the note has no image"
_RETRY_TEMPERATURE = 0.7  # greedy decoding would repeat the bad answer

IMAGE_ROWS = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("image", pa.binary()),  # encoded
        pa.field("error", pa.string(), nullable=False),  # why it cannot be described; empty: it can
    ]
)


class EncodedImage:
    """An image that travels as encoded bytes and is unpickled as the decoded picture.

    Pixels take ten times the memory of a JPEG. This way they exist only in the engine's process, for the batches that
    it is working on.

    Args:
        data: an image that passed :func:`~notellm2_ray.core.images.check_image`.
        max_pixels: a larger image is scaled down to this area.
    """

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self.data, self.max_pixels = data, max_pixels

    def __reduce__(self) -> tuple[Callable[[bytes, int], Image.Image], tuple[bytes, int]]:
        return scaled_image, (self.data, self.max_pixels)


class ImageReader:
    """Turns chunks of a notes table into rows of checked images; for ``map_batches`` over Arrow batches of chunks.

    Args:
        only: ids of the notes to read.
        versions: by file, kept beside each summary.
    """

    def __init__(self, only: frozenset[str], versions: dict[str, str]) -> None:
        self.only, self.versions = only, versions

    def __call__(self, chunks: pa.Table) -> pa.Table:
        rows = []
        for row in chunks.to_pylist():
            chunk = Chunk(**row)
            for note in read_chunk(chunk, self.only):
                image, error = checked(note.image)
                version = self.versions[chunk.file]
                rows.append({"note_id": note.note_id, "version": version, "image": image, "error": error})
        return pa.Table.from_pylist(rows, schema=IMAGE_ROWS)


def checked(image: bytes | None) -> tuple[bytes | None, str]:
    """The image, or None and the reason why it is unusable."""
    if image is None:
        return None, NO_IMAGE
    try:
        check_image(image, max_pixels=None, max_bytes=None)  # prepare has checked its size
    except DataError as error:
        return None, f"image {error}"
    return image, ""


class Asking(NamedTuple):
    """Turns a row into what Ray's engine stage reads; the prompt is the same for all images."""

    prompt: list[int]
    settings: SummarySettings
    stop_token_ids: list[int]
    attempt: int  # 0, or 1 for the second and last

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image = row.pop("image")
        if row["error"]:
            return {ERROR: row["error"]}
        temperature = self.settings.temperature or (_RETRY_TEMPERATURE if self.attempt else 0.0)
        sampling: dict[str, Any] = {
            "max_tokens": self.settings.max_tokens,
            "temperature": temperature,
            "stop_token_ids": self.stop_token_ids,
        }
        if temperature:
            sampling["seed"] = stream_seed(0, "summary", row["note_id"], self.attempt)
        return {
            "tokenized_prompt": self.prompt,
            "multimodal_data": {"image": EncodedImage(bytes(image), self.settings.max_image_pixels)},
            "sampling_params": sampling,
        }


def answer(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that are kept of an answered row."""
    return {
        "note_id": row["note_id"],
        "version": row["version"],
        "summary": row["generated_text"],
        "prompt_tokens": row["num_input_tokens"],
        "generated_tokens": row["num_generated_tokens"],
    }
