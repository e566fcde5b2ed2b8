"""Keeping transformers' own progress bars and notes away from the terminal while a model loads."""

from __future__ import annotations

import logging as _standard
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as _logging

logging: Any = _logging  # its setters carry no types


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors from transformers inside; the settings before come back afterwards."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def loading_notes() -> Iterator[list[str]]:
    """What transformers notes while it loads weights: kept in a list, shown nowhere."""
    notes: list[str] = []

    def keep(record: _standard.LogRecord) -> bool:
        notes.append(record.getMessage())
        return False

    logger = _standard.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(_standard.WARNING)
    logger.addFilter(keep)
    try:
        yield notes
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)
