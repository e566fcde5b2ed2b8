"""The tokenizer of a GGUF file, built once and kept."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepen_ext.errors import ModelError
from deepen_ext.ground.cache_folder import atomic_directory, cache_dir, kept_in, locked
from deepen_ext.members.gguf.checks import TOKENS, check_gguf, failures_of_reading
from deepen_ext.members.gguf.pre_tokenizers import split_rule

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_REVISION = "1"  # goes into the cache key: raise it when the rules of the conversion change


def load_gguf_tokenizer(path: Path, name: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a ``.gguf`` file, with its chat template and its BOS, EOS and padding tokens.

    It is built once; a later call takes it from the cache (`tokenizer_folder`).

    Args:
        path: the file; it need not have weights.
        name: of its folder in the cache, by default the file's without ``.gguf``.

    Raises:
        InputError: the file cannot be read.
        ModelError: it is damaged, has no tokenizer or one that transformers cannot read, or names a way of
            splitting text that is not known; or the cache cannot be written to.
    """
    from transformers import PreTrainedTokenizerFast

    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder(path, name))
    return loaded


def tokenizer_folder(path: Path, name: str | None = None) -> Path:
    """The folder in the cache that holds a file's ``tokenizer.json``; errors as `load_gguf_tokenizer`."""
    with _reading(path):
        header = check_gguf(path, weights=False)
        if TOKENS not in header.settings:
            raise ModelError(
                f"it has no tokenizer ({TOKENS}); use a GGUF file of the whole model, or the model's Hugging "
                "Face folder"
            )
        # The tokenizer is made of the settings and of nothing else in the file, so their hash is enough.
        # Hashing the weights of a large model too would take minutes at every start.
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(header.settings_end)).hexdigest()
    target = cache_dir("gguf-tokenizers", f"{digest[:32]}-{_REVISION}") / re.sub(
        r"[^\w.-]", "-", name or path.stem
    )
    if not target.is_dir():
        with kept_in(target.parent), locked(target):
            if not target.is_dir():  # it may have come while we waited
                with atomic_directory(target) as temporary, _reading(path):
                    _built(path, header.settings).save_pretrained(temporary)
    return target


def _reading(path: Path) -> AbstractContextManager[None]:
    doing = "cannot read the tokenizer of this GGUF file"
    return failures_of_reading(path, doing, "It may be truncated (fetch it again)")


def _built(path: Path, settings: Mapping[str, Any]) -> Any:
    """The file's tokenizer, corrected where transformers does not follow the file's own settings.

    For byte-level BPE, transformers 5.23 knows a third of the names of how text is split, takes GPT-2's rule
    for all others, and never takes a word that is a token whole.
    """
    from tokenizers import Regex, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    byte_level = settings.get("tokenizer.ggml.model") == "gpt2"
    rule = split_rule(settings.get("tokenizer.ggml.pre")) if byte_level else None
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
    wanted = settings.get("tokenizer.ggml.add_bos_token", True if rule is not None and rule.add_bos else None)
    if wanted is not None and bos is not None and wanted != (backend.encode("a").tokens[0] == bos):
        first = f"{bos} " if wanted else ""
        backend.post_processor = TemplateProcessing(
            single=f"{first}$A", pair=f"{first}$A {first}$B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer
