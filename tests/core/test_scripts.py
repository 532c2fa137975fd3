"""Scripts of texts."""

import pytest

from notellm2_ray.core.scripts import is_mostly_unspaced, script_of


@pytest.mark.parametrize(
    ("text", "script", "unspaced"),
    [
        ("red cats", "Latin", False),
        ("红色的猫", "Chinese", True),
        ("赤い猫が眠る", "Japanese", True),
        ("빨간 고양이", "Korean", False),
        ("красный кот", "Cyrillic", False),
        ("แมวสีแดง", "Thai", True),
        ("ແມວສີແດງ", "Lao", True),
        ("ឆ្មាពណ៌ក្រហម", "Khmer", True),
        ("ကြောင်နီ", "Burmese", True),
        ("my iPhone 很好", "Latin", False),
        ("猫!!!!!!!!!", "Chinese", True),  # letters decide, and punctuation does not
        ("!!! 123", "none", False),
        ("", "none", False),
    ],
)
def test_the_letters_of_a_text_tell_its_script(text, script, unspaced):
    assert script_of(text) == script
    assert is_mostly_unspaced(text) == unspaced
