"""A checkpoint's tokenizer, as its file tokenizer.json says.

A config names a tokenizer class, and some of transformers' classes build their pipeline anew: they take the
vocabulary from tokenizer.json and the rules of splitting from themselves. Where the class is not the one that
the file was made for, ids differ from those that the model was trained on. The rule here: the file is right.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from deepen_ext.errors import ModelError
from deepen_ext.ground.warning import warn
from deepen_ext.members.hf.checkpoint import check_code, check_tokenizer_code, failures_of_loading

# All are in NFC and none begins with a space: a normaliser and a space put in front are the class's choice.
_PROBES = (
    "Hello world",
    "The QUICK brown Fox, isn't it? WE'LL see.",
    "def f(x):\n\tif x >= 10:\n        return {'a': [x**2, -1.5e-3]}  # ok\n",
    "line\r\nline\n\n\n  a  b   c    d",
    "441 0 12 345 6789 3.14159 1,000,000",
    "naïve façade Ångström, 今天天气很好。日本語カナ 한국어 👍🏽",
)
_SAMPLES = 500


def load_tokenizer(
    target: Path | str,
    name: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    alone: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub name.

    Where the class that its config names gives other ids than tokenizer.json, the file is used, with a
    warning.

    Args:
        target: the folder or the hub name.
        name: of the member, for messages.
        trust_remote_code: see `LoadOptions`.
        revision: of the hub.
        alone: no model's config need be beside it: an adapter's folder, or one of tokenizer files.

    Raises:
        InputError: the hub does not give it.
        ModelError: it cannot be loaded, needs code of its own, or cannot be read as its file says.
    """
    with failures_of_loading(target, name):
        if alone:
            check_tokenizer_code(target, name, trust_remote_code, revision)
        else:
            check_code(target, name, trust_remote_code, revision)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            target, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
        # The plain class reads the file as it is; code that the caller trusts has its own rules.
        if type(tokenizer) is PreTrainedTokenizerFast or not tokenizer.__module__.startswith("transformers."):
            return tokenizer
        file = cached_file(
            str(target), "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if file is None or not hasattr(tokenizer, "backend_tokenizer"):
            return tokenizer
        right = Tokenizer.from_file(file)
        if (text := _difference(right, tokenizer)) is None:
            return tokenizer
        plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            target, revision=revision or "main"
        )
        if (still := _difference(right, plain)) is not None:
            raise ModelError(
                f"{name}: tokenizer.json gives other ids for {still!r} than the tokenizer loaded with it; "
                "save the tokenizer again with save_pretrained"
            )
    warn(
        f"{name}: the config names {type(tokenizer).__name__}, which gives other ids for {text!r} than the "
        "file tokenizer.json. The file is used; set tokenizer_class to PreTrainedTokenizerFast in "
        "tokenizer_config.json"
    )
    return plain


def _difference(right: Tokenizer, tokenizer: Any) -> str | None:
    """A text that the file and the tokenizer encode differently, of `_PROBES` and a sample of the tokens."""
    both = right, tokenizer.backend_tokenizer
    size = right.get_vocab_size(with_added_tokens=False)
    tokens = [right.decode([i]).strip() for i in range(0, size, size // _SAMPLES + 1)]
    sample = (
        text for text in tokens if text and unicodedata.is_normalized("NFC", text) and "\ufffd" not in text
    )
    for text in (*_PROBES, *sample):
        ours, theirs = (one.encode(text, add_special_tokens=False).ids for one in both)
        if ours != theirs:
            return text
    return None
