"""The tokenizer of a GGUF file, built once and kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepen_ext.errors import ModelError
from deepen_ext.ground.cache_folder import Unwritable, atomic_directory, cache_dir, kept_in, locked
from deepen_ext.ground.warning import warn
from deepen_ext.members.gguf.checks import CHAT_TEMPLATE, TOKENS, check_gguf, failures_of_reading
from deepen_ext.members.gguf.pre_tokenizers import split_rule
from deepen_ext.text.token_bytes import SPACE_MARK
from deepen_ext.text.tokenizer_parts import parts

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_USER_DEFINED, _UNUSED = 4, 5  # kinds of tokens, of llama.cpp's
_REVISION = "3"  # goes into the cache key: raise it when the rules of the conversion change


def conversion() -> str:
    """What made a tokenizer, for the cache key: these rules and the version of transformers they correct.

    Another version may read a file otherwise: of Gemma's, transformers 5.17 makes one that is refused.
    """
    return f"{_REVISION}-transformers-{version('transformers')}"


def load_gguf_tokenizer(path: Path, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a ``.gguf`` file, with its chat template and its BOS, EOS and padding tokens.

    It is built once and kept in the cache. Gemma's, with 262,144 tokens, takes 3 s of processor time to build
    and 1 s to read again.

    Args:
        path: the file; it need not have weights.
        name: what transformers calls the tokenizer in messages (`name_or_path`).

    Raises:
        InputError: the file cannot be read.
        ModelError: it is damaged, has no tokenizer or one that transformers cannot read, or names a way of
            splitting text that is not known. A cache that cannot be written to is a warning.
    """
    with _reading(path):
        header = check_gguf(path, weights=False)
        if TOKENS not in header.settings:
            raise ModelError(
                f"it has no tokenizer ({TOKENS}); use a GGUF file of the whole model, or the model's Hugging "
                "Face folder"
            )
        _check_roles(header.settings)
        # The tokenizer is made of the settings and of nothing else in the file, so their hash is enough.
        # Hashing the weights of a large model too would take minutes at every start.
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(header.settings_end)).hexdigest()
    template = header.settings.get(CHAT_TEMPLATE)
    try:
        folder = cache_dir("gguf-tokenizers", f"revision-{conversion()}") / digest[:32]
        found = _kept(folder, name, template)
        if not isinstance(found, Exception):
            return found
        with kept_in(folder.parent), locked(folder):
            found = _kept(folder, name, template)  # another process may have made it while we waited
            if not isinstance(found, Exception):
                return found
            if folder.is_dir():
                warn(
                    f"{name}: its tokenizer in the cache is damaged, and is made again: {folder}, "
                    f"{type(found).__name__}"
                )
                shutil.rmtree(folder)
            with _reading(path):
                built: PreTrainedTokenizerFast = _built(path, header.settings)
            with atomic_directory(folder) as temporary:
                save_tokenizer(built, temporary)
    except Unwritable as error:
        warn(f"{name}: its tokenizer is not kept for the next run: {error}")
        with _reading(path):
            built = _built(path, header.settings)
    built.name_or_path = name
    return built


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """As `save_pretrained`, in the form that is read again fastest.

    A merge is written as the string ``"a b"``, as it long was, and not as the list ``["a", "b"]``, unless a
    token has a space in it. For Gemma, with 514,906 merges, the file is a third as long, and
    `AutoTokenizer.from_pretrained` takes 1.8 s of processor time and not 3.7.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_bytes())
    merges = whole["model"].get("merges", [])
    if not merges or any(" " in part for pair in merges for part in pair):
        return
    whole["model"]["merges"] = [" ".join(pair) for pair in merges]
    file.write_text(json.dumps(whole, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _check_roles(settings: Mapping[str, Any]) -> None:
    """Refuse a token that begins, ends or fills texts and is none of the file's: transformers looks it up."""
    count = settings[TOKENS][0] if isinstance(settings[TOKENS], tuple) else 0
    for role in ("bos", "eos", "unknown", "padding"):
        key = f"tokenizer.ggml.{role}_token_id"
        value = settings.get(key)
        if isinstance(value, int) and not 0 <= value < count:
            raise ModelError(
                f"{key} is {value}, but the file has {count} tokens; fetch a file that was converted well, "
                "or write the right id with gguf's gguf_set_metadata.py"
            )


