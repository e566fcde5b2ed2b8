"""The parts of a Hugging Face fast tokenizer: what its settings say, and how to leave some of them out."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from deepen_ext.errors import ModelError
from deepen_ext.text.token_bytes import SPACE_MARK, Kind


def normalizer_parts(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The settings of each normalizer, in their order; [] where there is none."""
    return _parts(tokenizer.normalizer, "normalizers")


def pre_tokenizer_parts(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The settings of each pre-tokenizer, in their order; [] where there is none."""
    return _parts(tokenizer.pre_tokenizer, "pretokenizers")


def _parts(component: Any, children: str) -> list[dict[str, Any]]:
    """A component (or None) as a flat list of its settings, `Sequence` opened up."""
    if component is None:
        return []
    parts: list[dict[str, Any]] = []
    pending = [json.loads(component.__getstate__())]
    while pending:
        part = pending.pop(0)
        if part["type"] == "Sequence":
            pending = [*part[children], *pending]
        else:
            parts.append(part)
    return parts


def family(tokenizer: Tokenizer, name: str) -> Kind:
    """How the tokenizer spells bytes.

    Raises:
        ModelError: in neither of the two ways that are read.
    """
    if any(part["type"] == "ByteLevel" for part in pre_tokenizer_parts(tokenizer)):
        return "byte_level"
    marks = any(
        part["type"] == "Metaspace"
        or (
            part["type"] == "Replace" and part["pattern"] == {"String": SPACE_MARK} and part["content"] == " "
        )
        for part in _parts(tokenizer.decoder, "decoders")
    )
    if marks and tokenizer.model.byte_fallback:
        return "sentencepiece"
    raise ModelError(
        f"{name}: neither a byte-level BPE nor a SentencePiece BPE tokenizer with byte fallback, "
        "so text would not survive it byte for byte; use a model with one of these"
    )


def without_padding(tokenizer: Any) -> Any:
    """The tokenizer; in place of a `tokenizers.Tokenizer` that pads or cuts, one that does neither."""
    if not isinstance(tokenizer, Tokenizer) or (tokenizer.padding is None and tokenizer.truncation is None):
        return tokenizer
    plain = Tokenizer(tokenizer.model)
    plain.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    plain.encode_special_tokens = tokenizer.encode_special_tokens
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (component := getattr(tokenizer, part)) is not None:
            setattr(plain, part, component)
    return plain


def set_exact_normalizer(view: Tokenizer, original: Tokenizer, kind: Kind) -> bool:
    """Give the view the original's normalizer without NFC and dummy space; True if there was a dummy space.

    A normalizer with any other step is kept whole: if it changes text, the round trip that follows refuses
    it.
    """
    parts = normalizer_parts(original)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    dummy = {"type": "Prepend", "prepend": SPACE_MARK}
    if any(part not in (spaces, dummy, {"type": "NFC"}) for part in parts):
        view.normalizer = original.normalizer
        return False
    if spaces in parts and kind == "sentencepiece":
        view.normalizer = normalizers.Replace(" ", SPACE_MARK)
    return dummy in parts


def set_exact_pre_tokenizer(view: Tokenizer, original: Tokenizer) -> bool:
    """Give the view the original's pre-tokenizer without its dummy space; True if there was a dummy space."""
    if original.pre_tokenizer is None:
        return False
    parts = pre_tokenizer_parts(original)
    if len(parts) == 1 and parts[0]["type"] == "Metaspace" and parts[0]["replacement"] == SPACE_MARK:
        view.pre_tokenizer = pre_tokenizers.Metaspace(
            SPACE_MARK, prepend_scheme="never", split=parts[0]["split"]
        )
        return bool(parts[0]["prepend_scheme"] != "never")
    if len(parts) == 1 and parts[0]["type"] == "ByteLevel":
        view.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=parts[0]["use_regex"])
        return bool(parts[0]["add_prefix_space"])
    view.pre_tokenizer = original.pre_tokenizer
    return False
