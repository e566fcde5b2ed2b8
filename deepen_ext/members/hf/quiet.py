"""Keeping the progress bars and notes of transformers and accelerate away while a model loads."""

from __future__ import annotations

import io
import logging as _standard
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from transformers.utils import logging as _logging

logging: Any = _logging  # its setters carry no types

# Where torchao is installed, transformers imports it with every model, and it tells which of its CUDA kernels
# do not fit this machine.
_OTHERS = ("accelerate", "torchao", "torchao.kernel.intmm", "torch.utils._pytree")


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors from these packages inside; the settings before come back afterwards."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    others = [_standard.getLogger(name) for name in _OTHERS]
    levels = [one.level for one in others]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for one in others:
        one.setLevel(_standard.ERROR)
    try:
        yield
    finally:
        for one, its_level in zip(others, levels, strict=True):
            one.setLevel(its_level)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def no_bars() -> redirect_stderr[io.StringIO]:
    """For packages whose progress bars know no switch: what they write to the terminal is dropped."""
    return redirect_stderr(io.StringIO())


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
