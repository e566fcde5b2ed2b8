"""Turning a GGUF file into a folder that transformers loads in a second, once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.cache_folder import atomic_directory, cache_dir, kept_in, locked
from deepen_ext.ground.file_hash import file_sha256
from deepen_ext.ground.progress import Progress
from deepen_ext.ground.warning import warn
from deepen_ext.members import embedded
from deepen_ext.members.gguf.checks import failures_of_reading
from deepen_ext.members.gguf.facts import read_facts
from deepen_ext.members.gguf.header import Damaged, read_header
from deepen_ext.members.gguf.tokenizer import conversion, load_gguf_tokenizer, save_tokenizer
from deepen_ext.members.hf.checkpoint import check_weights
from deepen_ext.members.hf.gguf_reader import read_once
from deepen_ext.members.hf.quiet import quiet

_REVISION = "2"  # goes into the cache key: raise it when the rules of the conversion change
_LONGEST_NAME = 200  # bytes
_COMPUTED = re.compile(r"rot_embd|inv_freq")  # the model computes them itself


def converted_folder(sha256: str, name: str) -> Path:
    """Where the conversion of the GGUF file with this hash lives; it is whole if it exists.

    Another version of transformers converts it anew: it may read weights or settings otherwise.
    """
    # Not "..", and short enough for what is written beside it while the file is converted.
    readable = re.sub(r"[^\w.-]|^\.", "-", name).encode()[:_LONGEST_NAME].decode(errors="ignore")
    return cache_dir("models", f"{sha256[:32]}-{_REVISION}.{conversion()}") / readable


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


def convert_embedded(name: str, progress: Progress | None = None) -> Path:
    """The folder of one embedded model, converted once as by `convert_gguf`, and its file fetched for that.

    Raises:
        InputError: no such embedded model.
        ModelError: as `embedded.gguf_file` and `convert_gguf`.
    """
    model = embedded.find(name)
    target = converted_folder(model.sha256, model.name)
    if target.is_dir():
        return target
    path = embedded.gguf_file(name, progress)
    return convert_gguf(path, progress, sha256=model.sha256, name=model.name)


def _once(target: Path, fill: Callable[[Path], None], say: Progress) -> Path:
    """The folder, filled by the first process that asks for it."""
    waiting = f"Waiting for another process that converts {target.name}"
    if not target.is_dir():
        with kept_in(target.parent), locked(target, on_wait=lambda: say(waiting)):
            if not target.is_dir():  # it may have come while we waited
                with atomic_directory(target) as temporary:
                    fill(temporary)
    return target


def _convert(path: Path, folder: Path, name: str, say: Progress) -> None:
    def stage(what: str) -> None:
        say(f"Converting {name}, once: {what}")

    _needs_packages(path)
    advice = "It may be truncated (fetch it again) or of an architecture that transformers does not read"
    with failures_of_reading(path, "cannot convert this GGUF file", advice), quiet(), read_once():
        facts = read_facts(path)
        stage("tokenizer")
        tokenizer = load_gguf_tokenizer(path, name)
        stage("settings")
        # Parsing the file's vocabulary in Python is what takes long. The tokenizer above uses transformers'
        # quick reader, and the config and the weights share a parse (`read_once`).
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        stage("weights")
        left_out: set[str] = set()
        with _bar_to(lambda done, total: stage(f"weights, {done} of {total} tensors")), _noting(left_out):
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
        _check_left_out(model, left_out, path)
        _check_finite(model.state_dict().items())
        # The weights are plain float32 now; without this save_pretrained refuses them as quantised.
        if model.hf_quantizer is not None:
            model.hf_quantizer.remove_quantization_config(model)
        if facts.eos_ids:
            model.generation_config.eos_token_id = list(facts.eos_ids)
        save_tokenizer(tokenizer, folder)
        stage("saving the weights")
        model.save_pretrained(folder)


def _check_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, weight in weights:
        if not bool(torch.isfinite(weight).all()):
            raise Damaged(f"{name} has values that are no numbers")


def _check_left_out(model: Any, names: set[str], path: Path) -> None:
    """transformers drops the tensors that it has no place for, without a word."""
    own = names & read_header(path).tensors.keys()
    kind = type(model).__name__
    if inside := sorted(name for name in own if name.startswith("blk.") and not _COMPUTED.search(name)):
        raise ModelError(
            f"the file has weights for which transformers' {kind} has no place: {', '.join(inside[:5])} "
            f"({len(inside)} in all), so that it would be another model without them; use "
            "backend='llama.cpp', or the model's Hugging Face folder"
        )
    if own:
        warn(
            f"{path.name}: left out of the file, because transformers' {kind} has no place for them: "
            f"{', '.join(sorted(own)[:5])}"
        )


def _needs_packages(path: Path) -> None:
    try:
        for package in ("accelerate", "gguf"):
            import_module(package)
    except ImportError as error:
        raise ModelError(
            f"{path}: reading .gguf files needs the packages gguf and accelerate; "
            "install them with: pip install 'deepen-ext[demo]'"
        ) from error


@contextmanager
def _noting(left_out: set[str]) -> Iterator[None]:
    """Note the names that the reader looks for in its table and does not find."""
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")

    class Table(dict[str, str]):
        def __contains__(self, name: object) -> bool:
            found = super().__contains__(name)
            if not found and isinstance(name, str):
                left_out.add(name)
            return found

    table = reader.get_gguf_hf_weights_map
    reader.get_gguf_hf_weights_map = lambda *given, **more: Table(table(*given, **more))
    try:
        yield
    finally:
        reader.get_gguf_hf_weights_map = table


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
