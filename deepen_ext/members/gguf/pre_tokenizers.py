"""How text is split before BPE, by the name in a GGUF file (`tokenizer.ggml.pre`).

The names are those of llama.cpp (`llama-vocab.cpp`). Each stands for regular expressions that are applied in
turn: what one finds, and what lies between, becomes pieces that the next divides further. Where llama.cpp
approximates the pattern of a model's own tokenizer.json, the original stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepen_ext.errors import ModelError


@dataclass(frozen=True)
class SplitRule:
    """The splits of one name, and what llama.cpp takes for granted beside them.

    Attributes:
        patterns: regular expressions, in the order of their use.
        ignore_merges: a piece that is a token is taken whole, whatever the merges would give.
        add_bos: BOS stands before every text, unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(
    digits: str, *, endings: str = rf"{_ENDINGS}|", letters: str = r"\p{L}", rest: str = rf"[\r\n]*{_REST}"
) -> str:
    """The pattern of cl100k and its many descendants."""
    marks = rf" ?[^\s{letters}\p{{N}}]+"
    run = letters if letters == r"\p{L}" else f"[{letters}]"
    return rf"{endings}[^\r\n\p{{L}}\p{{N}}]?{run}+|{digits}|{marks}{rest}"


def _o200k(digits: str, *, endings: str = rf"{_ENDINGS}?", marks: str = r"[\r\n/]*", but: str = "") -> str:
    """The pattern of o200k, which also divides at a change from lower to upper case."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{endings}|{before}{upper}+{lower}*{endings}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{marks}{_REST}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _cl100k(r"\p{N}{1,3}")
_QWEN2 = _cl100k(r"\p{N}")
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# DeepSeek before V3 counts as CJK what lies between U+0800 and Hangul.
_WIDE_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_LATIN_LETTERS = (
    "A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK3_WORDS = rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
_DEEPSEEK3 = rf"{_DEEPSEEK3_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*{_REST}"
_DIGITS_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
_SOUTHEAST_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_FEWER_AND_FEWER_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))

_BY_RULE: dict[SplitRule, str] = {
    SplitRule((_GPT2,)): (
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat "
        "a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion granite-docling"
    ),
    SplitRule((r"\p{N}", _GPT2)): ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    SplitRule((_LLAMA3,), ignore_merges=True, add_bos=True): (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
    ),
    SplitRule((_LLAMA3,)): "dbrx smaug-bpe glm4 chatglm-bpe",
    SplitRule((_QWEN2,)): ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    SplitRule((_cl100k(r"\p{N}", letters=r"\p{L}\p{M}"),)): "qwen35",
    SplitRule((_cl100k(r"\p{N}", endings=""),)): "ufakzeka",
    SplitRule(("[^\\n]+|[\\n]+", _QWEN2)): "laguna",
    SplitRule((_cl100k(r"\p{N}", rest=r"[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),)): (
        "bailingmoe bailingmoe2 llada-moe"
    ),
    SplitRule((r"\p{N}{1,3}", _cl100k(r"\p{N}+")), ignore_merges=True): "minicpm5",
    SplitRule(
        (
            rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
            rf"|\s*[\r\n]+|{_FEWER_AND_FEWER_SPACES}|\s{{1,2}}(?!\S)|\s{{1}}",
        )
    ): "jais-2",
    SplitRule(
        (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_REST}",)
    ): "seed-coder",
    SplitRule(
        (
            rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ): "exaone-moe",
    SplitRule((_o200k(r"\p{N}", endings=""),), ignore_merges=True, add_bos=True): "tekken",
    SplitRule((_o200k(r"\p{N}{1,3}"),)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    SplitRule((_o200k(r"\p{N}{1,3}"),), ignore_merges=True): "granite-embed-multi-97m",
    SplitRule((r"\d{1,3}(?=(?:\d{3})*\b)", _o200k(r"\p{N}{1,3}"))): "tiny_aya cohere2moe",
    SplitRule((r"[\p{Han}]+|" + _o200k(r"\p{N}{1,3}", marks=r"[\r\n]*", but=r"&&[^\p{Han}]"),)): "kimi-k2",
    SplitRule(
        (
            "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c"
            "\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _CJK,
            _o200k(r"\p{N}"),
        ),
        ignore_merges=True,
    ): "youtu",
    SplitRule(
        (
            "[\r\n]",
            rf"\s?[{_LATIN_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _WIDE_CJK,
            r"\p{N}",
        )
    ): "deepseek-llm",
    SplitRule(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _WIDE_CJK, r"\p{N}")): "deepseek-coder",
    SplitRule((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    SplitRule(
        (
            r"\p{N}{1,3}",
            _CJK,
            rf"{_DEEPSEEK3_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ): "spark2_5",
    SplitRule((_DIGITS_FROM_THE_RIGHT, _SOUTHEAST_ASIAN, _DEEPSEEK3)): "afmoe",
    SplitRule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): "falcon",
    SplitRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): "default",
    SplitRule((_BLOOM,)): "bloom poro-chat gpt3-finnish",
    SplitRule((_BLOOM, r"\p{N}")): "viking",
    SplitRule((r"\p{N}+", r"(?=(\d{3})+(?!\d))")): "superbpe",
    SplitRule(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ): "chameleon",
}
SPLIT_RULES = {name: rule for rule, names in _BY_RULE.items() for name in names.split()}


def split_rule(name: Any) -> SplitRule:
    """The rule of a byte-level BPE file's `tokenizer.ggml.pre`; ModelError for a name that is not known."""
    rule = SPLIT_RULES.get(name) if isinstance(name, str) else None
    if rule is not None:
        return rule
    what = (
        "names no pre-tokenizer" if name is None else f"names the pre-tokenizer {name!r}, which is not known"
    )
    raise ModelError(
        f"its metadata {what} (tokenizer.ggml.pre), so its text would be split into other tokens than the "
        "model was trained on; use the model's Hugging Face folder, or convert it anew with a current "
        "llama.cpp, or, where you know the right name, write it with: gguf-new-metadata --pre-tokenizer NAME"
    )
