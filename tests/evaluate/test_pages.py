"""Thumbnails inside the report's pages."""

from notellm2_ray.evaluate.pages import thumbnail
from tests.support.report_pages import picture


def test_thumbnails_are_small_jpegs():
    uri, why = thumbnail(picture("RGBA"))
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 4000
    assert why == ""
