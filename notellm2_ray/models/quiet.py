"""Silences Hugging Face's progress bars and loading reports; problems are raised as errors of this package instead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' warnings and progress bars; a context manager and a decorator."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
