"""Lists and structs that were written into a CSV file or a text column, as JSON or as Python shows them.

Nothing is evaluated: the text is parsed as JSON, or by Python's own parser as constants.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import warnings
from typing import Any

_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_NEIGHBOURS = re.compile(r"""['"]\s+[urbURB]*['"]""")  # NumPy shows ['a' 'b'] without commas
# If a text holds several of these, the first of them separates its topics.
_SEPARATORS = ("|", ";", "；", "、", "，", ",", "\n", "\t")


def is_bracketed(text: str) -> bool:
    """Whether a text may be a written list or struct."""
    text = text.strip()
    return len(text) > 1 and _BRACKETS.get(text[0]) == text[-1]


def parse(text: str) -> Any:
    """The value of a JSON or Python constant; a Python tuple or set becomes a list, in the order of the text.

    Raises:
        ValueError: it is neither.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():  # of escapes in strings
            warnings.simplefilter("ignore")
            body = ast.parse(text.strip(), mode="eval").body
            if not isinstance(body, ast.List | ast.Tuple | ast.Set):
                return ast.literal_eval(body)
            values = [ast.literal_eval(part) for part in body.elts]
        return _numpy_strings(text, len(values)) or values
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("neither JSON nor a Python constant") from error


def _numpy_strings(text: str, count: int) -> list[Any]:
    """The strings in a list, if there are more than ``count``: Python would join those with no comma between them."""
    if not _NEIGHBOURS.search(text):
        return []
    tokens = tokenize.generate_tokens(io.StringIO(text.strip()).readline)
    strings = [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
    return strings if len(strings) > count else []


def split_topics(text: str, separator: str | None) -> list[Any]:
    """The topics in one string: the values of a written list, or else parts of the text.

    Lists are read as JSON, Python, NumPy (``['a' 'b']``), Spark (``[a, b]``) and PostgreSQL (``{a,b}``) write them.

    Args:
        separator: between the parts; None: the first of ``| ; ； 、 ， ,``, line break and tab that the text holds, or
            ``#`` if it begins with one and holds another; "": the text is one topic.
    """
    if is_bracketed(text):
        try:
            value = parse(text)
        except ValueError:
            value = None
        if isinstance(value, list):
            return value
        inside = text.strip()[1:-1]
        if value is None and len(parts := _split(inside, separator)) > 1:
            return [part.strip("'\" ") for part in parts]
    return _split(text, separator)


def _split(text: str, separator: str | None) -> list[str]:
    if separator is None:
        separator = next((one for one in _SEPARATORS if one in text), "")
        if not separator and text.lstrip().startswith("#") and text.count("#") > 1:
            separator = "#"
    return text.split(separator) if separator else [text]
