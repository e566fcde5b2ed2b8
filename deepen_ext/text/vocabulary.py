"""One tokenizer's vocabulary as bytes.

The members of an ensemble share text as bytes. The main model's tokens become bytes (`Vocabulary.bytes_of`),
the bytes become whole characters (`characters.Utf8Stream`), and these an assistant's tokens
(`growing_text.GrowingText`).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from deepen_ext.errors import InputError, ModelError
from deepen_ext.text.characters import check_characters
from deepen_ext.text.cuts import CutFinder
from deepen_ext.text.encoder import Encoder, build_encoder
from deepen_ext.text.token_bytes import SPACE_MARK, Kind
from deepen_ext.text.tokenizer_parts import without_padding

# Each breaks some tokenizer that changes text: lower-casing, accents, NFC, NFKC, stripped or folded
# whitespace.
PROBES = (
    "Hello world",
    "The QUICK brown Fox, isn't it?",
    "def f(x):\n\tif x >= 10:\n        return {'a': [x**2, -1.5e-3]}  # ok\n",
    " leading space",
    "  two leading and two trailing  ",
    "\n\n\n\t \t\n",
    "line\r\nline\rline\n",
    "a  b   c    d                                   e",
    "0 12 345 6789 3.14159 1,000,000 ²½",
    "naïve façade Ångström ﬁ ① Ⅳ ｆｕｌｌ",  # noqa: RUF001
    "e\u0301 n\u0303 a\u0308\u0323 \u1e0b\u0323 क्षि",
    "今天天气很好，我们去公园吧。日本語カナ 한국어",  # noqa: RUF001
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ 𝔘𝔫𝔦 \U0001f9ff",  # noqa: RUF001
    "\u00a0\u2003\u200b\u200d\ufeff\u2028",
    "a\u2581b\u2581",
    "ﷺ שָׁלוֹם مَرْحَبًا",
)


class Vocabulary:
    """One tokenizer, seen as bytes.

    Text is carried byte for byte. For this some tokenizers are changed, always on a private view:
    Unicode NFC (in transformers' Qwen 2) is left out, the dummy space that SentencePiece puts before a text
    stands before the text only, never after a special token, and a literal `▁`, which SentencePiece would
    turn into a space, is spelt in byte tokens. A text that begins with a space keeps it behind the dummy
    space (`▁▁the`), as in SentencePiece; the Metaspace step of transformers (Llama 2, Mistral) puts no dummy
    space before such a text, so that " the" and "the" would be the same ids. An added token of text never
    takes the spaces beside it along (Phi-3's `</s>`). For text in NFC without special tokens or `▁`, and
    without spaces at its start or beside an added token, the ids are those of the tokenizer.

    Attributes:
        tokens: bytes by id, length `vocab_size`; None where the token has no text (special, unused, beyond
            the tokenizer). A token of part of a UTF-8 character holds that part.
        prefix_ids: what the tokenizer puts before every text (BOS); [] where it puts nothing.
        name: the tokenizer's name in messages.
        kind: the family, "byte_level" or "sentencepiece".
        vocab_size: V, how many ids the model has logits for; `len(tokens)`.
        id_bound: one more than the tokenizer's largest id, the `unfit` ones left out; at most `vocab_size`.
        unfit: special tokens that the model has no logit for: names by id. No text gives their ids.
        lost_bytes: bytes the tokenizer has no token for and drops from text (21 in SmolLM2, of no printable
            text).
    """

    def __init__(
        self, encoder: Encoder, tokens: list[bytes | None], prefix_ids: list[int], name: str
    ) -> None:
        self.tokens = tokens
        self.prefix_ids = prefix_ids
        self.name = name
        self.kind: Kind = encoder.kind
        self.vocab_size = len(tokens)
        self.id_bound = encoder.id_bound
        self.unfit = encoder.unfit
        self.lost_bytes = encoder.lost_bytes
        self._encoder = encoder
        self._view = encoder.view
        # SentencePiece only: `▁` spelt in byte tokens, all of which it has.
        spelt = SPACE_MARK.encode() if encoder.kind == "sentencepiece" else b""
        self._mark_ids = [i for byte in spelt if (i := encoder.byte_ids[byte]) is not None]
        self.cuts = CutFinder(encoder)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, vocab_size: int | None = None, *, name: str = "") -> Vocabulary:
        """Read a transformers fast tokenizer (or a `tokenizers.Tokenizer`) and check that text survives it.

        Args:
            tokenizer: what `AutoTokenizer.from_pretrained` returns. It is neither changed nor copied. The
                padding and truncation of a `tokenizers.Tokenizer` are left out.
            vocab_size: V, how many ids the model has logits for; default: one more than the largest id. A
                special token beyond these is left out: its name in a text is read as any other text.
            name: for messages; default: the tokenizer's `name_or_path`.

        Raises:
            ModelError: unsupported family; an id of `vocab_size` or more that text can give, or that stands
                before every text; the first probe text that does not come back byte for byte.
        """
        name = name or str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__
        tokenizer = without_padding(tokenizer)
        encoder = build_encoder(tokenizer, name, vocab_size)
        size = encoder.id_bound if vocab_size is None else vocab_size
        prefix_ids = _prefix_ids(tokenizer, name)
        if any(token_id >= size for token_id in prefix_ids):
            raise ModelError(
                f"{name}: the tokenizer puts the ids {prefix_ids} before every text, but the model has only "
                f"{size} rows; the tokenizer belongs to another model"
            )
        vocabulary = cls(encoder, encoder.token_bytes(size), prefix_ids, name)
        vocabulary._check(tokenizer)
        return vocabulary

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over kind, tokens, prefix, settings and ids of sample texts. Computed when first used.

        The samples (`PROBES`, and some 2,000 tokens) stand for the merges, which only the tokenizer's whole
        JSON names: writing that out takes 75 MB and half a second for Gemma.
        """
        digest = hashlib.sha256(f"{self.kind} {self._encoder.dummy_prefix} {self.prefix_ids} ".encode())
        digest.update(b"".join(b"-1 " if t is None else b"%d " % len(t) for t in self.tokens))
        digest.update(b"".join(filter(None, self.tokens)))
        encoder = self._encoder
        added = [repr(encoder.added[i]) for i in sorted(encoder.added)]
        digest.update(repr((encoder.normalizer_parts, encoder.pre_tokenizer_parts, added)).encode())
        sample = (
            text.decode(errors="ignore") for text in self.tokens[:: len(self.tokens) // 2000 + 1] if text
        )
        for text in (*PROBES, *sample):
            digest.update(repr(self.encode(text)).encode())
        return digest.hexdigest()

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; b"" where it has no text. InputError for an id outside the vocabulary."""
        if not 0 <= token_id < len(self.tokens):
            raise InputError(f"{self.name}: token id {token_id} is outside its {len(self.tokens)} tokens")
        return self.tokens[token_id] or b""

    def decode(self, ids: Iterable[int], *, continues: bool = False) -> bytes:
        """The bytes of a whole text's ids, less the dummy space.

        `decode(encode(text)) == text.encode()`, but for special tokens in the text and `lost_bytes`.

        Args:
            ids: token ids, with or without `prefix_ids` before them.
            continues: the ids go on from earlier ones, so that no dummy space stands before them.
        """
        ids = list(ids)
        data = b"".join(map(self.bytes_of, ids))
        if continues or not self._encoder.dummy_prefix:
            return data
        start = len(self.prefix_ids) if ids[: len(self.prefix_ids)] == self.prefix_ids else 0
        has_dummy = len(ids) > start and ids[start] not in self._encoder.added
        return data[1:] if has_dummy and data[:1] == b" " else data

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without `prefix_ids`; added tokens in it are matched as the tokenizer does."""
        return self.encode_spans(text)[0]

    def encode_spans(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a whole text, and for each where it ends in the text, in characters.

        InputError for a text with lone surrogates, which has no bytes in UTF-8.
        """
        check_characters(text)
        if not self._encoder.dummy_prefix or not text:
            return self.encode_part(text, 0)
        first = self._view.encode(text, add_special_tokens=False).ids[:1]
        if first and first[0] in self._encoder.added and text[0] != SPACE_MARK:
            return self.encode_part(text, 0)
        return self.encode_part(" " + text, -1)

    def encode_part(self, text: str, offset: int) -> tuple[list[int], list[int]]:
        """`encode_spans` for a text that goes on from an earlier one at a cut, `offset` characters in."""
        ids: list[int] = []
        ends: list[int] = []
        for i, piece in enumerate(text.split(SPACE_MARK) if self._mark_ids else [text]):
            if i:
                offset += 1
                ids += self._mark_ids
                ends += [offset] * len(self._mark_ids)
            encoding = self._view.encode(piece, add_special_tokens=False)
            ids += encoding.ids
            ends += [end + offset for _, end in encoding.offsets]
            offset += len(piece)
        return ids, ends

    def _check(self, tokenizer: Any) -> None:
        """Round trip over `PROBES`, and the same ids as the tokenizer where nothing sets them apart."""
        for text in PROBES:
            ids = self.encode(text)
            back = self.decode(ids)
            if back != text.encode():
                raise ModelError(
                    f"{self.name}: text does not survive this tokenizer: {text!r} comes back as "
                    f"{back.decode(errors='replace')!r}; use a model whose tokenizer keeps text byte for byte"
                )
            apart = SPACE_MARK in text or text[0].isspace() or unicodedata.normalize("NFC", text) != text
            if not apart and ids != _ids(tokenizer, text, special=False):
                raise ModelError(
                    f"{self.name}: this tokenizer encodes {text!r} in a way that is not understood "
                    "(an unusual normalizer or pre-tokenizer); use another model"
                )


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    encoded = tokenizer.encode(text, add_special_tokens=special)
    return list(getattr(encoded, "ids", encoded))


def _prefix_ids(tokenizer: Any, name: str) -> list[int]:
    try:
        whole, plain = (_ids(tokenizer, "Hello world", special=special) for special in (True, False))
    except Exception as error:  # a setting of the wrong kind in tokenizer_config.json is first used here
        raise ModelError(
            f"{name}: its tokenizer cannot encode text ({type(error).__name__}: {error}); "
            "its files are damaged"
        ) from error
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise ModelError(f"{name}: its special tokens change the ids of the text itself; use another model")
