"""A byte-exact encoder, built from a tokenizer's parts.

Two families are read, both over BPE (see `token_bytes.py`). Everything else is refused: WordPiece and Unigram
lose bytes or choose tokens by a rule that `cuts.py` cannot reason about.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from deepen_ext.errors import ModelError
from deepen_ext.text import tokenizer_parts
from deepen_ext.text.token_bytes import RARE_BYTES, SPACE_MARK, Kind, bytes_of_name, id_of_byte


@dataclass(frozen=True)
class Encoder:
    """A private, byte-exact view of a Hugging Face fast tokenizer, with the same model and added tokens.

    It differs from the original in five ways, all needed to carry bytes exactly: no Unicode NFC step
    (transformers adds one to every Qwen 2 tokenizer), no dummy space before the text (`Vocabulary` puts it
    there itself, and only there), no padding, truncation or special tokens around the text, no added token
    of text that takes the spaces beside it along (Phi-3's `</s>`), and no special token that the model has no
    logit for (Gemma 3's `<image_soft_token>` beside a model of text alone).
    """

    kind: Kind
    view: Tokenizer
    dummy_prefix: bool  # a space is put before every text that does not begin with an added token
    normalizer_parts: list[dict[str, Any]]  # as they are in the view
    pre_tokenizer_parts: list[dict[str, Any]]
    added: dict[int, AddedToken]
    special_ids: frozenset[int]
    byte_ids: tuple[int | None, ...]  # the token of each of the 256 bytes
    lost_bytes: frozenset[int]  # bytes without a token, which the tokenizer drops from text
    id_bound: int  # the largest id and 1: more than the number of tokens where ids are left out (GPT-4o)
    unfit: dict[int, str]  # special tokens without a logit: names by id; the view reads them as other text

    def token_bytes(self, vocab_size: int) -> list[bytes | None]:
        """Each token's bytes by id, length `vocab_size`; None for special tokens and unknown ids."""
        # One id at a time: `get_vocab` would build a dictionary of 40 MB for Gemma.
        tokens: list[bytes | None] = [None] * vocab_size
        for token_id in range(min(self.id_bound, vocab_size)):
            if token_id in self.special_ids or (name := self.view.id_to_token(token_id)) is None:
                continue
            is_text = self.kind == "byte_level" and token_id in self.added
            tokens[token_id] = name.encode() if is_text else bytes_of_name(self.kind, name)
        return tokens

    def token_texts(self) -> Iterator[str]:
        """Every token as text, special tokens included (SentencePiece only)."""
        names = (self.view.id_to_token(token_id) for token_id in range(self.id_bound))
        return (name.replace(SPACE_MARK, " ") for name in names if name is not None)


_MOST_IDS = 1 << 22  # as deepen_ext/space/map_checks.py has it; sixteen times the largest vocabulary known


def build_encoder(tokenizer: Any, name: str, vocab_size: int | None = None) -> Encoder:
    """Read a transformers fast tokenizer or a `tokenizers.Tokenizer`.

    Args:
        tokenizer: the original. It is neither changed nor copied.
        name: for messages.
        vocab_size: how many ids the model has logits for; None: as many as the tokenizer needs.

    Raises:
        ModelError: another family; a token that text can give has an id of `vocab_size` or more.
    """
    size = sys.maxsize if vocab_size is None else vocab_size
    original = _bpe_tokenizer(tokenizer, name)
    kind = tokenizer_parts.family(original, name)
    every = dict(sorted(original.get_added_tokens_decoder().items()))
    # The view does without these: special, without a logit, and not a word of BPE's as well.
    unfit = {
        i: token.content
        for i, token in every.items()
        if i >= size and token.special and original.model.token_to_id(token.content) is None
    }
    added = {i: _kept_apart(token) for i, token in every.items() if i not in unfit}
    _refuse_beyond(((i, token.content) for i, token in added.items()), size, name)

    view = Tokenizer(original.model)
    view.add_tokens(list(added.values()))
    view.encode_special_tokens = original.encode_special_tokens
    if any(view.id_to_token(i) != token.content for i, token in added.items()):
        raise ModelError(
            f"{name}: its added tokens have ids that do not follow its vocabulary; its files are damaged"
        )
    normalizer_dummy = tokenizer_parts.set_exact_normalizer(view, original, kind)
    pre_tokenizer_dummy = tokenizer_parts.set_exact_pre_tokenizer(view, original)

    bound = _id_bound(view)
    if vocab_size is None and bound > _MOST_IDS:
        raise ModelError(
            f"{name}: its tokenizer has the id {bound - 1}, beyond any vocabulary; its files are damaged"
        )
    if bound > size:
        # The tokens that there are, not all ids up to the bound: a damaged file may have one in the billions.
        every_id = sorted((i, token) for token, i in view.get_vocab(with_added_tokens=True).items())
        _refuse_beyond(((i, token) for i, token in every_id if token), size, name)
        bound = size  # only tokens without text lie beyond, which nothing gives
    byte_ids = tuple(id_of_byte(view, kind, byte) for byte in range(256))
    special = {i for i, token in added.items() if token.special}
    special.update(getattr(tokenizer, "all_special_ids", ()))
    return Encoder(
        kind=kind,
        view=view,
        dummy_prefix=normalizer_dummy or pre_tokenizer_dummy,
        normalizer_parts=tokenizer_parts.parts(view.normalizer),
        pre_tokenizer_parts=tokenizer_parts.parts(view.pre_tokenizer),
        added=added,
        special_ids=frozenset(special),
        byte_ids=byte_ids,
        lost_bytes=_lost_bytes(byte_ids, kind, name),
        id_bound=bound,
        unfit=unfit,
    )


def _bpe_tokenizer(tokenizer: Any, name: str) -> Tokenizer:
    """The tokenizer that transformers' tokenizer wraps, or itself; ModelError unless it is a plain BPE."""
    found = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(found, Tokenizer):
        raise ModelError(f"{name}: not a fast tokenizer; save the model with a tokenizer.json and load that")
    model = found.model
    if not isinstance(model, BPE):
        raise ModelError(
            f"{name}: {type(model).__name__} tokenizers cannot carry text byte for byte; "
            "use a model with a byte-level BPE or a SentencePiece BPE tokenizer (of Gemma's .gguf files "
            "transformers 5.17 makes Unigram ones, 5.23 does not)"
        )
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        raise ModelError(f"{name}: BPE with dropout or with subword prefixes or suffixes is not supported")
    return found


def _kept_apart(token: AddedToken) -> AddedToken:
    """The same token; an added token of text leaves the spaces beside it to the text."""
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


def _refuse_beyond(tokens: Iterable[tuple[int, str]], size: int, name: str) -> None:
    """ModelError if one of the tokens, by id and name, has an id of `size` or more."""
    for token_id, token in tokens:
        if token_id >= size:
            raise ModelError(
                f"{name}: the tokenizer can give id {token_id} ({token!r}), but the model has only {size} "
                "rows; the tokenizer belongs to another model, or tokens were added to it and not to the "
                "model (resize_token_embeddings adds the rows)"
            )


def _lost_bytes(byte_ids: Iterable[int | None], kind: Kind, name: str) -> frozenset[int]:
    """The bytes without a token; ModelError if there are others than rare bytes among them."""
    lost = frozenset(byte for byte, byte_id in enumerate(byte_ids) if byte_id is None)
    refused = lost - RARE_BYTES if kind == "byte_level" else lost
    if refused:
        missing = ", ".join(f"0x{byte:02X}" for byte in sorted(refused))
        raise ModelError(
            f"{name}: its vocabulary has no token for the bytes {missing}, so it would lose text"
        )
    return lost
