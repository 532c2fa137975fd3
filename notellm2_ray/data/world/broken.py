"""Rows broken on purpose, in ways that also occur in the exports of real platforms."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def missing_id(row: Row) -> Row:
    """The note has no id."""
    return row | {"note_id": None}


def truncated_image(row: Row) -> Row:
    """The upload stopped half-way."""
    return row | {"image": row["image"][: len(row["image"]) // 2]}


def error_page(row: Row) -> Row:
    """The crawler stored the server's answer instead of the picture."""
    return row | {"image": b"<html><head><title>404 Not Found</title></head><body>nginx</body></html>"}


def huge_image(row: Row) -> Row:
    """A few bytes that declare 3.6 billion pixels."""
    return row | {"image": png_declaring(60_000, 60_000)}


def empty(row: Row) -> Row:
    """Neither text nor image."""
    return row | {"title": "", "topics": [], "content": "", "image": None}


NOTE_BREAKAGES: tuple[Callable[[Row], Row], ...] = (missing_id, truncated_image, error_page, huge_image, empty)


def png_declaring(width: int, height: int) -> bytes:
    """A well-formed PNG that declares ``width`` x ``height`` pixels and holds almost none of them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1024)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
