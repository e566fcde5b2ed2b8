"""Turning a GGUF file into a folder that transformers loads in a second, once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from deepen_ext.errors import DeepenError, InputError, ModelError
from deepen_ext.ground.cache_folder import atomic_directory, cache_dir, kept_in, locked, write_failure
from deepen_ext.members.gguf.checks import check_finite, check_gguf
from deepen_ext.members.gguf.pre_tokenizers import split_rule

Progress = Callable[[str], None]

_REVISION = "2"  # goes into the cache key: raise it when the rules of the conversion change


def converted_folder(sha256: str, name: str) -> Path:
    """Where the conversion of the GGUF file with this hash lives; it is whole if it exists."""
    return cache_dir("models", f"{sha256[:32]}-{_REVISION}") / re.sub(r"[^\w.-]", "-", name)


def convert_gguf(
    path: Path, progress: Progress | None = None, *, sha256: str | None = None, name: str | None = None
) -> Path:
    """Convert a ``.gguf`` file to safetensors (float32, exact de-quantised weights) and ``tokenizer.json``,
    once.

    The folder is kept in the cache under the hash of the file's content. Two processes wait for each other,
    and an interrupted conversion leaves nothing that a later one takes for whole.

    Args:
        path: the file.
        progress: called with one line of text as each stage starts.
        sha256: the content's hash, where it is known already.
        name: name of the folder, by default the file's without ``.gguf``.

    Raises:
        InputError: no such file, or it cannot be read.
        ModelError: the file is damaged or of a kind transformers cannot read, lacks weights or has those of
            another architecture; `gguf` is not installed; or the cache cannot be written to.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the spelling of the path")
    target = converted_folder(sha256 or file_sha256(path), name or path.stem)
    say = progress or (lambda _: None)
    return _once(target, lambda folder: _convert(path, folder, target.name, say), say)


def convert_tokenizer(path: Path, *, sha256: str, name: str) -> Path:
    """The tokenizer of a ``.gguf`` file alone, as a folder in the cache; errors as `convert_gguf`."""

    def fill(folder: Path) -> None:
        with _reading(path, weights=False):
            _tokenizer(path).save_pretrained(folder)

    return _once(converted_folder(sha256, f"{name}-tokenizer"), fill, lambda _: None)


def _once(target: Path, fill: Callable[[Path], None], say: Progress) -> Path:
    """The folder, filled by the first process that asks for it."""
    waiting = f"Waiting for another process that converts {target.name}"
    if not target.is_dir():
        with kept_in(target.parent), locked(target, on_wait=lambda: say(waiting)):
            if not target.is_dir():  # it may have come while we waited
                with atomic_directory(target) as temporary:
                    fill(temporary)
    return target


def file_sha256(path: Path) -> str:
    """Hash of a file's content, hex."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _convert(path: Path, folder: Path, name: str, say: Progress) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from deepen_ext.members.gguf.reader import read_once
    from deepen_ext.members.hf.checkpoint import check_weights
    from deepen_ext.members.hf.quiet import quiet

    def stage(what: str) -> None:
        say(f"Converting {name}, once: {what}")

    with _reading(path, weights=True), quiet(), read_once():
        stage("tokenizer")
        tokenizer = _tokenizer(path)
        stage("settings")
        # Parsing the file's vocabulary in Python is what takes long. The tokenizer above uses transformers'
        # quick reader, and the config and the weights share a parse (`read_once`).
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        stage("weights")
        with _bar_to(lambda done, total: stage(f"weights, {done} of {total} tensors")):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                dtype=torch.float32,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        model = loaded[0]
        check_weights(model, loaded[1], path.name)  # a head is tied where the file has none
        check_finite(model.state_dict().items())
        # The weights are plain float32 now; without this save_pretrained refuses them as quantised.
        if model.hf_quantizer is not None:
            model.hf_quantizer.remove_quantization_config(model)
        _all_eos(model, path)
        tokenizer.save_pretrained(folder)
        stage("saving the weights")
        model.save_pretrained(folder)


def _tokenizer(path: Path) -> Any:
    """The file's tokenizer, corrected where transformers does not follow the file's own settings.

    For byte-level BPE, transformers 5.23 knows a third of the names of how text is split, takes GPT-2's rule
    for all others, and never takes a word that is a token whole.
    """
    from tokenizers import Regex, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    metadata = _metadata(path)
    byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    rule = split_rule(metadata.get("tokenizer.ggml.pre")) if byte_level else None
    # Not AutoTokenizer: it would parse the whole file only to choose a class; the tokenizer.json comes out
    # the same.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    backend = tokenizer.backend_tokenizer
    if rule is not None:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        backend.model.ignore_merges = rule.ignore_merges
    bos = tokenizer.bos_token
    wanted = metadata.get("tokenizer.ggml.add_bos_token", True if rule is not None and rule.add_bos else None)
    if wanted is not None and bos is not None and wanted != (backend.encode("a").tokens[0] == bos):
        first = f"{bos} " if wanted else ""
        backend.post_processor = TemplateProcessing(
            single=f"{first}$A", pair=f"{first}$A {first}$B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


def _all_eos(model: Any, path: Path) -> None:
    """A file may name ends of a turn and of a message beside EOS; all of them end a text."""
    metadata = _metadata(path)
    keys = [f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(int(metadata[key]) for key in keys if key in metadata))
    if ids:
        model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]


def _metadata(path: Path) -> dict[str, Any]:
    from transformers.integrations.gguf.reader import read_gguf_metadata

    return dict(read_gguf_metadata(str(path))[0])


@contextmanager
def _reading(path: Path, *, weights: bool) -> Iterator[None]:
    """Any failure of the readers, which know a damaged file only by what breaks first, as one clear error."""
    try:
        for package in ("accelerate", "gguf"):
            import_module(package)
    except ImportError as error:
        raise ModelError(
            f"{path}: reading .gguf files needs the packages gguf and accelerate; "
            "install them with: pip install 'deepen-ext[demo]'"
        ) from error
    try:
        check_gguf(path, weights=weights)
        yield
    except DeepenError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:
        if write_failure(error) is not None:  # a full disk says nothing against the file
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{path}: cannot convert this GGUF file, {type(error).__name__}: {lines[0]}. "
            "It may be truncated (fetch it again) or of an architecture that transformers does not read"
        ) from error


@contextmanager
def _bar_to(report: Callable[[int, int], None]) -> Iterator[None]:
    """Send the reader's own progress bar, which no setting of transformers silences, to ``report``."""
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")

    def watched(items: Any, **_: Any) -> Iterator[Any]:
        for done, item in enumerate(items):
            if done % 16 == 0:
                report(done, len(items))
            yield item

    bar = reader.tqdm
    reader.tqdm = watched
    try:
        yield
    finally:
        reader.tqdm = bar
