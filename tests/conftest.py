"""Fixtures that every test shares: the embedded models, fetched, converted and loaded once, and tiny ones of
the same architectures with the same tokenizers."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# As in the Makefile: where this is set, every process that a test starts would compile all of torch and
# transformers, and the whole suite would take half as long again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# `make test` shares the files between processes, whose threads must not keep each other from the processor.
# OpenMP reads both when torch is imported, and what tests start inherits them.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:  # transformers takes seconds to import, and tests of operations do not need it
    from transformers import PreTrainedTokenizerBase

    from deepen_ext.members.member import Member


DEMO_PAIR = ("smollm2", "gemma")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The garbage collector need not look again and again at all that torch, transformers and the tests are.

    Not while they are imported, and not when it looks at what the tests made: 4 s of a process's time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs the demo pair is slow; fixtures that take its tokenizers alone do not name it."""
    for item in items:
        if isinstance(item, pytest.Function) and set(DEMO_PAIR).intersection(item.fixturenames):
            item.add_marker("slow")


def pytest_runtest_setup() -> None:
    """Inputs drawn without a seed are the same whatever ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _rows_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Relative rows that earlier runs, maybe of other code, left in the user's cache are not read."""
    from huggingface_hub.constants import HF_ASSETS_CACHE

    from deepen_ext.ground.cache_folder import cache_dir

    own = tmp_path_factory.mktemp("rows")

    def folder(*parts: str) -> Path:
        found = cache_dir(*parts)
        return own if Path(HF_ASSETS_CACHE) in found.parents else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepen_ext.space.member_maps.cache_dir", folder)
        yield


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the maps of this module's ensembles are kept: what other modules computed is not found."""
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepen_ext.space.member_maps.cache_dir", lambda *_: folder)
        yield folder


def _demo_folder(name: str) -> Path:
    from deepen_ext.members.hf.gguf_conversion import convert_embedded

    return convert_embedded(name)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of SmolLM2-135M-Instruct, converted."""
    return _demo_folder("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma_dir() -> Path:
    """Folder of Gemma-3-270M, converted."""
    return _demo_folder("gemma-3-270m")


@pytest.fixture(scope="session")
def qwen_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tokenizer of Qwen2.5-Coder-0.5B-Instruct, without weights."""
    from deepen_ext import demo
    from deepen_ext.members.gguf.tokenizer import load_gguf_tokenizer

    folder = tmp_path_factory.mktemp("qwen")
    load_gguf_tokenizer(demo.gguf_file("qwen2.5-coder-0.5b-instruct"), "qwen").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> Member:
    """SmolLM2-135M-Instruct, float32, CPU. Read only."""
    from deepen_ext.members.loading import load_member

    return load_member(smollm2_dir)


@pytest.fixture(scope="session")
def gemma(gemma_dir: Path) -> Member:
    """Gemma-3-270M, float32, CPU. Read only."""
    from deepen_ext.members.loading import load_member

    return load_member(gemma_dir)


@pytest.fixture(scope="session")
def real_ray() -> None:
    """Ray on this machine."""
    from ray_cluster import start_ray

    start_ray()


@pytest.fixture(scope="session")
def one_byte_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A main model and an assistant: one token a byte."""
    from tiny_models import one_byte_tokens, save_model

    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / f"tiny-{seed}", one_byte_tokens(), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="session")
def tokenizers(
    request: pytest.FixtureRequest, qwen_tokenizer_dir: Path
) -> dict[str, PreTrainedTokenizerBase]:
    """Of "smollm2", "gemma" and "qwen"; Gemma's takes two seconds to read. Read only."""
    from transformers import AutoTokenizer

    found = {name: request.getfixturevalue(name).tokenizer for name in DEMO_PAIR}
    return found | {"qwen": AutoTokenizer.from_pretrained(qwen_tokenizer_dir)}


@pytest.fixture(scope="session")
def tiny_smollm2(request: pytest.FixtureRequest) -> Member:
    """SmolLM2's architecture and tokenizer in a few weights (`tiny_models.tiny_reader`). Read only."""
    from tiny_models import AWKWARD, PROSE, tiny_reader

    smollm2 = request.getfixturevalue("smollm2")
    return tiny_reader(smollm2, "tiny-smollm2", PROSE + AWKWARD, seed=1)


@pytest.fixture(scope="session")
def tiny_smollm2_dir(tiny_smollm2: Member, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `tiny_smollm2`."""
    return _saved(tiny_smollm2, tmp_path_factory.mktemp("models"))


def _saved(member: Member, folder: Path) -> Path:
    """As a converted model is kept: of Gemma's 262,144 tokens the tokenizer is read in half the time."""
    from deepen_ext.members.gguf.tokenizer import save_tokenizer

    member.model.save_pretrained(folder / member.name)
    save_tokenizer(member.tokenizer, folder / member.name)
    return folder / member.name


@pytest.fixture(scope="session")
def tiny_gemma(request: pytest.FixtureRequest) -> Member:
    """Gemma 3's; it has read less of the same text, and its sliding windows are of 16 tokens. Read only."""
    from tiny_models import AWKWARD, PROSE, tiny_reader

    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    more = {"sliding_window": 16, "layer_types": layers, "query_pre_attn_scalar": 8}
    gemma = request.getfixturevalue("gemma")
    return tiny_reader(gemma, "tiny-gemma", AWKWARD + PROSE[1200:], seed=2, **more)


@pytest.fixture(scope="session")
def tiny_gemma_dir(tiny_gemma: Member, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `tiny_gemma`."""
    return _saved(tiny_gemma, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def windowed(tiny_gemma: Member) -> Member:
    """`tiny_gemma` with windows as long as Gemma's own, 512 tokens. Read only."""
    from tiny_models import AWKWARD, PROSE, tiny_reader

    return tiny_reader(tiny_gemma, "tiny-gemma-512", AWKWARD + PROSE, seed=3, sliding_window=512)
