"""llama.cpp's own tokenizer of a file, and whether ours gives the same ids.

The two differ by design in two kinds of text. The sign U+2581 stays what it is in ours; llama.cpp's
SentencePiece takes it for a space. The name of a special token, such as "<s>", is that token in ours, as in
transformers; `tokenize` reads it as any other text.
"""

from __future__ import annotations

import numpy as np

from deepen_ext.errors import ModelError
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.members.probes import COMPARED, first_difference
from deepen_ext.text.vocabulary import PROBES, Vocabulary

_ADVICE = "although both read the same file. Use backend='transformers', or the model's Hugging Face folder"


def tokenize(model: LlamaModel, text: str, *, prefix: bool = False) -> list[int]:
    """The ids that llama.cpp gives a text; the names of special tokens are not looked for.

    Args:
        model: whose tokenizer.
        text: any.
        prefix: with what the file puts before every text (BOS), and after it.
    """
    data = text.encode()
    ids = np.empty(len(data) + 8, np.int32)
    call = model.library.call.llama_tokenize
    count = call(model.vocab, data, len(data), ids.ctypes.data, len(ids), prefix, False)
    if count < 0:  # more than there is room for
        ids = np.empty(-count, np.int32)
        count = call(model.vocab, data, len(data), ids.ctypes.data, len(ids), prefix, False)
    return [int(one) for one in ids[:count]]


def check_tokenizer(model: LlamaModel, vocabulary: Vocabulary) -> None:
    """That our tokenizer, read from the file, is the one that llama.cpp reads from it.

    Raises:
        ModelError: some probe gets other ids, or another BOS; the message has the first.
    """
    before, plain = vocabulary.prefix_ids, tokenize(model, PROBES[0])
    whole = tokenize(model, PROBES[0], prefix=True)
    if whole[: len(before) + len(plain)] != before + plain:  # after it may stand what ends a text
        raise ModelError(
            f"{model.name}: {PROBES[0]!r} is {before + plain} by our tokenizer and {whole} by "
            f"{model.library.name}, {_ADVICE}"
        )
    for text in COMPARED:
        ours, theirs = vocabulary.encode(text), tokenize(model, text)
        if ours != theirs:
            at = first_difference(ours, theirs)
            raise ModelError(
                f"{model.name}: {text!r} is {ours[at : at + 5]} from token {at} on by our tokenizer and "
                f"{theirs[at : at + 5]} by {model.library.name}, {_ADVICE}"
            )
