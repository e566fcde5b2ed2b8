"""A GGUF file's settings against its tensors: before a reader allocates, loops or builds layers by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepen_ext.errors import DeepenError, InputError, ModelError
from deepen_ext.ground.cache_folder import write_failure
from deepen_ext.members.gguf.header import Damaged, Header, read_header, read_whole_numbers

TOKENS, CHAT_TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.chat_template"
# Settings that count something that the file's tensors have; no tensor has as many elements along a side.
_SIZES = (
    *("_length", "_count", "_count_kv", "vocab_size", "_size", ".dimension_count", "_rank"),
    *(".conv_kernel", ".l_cache"),  # of Mamba and LFM2: the width of a convolution
)
_NO_SIZES = ("context_length", "original_context_length")  # of positions: nothing is allocated by them
_MOST_LAYERS = 4096  # a size may be a list, with a number for each layer


def check_gguf(path: Path, *, weights: bool) -> Header:
    """That a GGUF file's counts, lengths and offsets lie inside it and its sizes are those of its tensors.

    Args:
        path: the file.
        weights: whether a model is to be made of it; files of a tokenizer alone have none.

    Returns:
        its header.

    Raises:
        Damaged: they do not.
        ModelError: it is one of the parts of a file that was split.
        OSError: the file cannot be read.
    """
    header = read_header(path)
    parts = header.settings.get("split.count", 0)
    if weights and parts not in (0, 1):
        raise ModelError(
            f"it is one of {parts} parts of a GGUF file. Join the parts and name the file that comes out: "
            "llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf"
        )
    if weights:
        _check_settings(path, header)
    return header


@contextmanager
def failures_of_reading(path: Path, doing: str, advice: str) -> Iterator[None]:
    """Any failure of a reader, which knows a damaged file only by what breaks first, as one clear error.

    Args:
        path: the file, for the message.
        doing: what could not be done: "cannot convert this GGUF file".
        advice: the message's last sentence.

    Raises:
        InputError: the file cannot be opened.
        ModelError: everything else but a full disk, which says nothing against the file.
    """
    try:
        yield
    except DeepenError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and str(error.filename) == str(path):
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if write_failure(error) is not None:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path}: {doing}, {type(error).__name__}: {lines[0]}. {advice}") from error


def _check_settings(path: Path, header: Header) -> None:
    """Layers are built by these numbers before any weight is read."""
    settings, shapes = header.settings, {name: tensor.shape for name, tensor in header.tensors.items()}
    if not shapes:
        raise Damaged("it has no weights")
    architecture = settings["general.architecture"]
    widest = max(side for shape in shapes.values() for side in shape)
    blocks = {name.split(".")[1] for name in shapes if name.startswith(("blk.", "enc.", "dec."))}
    for key in settings:
        last = key.removeprefix(f"{architecture}.")
        if last == key or not last.endswith(_SIZES) or last.rpartition(".")[2] in _NO_SIZES:
            continue
        least, most = (1, len(blocks) + 1) if last == "block_count" else (0, widest)
        for value in _sizes(path, header, key):
            if not least <= value <= most:
                raise Damaged(f"{key} is {value}, which its tensors do not have")
    width = settings.get(f"{architecture}.embedding_length")
    embedding = shapes.get("token_embd.weight")
    if embedding is not None and isinstance(width, int) and width not in embedding:
        raise Damaged(f"{architecture}.embedding_length is {width}; its token embeddings have {embedding[0]}")
    positions, longest = shapes.get("position_embd.weight"), settings.get(f"{architecture}.context_length")
    if positions is not None and isinstance(longest, int) and longest not in positions:
        raise Damaged(f"{architecture}.context_length is {longest}; it has {positions[-1]} positions")
    vocabulary = settings.get(TOKENS)
    if embedding is not None and isinstance(vocabulary, tuple) and vocabulary[0] > embedding[-1]:
        raise Damaged(f"it has {vocabulary[0]} tokens and {embedding[-1]} token embeddings")


def _sizes(path: Path, header: Header, key: str) -> tuple[int, ...]:
    """The whole numbers of a setting. transformers takes a list of one for the number in it."""
    value = header.settings[key]
    if isinstance(value, int):
        return (value,)
    if key not in header.lists:
        return ()
    if header.lists[key].length > _MOST_LAYERS:
        raise Damaged(f"{key} has {header.lists[key].length} values, more than any model has layers")
    return read_whole_numbers(path, header.lists[key])
