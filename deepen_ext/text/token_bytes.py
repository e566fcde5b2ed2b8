"""The bytes that a token's name stands for, in the two families of tokenizers that are read.

Byte-level BPE (GPT, Llama 3, Qwen, SmolLM) spells each byte as a character of GPT-2's alphabet.
SentencePiece-like BPE (Llama 2, Mistral, Gemma) spells a space as `▁`, and bytes outside its vocabulary as
`<0xNN>`.
"""

from __future__ import annotations

import re
from typing import Literal

from tokenizers import Tokenizer

SPACE_MARK = "▁"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
Kind = Literal["byte_level", "sentencepiece"]


def _gpt2_alphabet() -> dict[int, str]:
    """GPT-2's byte -> character table: printable Latin-1 stands for itself, the rest starts at U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


BYTE_TO_CHAR = _gpt2_alphabet()
# Latin-1 characters outside the alphabet go to U+FFFF, which Latin-1 cannot encode: such a token has no
# bytes.
_CHAR_TO_BYTE = dict.fromkeys(range(256), "\uffff") | {
    ord(char): chr(byte) for byte, char in BYTE_TO_CHAR.items()
}

# Bytes a byte-level tokenizer may be without (SmolLM2 lacks 21): control characters other than tab and line
# ends, and the first bytes of unassigned planes (F1, F2) and of nothing at all in UTF-8. The tokenizer drops
# them without a word.
RARE_BYTES = frozenset({*range(0x20), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - {0x09, 0x0A, 0x0D})


def bytes_of_name(kind: Kind, name: str) -> bytes | None:
    """The bytes of a token of BPE; None where no text can produce it."""
    if kind == "byte_level":
        try:
            return name.translate(_CHAR_TO_BYTE).encode("latin-1")
        except UnicodeEncodeError:
            return None  # outside the byte alphabet
    if _BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(name[3:5])
    return name.replace(SPACE_MARK, " ").encode()


def id_of_byte(tokenizer: Tokenizer, kind: Kind, byte: int) -> int | None:
    """The token of a byte. SentencePiece spells it `<0x09>`, or as the character itself (Gemma 1 and 2)."""
    if kind == "byte_level":
        return tokenizer.token_to_id(BYTE_TO_CHAR[byte])
    found = tokenizer.token_to_id(f"<0x{byte:02X}>")
    if found is None and byte < 0x80:
        found = tokenizer.token_to_id(SPACE_MARK if byte == 0x20 else chr(byte))
    return found