def _kept(folder: Path, name: str, chat_template: str | None) -> PreTrainedTokenizerFast | Exception:
    """The tokenizer in a folder of the cache; what was raised where there is none, or a damaged one.

    Not by `from_pretrained`, which parses the file twice more: for Gemma's that is another second.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        roles = {role: config.get(role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
        # It gets its name afterwards: with one, transformers asks the Hub about a model of that name (for
        # vocabularies above 100,000 tokens), and without a network waits until that fails.
        found = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_file=str(folder / "tokenizer.json"), chat_template=chat_template, **roles
        )
        found.name_or_path = name
        return found
    except Exception as error:  # a damaged file is known by what breaks first, in whatever library
        return error


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
    from transformers.integrations.gguf.reader import read_gguf_metadata

    byte_level = settings.get("tokenizer.ggml.model") == "gpt2"
    rule = split_rule(settings.get("tokenizer.ggml.pre")) if byte_level else None
    # Not AutoTokenizer: it would parse the whole file only to choose a class; the tokenizer.json comes out
    # the same.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    for how in ("is_local", "local_files_only"):  # it was read; else they are saved with it
        tokenizer.init_kwargs.pop(how, None)
    backend = tokenizer.backend_tokenizer
    kinds = read_gguf_metadata(str(path))[0].get("tokenizer.ggml.token_type", [])
    _add_user_defined(backend, kinds)
    if kinds:
        backend = tokenizer._tokenizer = _without_unused(backend, kinds)
    if settings.get("tokenizer.ggml.add_space_prefix") is False:
        _remove_space_prefix(backend)
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


def _add_user_defined(backend: Any, kinds: Sequence[int]) -> None:
    """Tokens that the file calls user-defined are found in a text before anything is merged, longest first.

    transformers leaves some of them to the merges: Gemma's runs of spaces.
    """
    from tokenizers import AddedToken

    known = backend.get_added_tokens_decoder()
    names = (
        backend.id_to_token(i) for i, kind in enumerate(kinds) if kind == _USER_DEFINED and i not in known
    )
    # Normalised, because the vocabulary has them as they are after it: with another sign for the space.
    backend.add_tokens([AddedToken(name, normalized=True, special=False) for name in names if name])


def _without_unused(backend: Any, kinds: Sequence[int]) -> Any:
    """The tokenizer without the tokens that the file calls unused, and without those that it does not have.

    The former are names for rows that a model has more than its tokenizer has tokens, as Qwen's
    ``[PAD151665]``: they have no text in llama.cpp either, and nobody may write them. The latter are
    transformers' own, such as ``<|endoftext|>`` for a file without it.
    """
    from tokenizers import Tokenizer

    added = backend.get_added_tokens_decoder()
    unused = {i for i, kind in enumerate(kinds) if kind == _UNUSED and i not in added}
    if not unused and max(added, default=0) < len(kinds):
        return backend  # the largest vocabularies take seconds to be made again
    whole = json.loads(backend.to_str())
    merged = {name for pair in whole["model"]["merges"] for name in (*pair, "".join(pair))}
    words = whole["model"]["vocab"].items()
    whole["model"]["vocab"] = {name: i for name, i in words if i not in unused or name in merged}
    whole["added_tokens"] = [one for one in whole["added_tokens"] if one["id"] < len(kinds)]
    return Tokenizer.from_str(json.dumps(whole))


def _remove_space_prefix(backend: Any) -> None:
    """Put no space before a text. transformers puts one there, whatever the file says."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    mark = SPACE_MARK
    if any(step["type"] == "Prepend" for step in parts(backend.normalizer)):
        backend.normalizer = normalizers.Replace(" ", mark)
    elif any(step["type"] == "Metaspace" for step in parts(backend.pre_tokenizer)):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(mark, prepend_scheme="never", split=False)
    else:
        return
    steps = [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
