"""What a GGUF file says about its model, read from its header alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deepen_ext.members.gguf.checks import CHAT_TEMPLATE, TOKENS, check_gguf, failures_of_reading
from deepen_ext.members.gguf.header import Damaged

# ggml's types of weights by their numbers (`enum ggml_type`). Those that torch has too are named as in torch.
KINDS = {
    **{
        0: "float32",
        1: "float16",
        28: "float64",
        30: "bfloat16",
        24: "int8",
        25: "int16",
        26: "int32",
        27: "int64",
    },
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"},
    **{23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
# The settings that make a token an end of generation in llama.cpp. llama.cpp also takes tokens for ends by
# their text, such as <|endoftext|>; that is a guess, and no guess is made here.
_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Embeddings of tokens (Gemma 3n has a second table, for its layers), of positions and of kinds of token; and
# the table of the output.
_EMBEDDINGS = {
    f"{name}.weight"
    for name in ("token_embd", "per_layer_token_embd", "position_embd", "token_types", "output")
}
_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class GgufFacts:
    """What a GGUF file says about its model. None and empty where it says nothing.

    Attributes:
        architecture: llama.cpp's name of it.
        name: the model's name.
        context_length: tokens of a text that the model was made for.
        tokens: size of the vocabulary; 0 where the file has no tokenizer.
        tokenizer_model: kind of the tokenizer, "gpt2" for byte-level BPE.
        tokenizer_pre: name of the rule by which text is split before BPE.
        bos_id: the token that begins a text.
        add_bos: whether it is put before every text.
        eos_ids: every token that ends a text, a turn or a message, rising; and those that llama.cpp takes for
            an end where code is filled in.
        chat_template: the Jinja text of it.
        chat_templates: further templates, by their names.
        parameters: number of weights.
        non_embedding_parameters: of them outside of the embeddings and the output's table.
        tensor_types: number of tensors by the name of their type, the most frequent first.
        weight_bytes: bytes of the weights in the file.
    """

    architecture: str
    name: str | None
    context_length: int | None
    tokens: int
    tokenizer_model: str | None
    tokenizer_pre: str | None
    bos_id: int | None
    add_bos: bool | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    chat_templates: Mapping[str, str]
    parameters: int
    non_embedding_parameters: int
    tensor_types: Mapping[str, int]
    weight_bytes: int

    @property
    def all_float32(self) -> bool:
        """Whether no weight is rounded or quantised."""
        return set(self.tensor_types) == {"float32"}

    @property
    def dtype(self) -> str:
        """The types of the matrices, the most frequent first, as "Q4_1, Q8_0"; "float32" where all have it.

        Norms and biases are float32 in quantised files too, and are left out.
        """
        others = [name for name in self.tensor_types if name != "float32"]
        return ", ".join(others) or "float32"


def read_facts(path: Path) -> GgufFacts:
    """Read what a GGUF file says about its model. The weights are not touched.

    Raises:
        InputError: no such file, or it cannot be read.
        ModelError: the file is damaged, has no weights, or is one of the parts of a file that was split.
    """
    with failures_of_reading(path, "cannot read this GGUF file", "It may be truncated (fetch it again)"):
        header = check_gguf(path, weights=True)
        settings = _Settings(header.settings)
        architecture = settings.text("general.architecture") or ""
        tokens = header.settings.get(TOKENS, (0,))
        if not isinstance(tokens, tuple):
            raise Damaged(f"{TOKENS} is no list")
        ends = (settings.number(f"tokenizer.ggml.{role}_token_id") for role in _ENDS)
        sizes = {name: math.prod(one.shape) for name, one in header.tensors.items()}
        kinds = Counter(KINDS.get(one.kind, f"type {one.kind}") for one in header.tensors.values())
        return GgufFacts(
            architecture=architecture,
            name=settings.text("general.name"),
            context_length=settings.number(f"{architecture}.context_length") or None,
            tokens=tokens[0],
            tokenizer_model=settings.text("tokenizer.ggml.model"),
            tokenizer_pre=settings.text("tokenizer.ggml.pre"),
            bos_id=settings.number("tokenizer.ggml.bos_token_id"),
            add_bos=settings.flag("tokenizer.ggml.add_bos_token"),
            # llama.cpp leaves out ids beyond the vocabulary too.
            eos_ids=tuple(sorted({one for one in ends if one is not None and 0 <= one < tokens[0]})),
            chat_template=settings.text(CHAT_TEMPLATE),
            chat_templates={
                key.removeprefix(f"{CHAT_TEMPLATE}."): text
                for key in header.settings
                if key.startswith(f"{CHAT_TEMPLATE}.") and (text := settings.text(key)) is not None
            },
            parameters=sum(sizes.values()),
            non_embedding_parameters=sum(size for name, size in sizes.items() if name not in _EMBEDDINGS),
            tensor_types=dict(kinds.most_common()),
            weight_bytes=header.weight_bytes,
        )


class _Settings:
    """Settings by key, each of the type that it must have; None where the file has none."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings

    def text(self, key: str) -> str | None:
        return self._typed(key, str, "text")

    def number(self, key: str) -> int | None:
        return self._typed(key, int, "a whole number")

    def flag(self, key: str) -> bool | None:
        return self._typed(key, bool, "true or false")

    def _typed(self, key: str, kind: type[_Kind], what: str) -> _Kind | None:
        value = self._settings.get(key)
        if value is None or type(value) is kind:
            return value
        raise Damaged(f"{key} is {value!r}, not {what}")
