"""Bytes and characters: whole characters of bytes, of a stream of bytes, and texts that have no bytes."""

from __future__ import annotations

import codecs

from deepen_ext.errors import InputError


def check_characters(text: str) -> None:
    """Raise InputError for a text with lone surrogates, which has no bytes in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has a lone surrogate at character {error.start}, which is not a character; "
            "decode it as UTF-8 first"
        ) from error


def whole_characters(data: bytes) -> str:
    """The longest prefix of the bytes that is valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


class Utf8Stream:
    """Whole characters from the bytes of one token after another.

    Invalid bytes become U+FFFD, as in `bytes.decode(errors="replace")`.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def copy(self) -> Utf8Stream:
        """The same stream, to go on in another way."""
        twin = Utf8Stream()
        twin._decoder.setstate(self._decoder.getstate())
        return twin

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes; "" while a character is unfinished."""
        return self._decoder.decode(data)

    @property
    def pending(self) -> bool:
        """Whether an unfinished character waits for its other bytes."""
        return bool(self.unfinished)

    @property
    def unfinished(self) -> bytes:
        """The bytes that there are of an unfinished character; b"" where all are whole."""
        return self._decoder.getstate()[0]

    def finish(self) -> str:
        """The stream has ended: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
