"""The page's files, and the headers of their answers."""

from __future__ import annotations

from pathlib import Path

WEB = Path(__file__).parents[1] / "web"
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'; object-src 'none'; require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",  # like frame-ancestors, for old browsers
    "referrer-policy": "no-referrer",
}
