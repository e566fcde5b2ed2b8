"""The errors deepen-ext raises on purpose."""

from __future__ import annotations


class DeepenError(Exception):
    """Base class of every error deepen-ext raises on purpose."""


class InputError(DeepenError, ValueError):
    """The caller's input is wrong; the message says what to do. Exit code 2 on the command line."""


class ModelError(DeepenError, RuntimeError):
    """A model, tokenizer or file cannot be used. Exit code 1 on the command line."""
