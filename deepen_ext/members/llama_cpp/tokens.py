"""llama.cpp's own tokenizer of a file, and whether ours gives the same ids."""

from __future__ import annotations

import numpy as np

from deepen_ext.errors import ModelError
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.text.vocabulary import PROBES, Vocabulary

# SentencePiece takes it for a space; here it stays what it is, as every other character does.
_SPACE_MARK = "\u2581"


def tokenize(model: LlamaModel, text: str) -> list[int]:
    """The ids that llama.cpp gives a text, without BOS; the names of special tokens are not looked for."""
    data = text.encode()
    ids = np.empty(len(data) + 8, np.int32)
    call = model.library.call.llama_tokenize
    count = call(model.vocab, data, len(data), ids.ctypes.data, len(ids), False, False)
    if count < 0:  # more than there is room for
        ids = np.empty(-count, np.int32)
        count = call(model.vocab, data, len(data), ids.ctypes.data, len(ids), False, False)
    return [int(one) for one in ids[:count]]


def check_tokenizer(model: LlamaModel, vocabulary: Vocabulary) -> None:
    """That our tokenizer, read from the file, is the one that llama.cpp reads from it.

    Raises:
        ModelError: some probe gets other ids; the message has the first.
    """
    for text in PROBES:
        if _SPACE_MARK in text:
            continue
        ours, theirs = vocabulary.encode(text), tokenize(model, text)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            at = min(len(ours), len(theirs)) if at is None else at
            raise ModelError(
                f"{model.name}: {text!r} is {ours[at : at + 5]} from token {at} on by our tokenizer and "
                f"{theirs[at : at + 5]} by {model.library.name}, although both read the same file. Use "
                "backend='transformers', or the model's Hugging Face folder"
            )
