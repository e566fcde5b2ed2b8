"""The tokenizer that the user names for a server's model."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepen_ext.errors import InputError
from deepen_ext.ground.paths import user_path
from deepen_ext.ground.progress import Progress
from deepen_ext.members import embedded
from deepen_ext.members.gguf.facts import read_facts
from deepen_ext.members.gguf.tokenizer import load_gguf_tokenizer

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class NamedTokenizer:
    """A tokenizer, with what stands beside it.

    Attributes:
        tokenizer: transformers' own.
        eos_ids: every id that ends a text, also by the model's configuration where it is there.
        vocab_size: number of logits; None where there is no configuration.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    vocab_size: int | None


def load_named_tokenizer(
    named: str | Path, member: str, *, trust_remote_code: bool, progress: Progress | None
) -> NamedTokenizer:
    """Load the tokenizer of `tokenizer=`.

    Args:
        named: a folder with tokenizer files, a hub name, a ``.gguf`` file, or ``demo:...``.
        member: the member's name.
        trust_remote_code: see `LoadOptions`.
        progress: called while an embedded model is fetched.

    Raises:
        InputError: no such file or folder, or the hub does not give it.
        ModelError: it cannot be loaded.
    """
    name, path = str(named), user_path(named)
    if name.startswith("demo:"):
        path = embedded.gguf_file(name.removeprefix("demo:"), progress)
    elif path.suffix.lower() == ".gguf" and not path.is_file():
        raise InputError(f"{member}: tokenizer={name}: there is no such file; check the spelling of the path")
    if path.is_file():
        facts = read_facts(path)
        return NamedTokenizer(load_gguf_tokenizer(path, member), facts.eos_ids, facts.tokens or None)
    target: Path | str = path if path.is_dir() else name
    from deepen_ext.members.hf.tokenizer_file import load_tokenizer

    alone = isinstance(target, Path) and not (target / "config.json").is_file()
    tokenizer = load_tokenizer(target, member, trust_remote_code=trust_remote_code, alone=alone)
    configs = _configs(target, trust_remote_code)
    ends: set[int] = set()
    for one in (*configs, tokenizer):
        value = getattr(one, "eos_token_id", None)
        ends.update([] if value is None else [value] if isinstance(value, int) else value)
    sizes = (getattr(one, "vocab_size", None) for one in configs)
    return NamedTokenizer(tokenizer, tuple(sorted(ends)), next((one for one in sizes if one), None))


def _configs(target: Path | str, trust_remote_code: bool) -> list[Any]:
    """The model's configurations, as far as they stand beside the tokenizer."""
    from transformers import AutoConfig, GenerationConfig

    from deepen_ext.members.hf.quiet import quiet

    found: list[Any] = []
    with quiet():
        with suppress(OSError, ValueError):  # a folder of tokenizer files alone
            config = AutoConfig.from_pretrained(target, trust_remote_code=trust_remote_code)
            found += [config.get_text_config(), config]
        with suppress(OSError, ValueError):  # many models have none
            found.append(GenerationConfig.from_pretrained(target))
    return found
