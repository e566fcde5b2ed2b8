"""What a tokenizer's parts say about its tokens' bytes: the family, each token's bytes, a byte-exact encoder.

Two families are read, both over BPE: byte-level (GPT-2's byte alphabet: GPT, Llama 3, Qwen, SmolLM) and
SentencePiece-like (`▁` for a space, `<0xNN>` for bytes outside the vocabulary: Llama 2, Mistral, Gemma).
Everything else is refused: WordPiece and Unigram lose bytes or choose tokens by a rule that `cuts.py` cannot
reason about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from deepen_ext.errors import ModelError

SPACE_MARK = "▁"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
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

    It differs from the original in five ways, all needed to carry bytes exactly: no Unicode NFC step
    (transformers adds one to every Qwen 2 tokenizer), no dummy space before the text (`Vocabulary` puts it
    there itself, and only there), no padding, truncation or special tokens around the text, no added token
    of text that takes the spaces beside it along (Phi-3's `</s>`), and no special token that the model has no
    row for (Gemma 3's `<image_soft_token>` beside a model of text alone).
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
    id_bound: int  # the largest id and 1: more than the number of tokens where ids are left out (GPT-4o)
    unfit: dict[int, str]  # special tokens without a row: names by id; the view reads them as other text

    @property
    def ignores_merges(self) -> bool:
        """Whether a word that is a token is taken as it is, whatever the merges would give (Llama 3)."""
        return bool(self.view.model.ignore_merges)

    def token_bytes(self, vocab_size: int) -> list[bytes | None]:
        """Each token's bytes by id, length `vocab_size`; None for special tokens and unknown ids."""
        to_bytes = _byte_level_bytes if self.kind == "byte_level" else _sentencepiece_bytes
        # One id at a time: `get_vocab` would build a dictionary of 40 MB for Gemma.
        tokens: list[bytes | None] = [None] * vocab_size
        for token_id in range(min(self.id_bound, vocab_size)):
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
        names = (self.view.id_to_token(token_id) for token_id in range(self.id_bound))
        return (name.replace(SPACE_MARK, " ") for name in names if name is not None)


def _byte_level_bytes(token: str) -> bytes | None:
    try:
        return token.translate(_CHAR_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return None  # outside the byte alphabet: no text can produce it


def _sentencepiece_bytes(token: str) -> bytes:
    if _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(token[3:5])
    return token.replace(SPACE_MARK, " ").encode()


def build_encoder(tokenizer: Any, name: str, rows: int | None = None) -> Encoder:
    """Read a transformers fast tokenizer or a `tokenizers.Tokenizer`.

    Args:
        tokenizer: the original. It is neither changed nor copied.
        name: for messages.
        rows: of the model's logits; None: as many as the tokenizer needs.

    Raises:
        ModelError: another family; a token that text can give has an id beyond the rows.
    """
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
    every = dict(sorted(backend.get_added_tokens_decoder().items()))
    unfit = {
        i: token.content
        for i, token in every.items()
        if rows is not None and _is_left_out(i, token, model, rows)
    }
    added = {i: _kept_apart(token) for i, token in every.items() if i not in unfit}
    if rows is not None:
        _refuse_beyond(((i, token.content) for i, token in added.items()), rows, name)
    view.add_tokens(list(added.values()))
    view.encode_special_tokens = backend.encode_special_tokens
    if any(view.id_to_token(i) != token.content for i, token in added.items()):
        raise ModelError(
            f"{name}: its added tokens have ids that do not follow its vocabulary; its files are damaged"
        )
    normalizer_dummy = _set_normalizer(view, backend, kind)
    pre_tokenizer_dummy = _set_pre_tokenizer(view, backend)

    bound = _id_bound(view)
    if rows is not None:
        _refuse_beyond(((i, token) for i in range(rows, bound) if (token := view.id_to_token(i))), rows, name)
    byte_ids = [_byte_id(view, kind, byte) for byte in range(256)]
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
        id_bound=bound,
        unfit=unfit,
    )


def _is_left_out(token_id: int, token: AddedToken, model: BPE, rows: int) -> bool:
    """Whether the view does without a token: special, beyond the rows, and not a word of BPE's as well."""
    return token_id >= rows and token.special and model.token_to_id(token.content) is None


def _kept_apart(token: AddedToken) -> AddedToken:
    """The same token, which leaves the spaces beside it to the text if it is of text itself."""
    if token.special or not (token.lstrip or token.rstrip):
        return token
    return AddedToken(
        token.content, single_word=token.single_word, normalized=token.normalized, special=False
    )


def _id_bound(view: Tokenizer) -> int:
    """The largest id and 1."""
    count = int(view.get_vocab_size(with_added_tokens=True))
    # As many ids as tokens from 0 on: there is none beyond. Else the dictionary is worth its memory.
    if all(view.id_to_token(token_id) is not None for token_id in range(count)):
        return count
    return max(view.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _refuse_beyond(tokens: Iterable[tuple[int, str]], rows: int, name: str) -> None:
    """ModelError if there is a token, by id and name, beyond the rows."""
    beyond = [(token_id, token) for token_id, token in tokens if token_id >= rows]
    if beyond:
        token_id, token = beyond[0]
        raise ModelError(
            f"{name}: the tokenizer can give id {token_id} ({token!r}), but the model has only {rows} rows; "
            "the tokenizer belongs to another model, or tokens were added to it and not to the model "
            "(resize_token_embeddings adds the rows)"
        )


def _byte_id(view: Tokenizer, kind: Kind, byte: int) -> int | None:
    """The token of a byte. SentencePiece spells it `<0x09>`, or as the character itself (Gemma 1 and 2)."""
    if kind == "byte_level":
        return view.token_to_id(BYTE_TO_CHAR[byte])
    found = view.token_to_id(f"<0x{byte:02X}>")
    if found is None and byte < 0x80:
        found = view.token_to_id(SPACE_MARK if byte == 0x20 else chr(byte))
    return found


def without_padding(tokenizer: Any) -> Any:
    """The tokenizer; in place of a `tokenizers.Tokenizer` that pads or cuts, its like that does neither."""
    if not isinstance(tokenizer, Tokenizer) or (tokenizer.padding is None and tokenizer.truncation is None):
        return tokenizer
    plain = Tokenizer(tokenizer.model)
    plain.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    plain.encode_special_tokens = tokenizer.encode_special_tokens
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (component := getattr(tokenizer, part)) is not None:
            setattr(plain, part, component)
    return plain


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
