"""The steps around the engine that describes images: read, decode, ask, ask again, keep the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.images import scaled_image
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import SummarySettings
from notellm2_ray.core.thoughts import without_thought
from notellm2_ray.infer.answers import is_repetitive, one_paragraph
from notellm2_ray.infer.chunks import Chunk, read_chunk

if TYPE_CHECKING:
    from PIL import Image

ERROR = "__inference_error__"  # Ray's column: a row with an error bypasses the engine
ASKED = "asked"  # column: how often the model was asked
NO_IMAGE = "the note has no image"
_RETRY_TEMPERATURE = 0.7  # greedy decoding would repeat the bad answer

IMAGE_ROWS = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("image", pa.binary()),  # RGB, row by row
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("error", pa.string(), nullable=False),  # why it cannot be described; empty: it can
    ]
)


class Pixels(NamedTuple):
    """An image of three bytes a pixel, row by row; one of Pillow's once it is unpickled.

    Readers decode images and scale them down, several at a time. The engine's front end takes one at a time.
    """

    data: bytes
    width: int
    height: int

    def __reduce__(self) -> tuple[Callable[[bytes, int, int], Image.Image], tuple[bytes, int, int]]:
        return _picture, (self.data, self.width, self.height)


def _picture(data: bytes, width: int, height: int) -> Image.Image:
    from PIL import Image

    return Image.frombytes("RGB", (width, height), data)


class ImageReader:
    """Turns chunks of a notes table into rows of images; for ``map_batches`` over Arrow batches of chunks.

    Args:
        only: ids of the notes to read.
        versions: by file, kept beside each summary.
        max_pixels: a larger image is scaled down to this area.
    """

    def __init__(self, only: frozenset[str], versions: dict[str, str], max_pixels: int) -> None:
        self.only, self.versions, self.max_pixels = only, versions, max_pixels

    def __call__(self, chunks: pa.Table) -> pa.Table:
        rows = []
        for row in chunks.to_pylist():
            chunk = Chunk(**row)
            for note in read_chunk(chunk, self.only):
                (image, width, height), error = pixels_of(note.image, self.max_pixels)
                about = {"note_id": note.note_id, "version": self.versions[chunk.file], "error": error}
                rows.append({**about, "image": image or None, "width": width, "height": height})
        return pa.Table.from_pylist(rows, schema=IMAGE_ROWS)


def pixels_of(image: bytes | None, max_pixels: int) -> tuple[Pixels, str]:
    """An image of at most ``max_pixels``, or an empty one and the reason why it is unusable."""
    if image is None:
        return Pixels(b"", 0, 0), NO_IMAGE
    try:
        picture = scaled_image(image, max_pixels)
    except DataError as error:
        return Pixels(b"", 0, 0), f"image {error}"
    return Pixels(picture.tobytes(), *picture.size), ""


class Asking(NamedTuple):
    """Turns a row into what Ray's engine stage reads; the prompt is the same for all images."""

    prompt: list[int]
    settings: SummarySettings
    stop_token_ids: list[int]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image = Pixels(bytes(row.pop("image") or b""), row.pop("width"), row.pop("height"))
        if row["error"]:
            return {ERROR: row["error"]}
        return {
            "tokenized_prompt": self.prompt,
            "multimodal_data": {"image": image},
            "sampling_params": self.sampling(row["note_id"], 0),
        }

    def again(self, row: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any] | None:
        """The row to ask for once more if its first answer is unusable, else None."""
        text, tokens = answer.get("generated_text") or "", answer.get("num_generated_tokens") or 0
        if not answer[ERROR] and not problem_of(cleaned(text), tokens >= self.settings.max_tokens, self.settings):
            return None
        return {**row, "sampling_params": self.sampling(row["note_id"], 1)}

    def sampling(self, note_id: str, attempt: int) -> dict[str, Any]:
        """Arguments of ``vllm.SamplingParams``; ``attempt`` is 0, or 1 for the second and last."""
        temperature = self.settings.temperature or (_RETRY_TEMPERATURE if attempt else 0.0)
        sampling: dict[str, Any] = {
            "max_tokens": self.settings.max_tokens,
            "temperature": temperature,
            "stop_token_ids": self.stop_token_ids,
        }
        if temperature:
            sampling["seed"] = stream_seed(0, "summary", note_id, attempt)
        return sampling


def cleaned(text: str) -> str:
    """An answer without a thought, on one line."""
    return one_paragraph(without_thought(text))


def problem_of(text: str, cut: bool, settings: SummarySettings) -> str:
    """Why a cleaned answer is unusable; empty: it is usable. ``cut``: it reached the token limit."""
    if len(text) < max(1, settings.min_characters):
        return f"the model's answer had only {len(text)} character(s), twice (summaries.min_characters)"
    if cut and is_repetitive(text):
        return "the model's answer repeated itself until it was cut off, twice (summaries.max_tokens)"
    return ""


def answer(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that are kept of an answered row."""
    return {
        "note_id": row["note_id"],
        "version": row["version"],
        "summary": row["generated_text"],
        "prompt_tokens": row["num_input_tokens"],
        "generated_tokens": row["num_generated_tokens"],
        ASKED: row[ASKED],
    }
