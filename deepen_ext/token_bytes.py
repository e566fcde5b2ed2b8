"""What a tokenizer's parts say about its tokens' bytes: the family, each token's bytes, a byte-exact encoder.

Two families are read, both over BPE: byte-level (GPT-2's byte alphabet: GPT, Llama 3, Qwen, SmolLM) and
SentencePiece-like (`▁` for a space, `<0xNN>` for bytes outside the vocabulary: Llama 2, Mistral, Gemma).
Everything else is refused: WordPiece and Unigram lose bytes or choose tokens by a rule that `cuts.py` cannot
reason about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from deepen_ext.errors import ModelError

SPACE_MARK = "▁"
Kind = Literal["byte_level", "sentencepiece"]


def _gpt2_alphabet() -> dict[int, str]:
    """GPT-2's byte -> character table: printable Latin-1 stands for itself, the rest starts at U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


BYTE_TO_CHAR = _gpt2_alphabet()
# Latin-1 characters outside the alphabet go to U+FFFF, which Latin-1 cannot encode: such a token has no byte
# form.
_CHAR_TO_BYTE = dict.fromkeys(range(256), "\uffff") | {
    ord(char): chr(byte) for byte, char in BYTE_TO_CHAR.items()
}

# Bytes a tokenizer may be without (SmolLM2 lacks 21): control characters other than tab and line ends, and
# the first bytes of unassigned planes (F1, F2) and of nothing at all in UTF-8. The tokenizer drops them
# without a word.
_RARE_BYTES = frozenset(
    {*range(0x20), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - {0x09, 0x0A, 0x0D}
)


def _parts(component: Any, children: str) -> list[dict[str, Any]]:
    """A tokenizer component (or None) as a flat list of its settings, `Sequence` opened up."""
    if component is None:
        return []
    state = component.__getstate__()
    parts: list[dict[str, Any]] = []
    pending = [json.loads(state)]
    while pending:
        part = pending.pop(0)
        if part["type"] == "Sequence":
            pending = [*part[children], *pending]
        else:
            parts.append(part)
    return parts


@dataclass(frozen=True)
class Encoder:
    """A private, byte-exact view of a Hugging Face fast tokenizer: same model and added tokens, no copy of
    either.

    It differs from the original in three ways, all needed to carry bytes exactly: no Unicode NFC step
    (transformers adds one to every Qwen 2 tokenizer), no dummy space before the text (`Vocabulary` puts it
    there itself, and only there), and no padding, truncation or special tokens around the text.
    """

    kind: Kind
    view: Tokenizer
    dummy_prefix: bool  # a space is put before every text that does not begin with an added token
    normalizer_parts: list[dict[str, Any]]  # as they are in the view
    pre_tokenizer_parts: list[dict[str, Any]]
    added: dict[int, AddedToken]
    special_ids: frozenset[int]
    byte_ids: tuple[int | None, ...]  # the token of each of the 256 bytes
    lost_bytes: frozenset[int]  # those without one, which the tokenizer drops from text

    @property
    def ignores_merges(self) -> bool:
        """Whether a word that is a token is taken as it is, whatever the merges would give (Llama 3)."""
        return bool(self.view.model.ignore_merges)

    def token_bytes(self, vocab_size: int) -> list[bytes | None]:
        """Each token's bytes by id, length `vocab_size`; None for special tokens and unknown ids."""
        to_bytes = _byte_level_bytes if self.kind == "byte_level" else _sentencepiece_bytes
        # One id at a time: `get_vocab` would build a dictionary of 40 MB for Gemma.
        known = self.view.get_vocab_size(with_added_tokens=True)
        tokens: list[bytes | None] = [None] * vocab_size
        for token_id in range(min(known, vocab_size)):
            if token_id in self.special_ids:
                continue
            token = self.view.id_to_token(token_id)
            if token is None:
                continue
            if self.kind == "byte_level" and token_id in self.added:
                tokens[token_id] = token.encode()
            else:
                tokens[token_id] = to_bytes(token)
        return tokens

    def token_texts(self) -> Iterator[str]:
        """Every token as text, special ones included (SentencePiece only)."""
        known = self.view.get_vocab_size(with_added_tokens=True)
        names = (self.view.id_to_token(token_id) for token_id in range(known))
        return (name.replace(SPACE_MARK, " ") for name in names if name is not None)


def _byte_level_bytes(token: str) -> bytes | None:
    try:
        return token.translate(_CHAR_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return None  # outside the byte alphabet: no text can produce it


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(SPACE_MARK, " ").encode()


def build_encoder(tokenizer: Any, name: str) -> Encoder:
    """Read a transformers fast tokenizer or a `tokenizers.Tokenizer`; ModelError for another family."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(f"{name}: not a fast tokenizer; save the model with a tokenizer.json and load that")
    model = backend.model
    if not isinstance(model, BPE):
        raise ModelError(
            f"{name}: {type(model).__name__} tokenizers cannot carry text byte for byte; "
            "use a model with a byte-level BPE or a SentencePiece BPE tokenizer"
        )
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        raise ModelError(f"{name}: BPE with dropout or with subword prefixes or suffixes is not supported")

    kind = _family(backend, name)
    view = Tokenizer(model)
    added = dict(sorted(backend.get_added_tokens_decoder().items()))
    view.add_tokens(list(added.values()))
    view.encode_special_tokens = backend.encode_special_tokens
    if any(view.id_to_token(i) != token.content for i, token in added.items()):
        raise ModelError(
            f"{name}: its added tokens have ids that do not follow its vocabulary; its files are damaged"
        )
    normalizer_dummy = _set_normalizer(view, backend, kind)
    pre_tokenizer_dummy = _set_pre_tokenizer(view, backend)

    names = BYTE_TO_CHAR if kind == "byte_level" else {byte: f"<0x{byte:02X}>" for byte in range(256)}
    byte_ids = [view.token_to_id(names[byte]) for byte in range(256)]
    lost = frozenset(byte for byte, byte_id in enumerate(byte_ids) if byte_id is None)
    if not lost <= (_RARE_BYTES if kind == "byte_level" else frozenset()):
        missing = ", ".join(f"0x{byte:02X}" for byte in sorted(lost - _RARE_BYTES) or sorted(lost))
        raise ModelError(
            f"{name}: its vocabulary has no token for the bytes {missing}, so it would lose text"
        )
    special = {i for i, token in added.items() if token.special}
    if backend is not tokenizer:
        special |= set(tokenizer.all_special_ids)
    return Encoder(
        kind=kind,
        view=view,
        dummy_prefix=normalizer_dummy or pre_tokenizer_dummy,
        normalizer_parts=_parts(view.normalizer, "normalizers"),
        pre_tokenizer_parts=_parts(view.pre_tokenizer, "pretokenizers"),
        added=added,
        special_ids=frozenset(special),
        byte_ids=tuple(byte_ids),
        lost_bytes=lost,
    )


def _family(backend: Tokenizer, name: str) -> Kind:
    decoders = _parts(backend.decoder, "decoders")
    splitters = _parts(backend.pre_tokenizer, "pretokenizers")
    if any(part["type"] == "ByteLevel" for part in splitters):
        return "byte_level"
    marks = any(
        part["type"] == "Metaspace"
        or (
            part["type"] == "Replace" and part["pattern"] == {"String": SPACE_MARK} and part["content"] == " "
        )
        for part in decoders
    )
    if marks and backend.model.byte_fallback:
        return "sentencepiece"
    raise ModelError(
        f"{name}: neither a byte-level BPE nor a SentencePiece BPE tokenizer with byte fallback, "
        "so text would not survive it byte for byte; use a model with one of these"
    )


def _set_normalizer(view: Tokenizer, backend: Tokenizer, kind: Kind) -> bool:
    """Give the view the original's normalizer less NFC and dummy prefix; True if there was such a prefix.

    A normalizer with any other step is kept whole: if it changes text, the round trip that follows refuses
    it.
    """
    parts = _parts(backend.normalizer, "normalizers")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    dummy = {"type": "Prepend", "prepend": SPACE_MARK}
    if any(part not in (spaces, dummy, {"type": "NFC"}) for part in parts):
        view.normalizer = backend.normalizer
        return False
    if spaces in parts and kind == "sentencepiece":
        view.normalizer = normalizers.Replace(" ", SPACE_MARK)
    return dummy in parts


def _set_pre_tokenizer(view: Tokenizer, backend: Tokenizer) -> bool:
    """Give the view the original's pre-tokenizer without its dummy prefix; True if there was one."""
    original = backend.pre_tokenizer
    parts = _parts(original, "pretokenizers")
    if original is None:
        return False
    if len(parts) == 1 and parts[0]["type"] == "Metaspace" and parts[0]["replacement"] == SPACE_MARK:
        view.pre_tokenizer = pre_tokenizers.Metaspace(
            SPACE_MARK, prepend_scheme="never", split=parts[0]["split"]
        )
        return bool(parts[0]["prepend_scheme"] != "never")
    if len(parts) == 1 and parts[0]["type"] == "ByteLevel":
        view.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=parts[0]["use_regex"])
        return bool(parts[0]["add_prefix_space"])
    view.pre_tokenizer = original
    return False
