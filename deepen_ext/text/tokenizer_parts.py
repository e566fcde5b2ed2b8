"""The parts of a Hugging Face fast tokenizer: what its settings say, and how to leave some of them out."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from deepen_ext.errors import ModelError
from deepen_ext.text.token_bytes import SPACE_MARK, Kind

# The normalizer of SentencePiece, as `parts` gives it.
SPACES_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}


def parts(component: Any) -> list[dict[str, Any]]:
    """The settings of each normalizer, pre-tokenizer or decoder, in their order; [] for None."""
    return [] if component is None else _flat(json.loads(component.__getstate__()))


def _flat(part: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] != "Sequence":
        return [part]
    (children,) = (value for value in part.values() if isinstance(value, list))
    return [one for child in children for one in _flat(child)]


def family(tokenizer: Tokenizer, name: str) -> Kind:
    """How the tokenizer spells bytes.

    Raises:
        ModelError: in neither of the two ways that are read.
    """
    if any(part["type"] == "ByteLevel" for part in parts(tokenizer.pre_tokenizer)):
        return "byte_level"
    marks = any(
        part["type"] == "Metaspace"
        or part == {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
        for part in parts(tokenizer.decoder)
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
        setattr(plain, part, getattr(tokenizer, part))
    return plain


def set_exact_normalizer(view: Tokenizer, original: Tokenizer, kind: Kind) -> bool:
    """Give the view the original's normalizer without NFC and dummy space; True if there was a dummy space.

    A normalizer with any other step is kept whole: if it changes text, the round trip that follows refuses
    it.
    """
    steps = parts(original.normalizer)
    dummy = {"type": "Prepend", "prepend": SPACE_MARK}
    if any(step not in (SPACES_REPLACED, dummy, {"type": "NFC"}) for step in steps):
        view.normalizer = original.normalizer
        return False
    if SPACES_REPLACED in steps and kind == "sentencepiece":
        view.normalizer = normalizers.Replace(" ", SPACE_MARK)
    return dummy in steps


def set_exact_pre_tokenizer(view: Tokenizer, original: Tokenizer) -> bool:
    """Give the view the original's pre-tokenizer without its dummy space; True if there was a dummy space."""
    steps = parts(original.pre_tokenizer)
    kind = steps[0]["type"] if len(steps) == 1 else None
    if kind == "Metaspace" and steps[0]["replacement"] == SPACE_MARK:
        view.pre_tokenizer = pre_tokenizers.Metaspace(
            SPACE_MARK, prepend_scheme="never", split=steps[0]["split"]
        )
        return bool(steps[0]["prepend_scheme"] != "never")
    if kind == "ByteLevel":
        view.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=steps[0]["use_regex"])
        return bool(steps[0]["add_prefix_space"])
    view.pre_tokenizer = original.pre_tokenizer
    return False
