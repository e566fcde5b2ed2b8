"""libdeepen (csrc/embed) from its installed tree: the examples, and the C interface beside Python's."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded_library import ROOT, build_against, install
from libdeepen import (
    DTYPES,
    ENTRIES,
    VOCABS,
    Failed,
    Library,
    by_python,
    logits_of,
    random_maps,
    save,
)

from deepen_ext import _core
from deepen_ext.space.relative_map import RelativeMap

OK, INVALID, NOT_FINITE, BAD_FILE = 0, 1, 2, 3


@pytest.fixture(scope="module")
def prefix() -> Path:
    return install("-DDEEPEN_CUDA=OFF")


@pytest.fixture(scope="module")
def library(prefix: Path) -> Library:
    return Library(prefix)


@pytest.fixture(scope="module")
def maps() -> list[RelativeMap]:
    return random_maps()


@pytest.fixture(scope="module")
def files(maps: list[RelativeMap], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("maps")
    return save(maps, folder)


@pytest.fixture
def portable() -> Iterator[None]:
    """The portable code, for Python's operations."""
    before = _core.isa()
    _core.set_isa("portable")
    yield
    _core.set_isa(before)


@pytest.fixture
def read(library: Library, files: list[Path]) -> Iterator[list[ctypes.c_void_p]]:
    found = [library.read(path) for path in files]
    yield found
    for one in found:
        library.call.deepen_map_free(one)


def test_the_examples_run_from_the_installed_tree(
    prefix: Path, tmp_path: Path, files: list[Path], maps: list[RelativeMap]
) -> None:
    folder = build_against(prefix, ROOT / "examples" / "embed", tmp_path / "example")
    logits = [one / 10 for one in logits_of(40)]  # near one another, so that the assistant changes some
    for i, one in enumerate(logits):
        (tmp_path / f"{i}.f32").write_bytes(one.numpy().tobytes())
    given = [*map(str, files), *(str(tmp_path / f"{i}.f32") for i in range(2))]
    done = subprocess.run([folder / "fuse_logits", *given], capture_output=True, text=True, check=True)
    _, chosen = by_python(maps, logits, torch.full((40, 2), 0.5))
    assert [int(line) for line in done.stdout.split()] == chosen.tolist()
    assert not torch.equal(chosen, logits[0].argmax(1).int())
    # In C, with the static library: the assistant is sure of token 1, where the main model wavers.
    done = subprocess.run([folder / "fuse_logits_c"], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    done = subprocess.run([folder / "fuse_logits", *given[1:], "x"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be used: it is no safetensors file" in done.stderr


C_ALONE = f"""
cmake_minimum_required(VERSION 3.22)
project(alone LANGUAGES C)
find_package(deepen REQUIRED)
add_executable(fuse_logits_c "{ROOT / "examples" / "embed" / "fuse_logits.c"}")
target_link_libraries(fuse_logits_c PRIVATE deepen::deepen)
"""


@pytest.mark.parametrize("options", [(), ("-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON",)])
def test_a_project_in_c_alone(prefix: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """The shared library needs neither a C++ compiler nor OpenMP's files."""
    (tmp_path / "CMakeLists.txt").write_text(C_ALONE)
    folder = build_against(prefix, tmp_path, tmp_path / "build", *options)
    done = subprocess.run([folder / "fuse_logits_c"], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


AARCH64 = (
    *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"),
    *("-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"),
)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64-static")),
    reason="nothing was tried on aarch64: install Debian's g++-aarch64-linux-gnu and qemu-user-static",
)
def test_on_aarch64_the_numbers_are_those_of_the_portable_code(
    tmp_path: Path, files: list[Path], maps: list[RelativeMap], portable: None
) -> None:
    """Not to the last bit: aarch64 multiplies and adds in one instruction, with one rounding."""
    prefix = install("-DDEEPEN_CUDA=OFF", *AARCH64, name="embed-aarch64")
    folder = build_against(prefix, ROOT / "examples" / "embed", tmp_path / "example", *AARCH64)
    assert b"AArch64" in subprocess.run(["readelf", "-h", folder / "fuse_logits"], capture_output=True).stdout
    emulator = ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"]
    logits = [one / 10 for one in logits_of(40)]
    for i, one in enumerate(logits):
        (tmp_path / f"{i}.f32").write_bytes(one.numpy().tobytes())
    given = [*map(str, files), *(str(tmp_path / f"{i}.f32") for i in range(2)), str(tmp_path / "new.f32")]
    done = subprocess.run(
        [*emulator, folder / "fuse_logits", *given], capture_output=True, text=True, check=True
    )
    new, chosen = by_python(maps, logits, torch.full((40, 2), 0.5))
    assert [int(line) for line in done.stdout.split()] == chosen.tolist()
    assert not torch.equal(chosen, logits[0].argmax(1).int())
    there = torch.frombuffer(bytearray((tmp_path / "new.f32").read_bytes()), dtype=torch.float32)
    difference = (there.view_as(new) - new).abs()
    assert difference.max() < 1e-3 * 5 * 0.15  # as tests/ops/test_inverse_search.py asks
    assert difference[new != logits[0]].quantile(0.99) < 1e-5
    done = subprocess.run([*emulator, folder / "fuse_logits_c"], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_only_the_interface_is_exported(prefix: Path) -> None:
    (library,) = prefix.glob("lib*/libdeepen.so")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    ours = {name for name in names if "deepen" in name}
    assert ours == {
        *("deepen_interface_version", "deepen_error", "deepen_default_settings"),
        *(
            "deepen_map_read",
            "deepen_map_create",
            "deepen_map_vocab",
            "deepen_map_anchors",
            "deepen_map_free",
        ),
        *("deepen_fusion_create", "deepen_fusion_step", "deepen_fusion_free"),
    }
    needed = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "python" not in needed.lower()
    assert f"[libdeepen.so.{ctypes.CDLL(str(library)).deepen_interface_version()}]" in needed


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    "changed", [{}, {"log_probs": 0, "steps": 3, "learning_rate": 0.3}, {"candidates": 20, "threads": 2}]
)
def test_a_step_is_the_python_operations(
    library: Library,
    read: list[ctypes.c_void_p],
    maps: list[RelativeMap],
    dtype: torch.dtype,
    changed: dict[str, Any],
) -> None:
    fusion = library.fusion(read, batch=5, **changed)
    for batch in (5, 1, 3):
        logits = logits_of(batch, dtype, seed=batch)
        weights = torch.rand(batch, 2).softmax(1)
        weights[0] = torch.tensor([1.0, 0.0])
        settings = {name: value for name, value in changed.items() if name != "threads"}
        if "log_probs" in settings:
            settings["log_probs"] = bool(settings["log_probs"])
        new, chosen = by_python(maps, logits, weights, **settings)
        before = logits[1].clone()
        assert torch.equal(library.step(fusion, logits, weights), chosen)
        assert torch.equal(logits[0], new)
        assert torch.equal(logits[1], before)
    library.call.deepen_fusion_free(fusion)


def test_maps_may_go_before_their_fusion(
    library: Library, files: list[Path], maps: list[RelativeMap]
) -> None:
    read = [library.read(path) for path in files]
    fusion = library.fusion(read)
    for one in read:
        library.call.deepen_map_free(one)
    logits, weights = logits_of(1), torch.tensor([[0.5, 0.5]])
    _, chosen = by_python(maps, logits, weights)
    assert torch.equal(library.step(fusion, logits, weights), chosen)
    library.call.deepen_fusion_free(fusion)
    library.call.deepen_fusion_free(None)


def test_a_row_that_is_not_finite(library: Library, read: list[ctypes.c_void_p]) -> None:
    fusion = library.fusion(read, batch=2)
    for value, said in ((torch.nan, "has NaN or +infinity"), (-torch.inf, "has nothing but -infinity")):
        logits = logits_of(2)
        logits[1][1] = value
        before = logits[0].clone()
        with pytest.raises(Failed, match=rf"row 1 of member 1 {said.replace('+', '.')}") as error:
            library.step(fusion, logits, torch.full((2, 2), 0.5))
        assert error.value.status == NOT_FINITE
        assert torch.equal(logits[0], before)
    library.call.deepen_fusion_free(fusion)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 0}, "batch is 0; choose 1 to 4096"),
        ({"batch": 1 << 40}, "choose 1 to 4096"),
        ({"candidates": 0}, "candidates is 0"),
        ({"steps": 65}, "steps is 65; choose 0 to 64"),
        ({"learning_rate": float("nan")}, "learning_rate is"),
        ({"learning_rate": 89.0}, "learning_rate is 89; choose above 0 to 10"),
        ({"min_probability": 1.0}, "min_probability is 1; choose 0 to below 1"),
        ({"threads": 0}, "threads is 0"),
        ({"device": -2}, "device is -2"),
        ({"device": 0}, "no CUDA part; install the CUDA toolkit"),
    ],
)
def test_a_wrong_setting(
    library: Library, read: list[ctypes.c_void_p], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(Failed, match=message) as error:
        library.fusion(read, **changed)
    assert error.value.status == INVALID


def test_wrong_arguments(library: Library, read: list[ctypes.c_void_p]) -> None:
    fusion = library.fusion(read)
    with pytest.raises(Failed, match="this fusion was made for 0 to 1 rows"):
        library.step(fusion, logits_of(2), torch.full((2, 2), 0.5))
    assert library.call.deepen_fusion_step(fusion, ctypes.c_int64(1), None, None, None, None, None) == INVALID
    assert library.call.deepen_map_read(None, None) == INVALID
    with pytest.raises(Failed, match="there are 0 members; 1 to 16 are possible"):
        library.fusion([])
    library.call.deepen_fusion_free(fusion)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([torch.nan, 1.0], "the weight of member 0 in row 1 is nan"),
        ([2.0, -1.0], "the weight of member 1 in row 1 is -1; none may be negative"),
        ([torch.inf, 0.0], "member 0 in row 1 is inf"),
        ([0.5, 0.6], "the weights of row 1 sum to 1.1; they must sum to 1"),
    ],
)
def test_wrong_weights(
    library: Library, read: list[ctypes.c_void_p], weights: list[float], message: str
) -> None:
    fusion, logits = library.fusion(read, batch=2), logits_of(2)
    before = logits[0].clone()
    with pytest.raises(Failed, match=message) as error:
        library.step(fusion, logits, torch.tensor([[0.5, 0.5], weights]))
    assert error.value.status == INVALID
    assert torch.equal(logits[0], before)
    library.call.deepen_fusion_free(fusion)


@pytest.mark.skipif(shutil.which("localedef") is None, reason="no localedef to make a locale with")
def test_a_program_with_another_locale(prefix: Path, files: list[Path], tmp_path: Path) -> None:
    """Germans write 40,0: a map's numbers have a point all the same."""
    (library,) = prefix.glob("lib*/libdeepen.so")
    made = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")]
    subprocess.run(made, check=True, capture_output=True)
    program = (
        "import ctypes, locale, sys\n"
        "locale.setlocale(locale.LC_ALL, 'de_DE.UTF-8')\n"
        "assert locale.localeconv()['decimal_point'] == ','\n"
        "found = ctypes.c_void_p()\n"
        "print(ctypes.CDLL(sys.argv[1]).deepen_map_read(sys.argv[2].encode(), ctypes.byref(found)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(library), str(files[0])],
        env={**os.environ, "LOCPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{OK}\n"


def test_it_has_no_streams(prefix: Path) -> None:
    """csrc/core/check.h says why."""
    (library,) = prefix.glob("lib*/libdeepen.so")
    needed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "std::runtime_error" in needed
    assert not re.findall(r"std::.*(?:stream|streambuf|filebuf|stringbuf|locale|ios).*", needed)


def _head(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_head(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        head, rest = _head(data)
        change(head)
        text = json.dumps(head).encode()
        return struct.pack("<Q", len(text)) + text + rest

    return changed


def _facts(**new: Any) -> Callable[[bytes], bytes]:
    def change(head: dict[str, Any]) -> None:
        facts = json.loads(head["__metadata__"]["facts"]) | new
        head["__metadata__"]["facts"] = json.dumps(facts)

    return _with_head(change)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "no safetensors file|ends too early"),
    "no head": (lambda data: data[:40], "no safetensors file"),
    "head no JSON": (lambda data: data[:8] + b"[" * (len(data) - 8), "no JSON"),
    "cut off": (lambda data: data[:-100], "out of range|cut off"),
    "another format": (
        _with_head(lambda head: head["__metadata__"].update(format="x")),
        "no relative map of this version",
    ),
    "no anchors": (_facts(anchors=0), "anchors is missing or out of range"),
    "fewer anchors": (_facts(anchors=ENTRIES), "names an anchor that there is not"),
    "half an anchor": (_facts(anchors=1.5), "anchors is missing"),
    "more tokens": (_facts(vocab_size=VOCABS[0] + 1), "rows of some tokens only; in Python call fill"),
    "other entries": (_facts(entries=ENTRIES - 1), "columns is missing, or of another shape"),
    "another type": (
        _with_head(lambda head: head["values"].update(dtype="F16")),
        "values is missing, or of another shape or type",
    ),
    "a hole": (_with_head(lambda head: head.pop("rest")), "rest is missing"),
    "rows of zeros": (
        lambda data: data[: -VOCABS[0] * ENTRIES * 4] + bytes(VOCABS[0] * ENTRIES * 4),
        "does not sum to 1|names an anchor twice|not in order",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_map(library: Library, files: list[Path], tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    path = tmp_path / "damaged.map"
    path.write_bytes(change(files[0].read_bytes()))
    with pytest.raises(Failed, match=f"the relative map {path} cannot be used: .*({message})") as error:
        library.read(path)
    assert error.value.status == BAD_FILE


def test_no_damage_crashes(library: Library, files: list[Path], tmp_path: Path) -> None:
    """Random bytes changed: refused, or a map whose rows are still distributions."""
    data, path = files[0].read_bytes(), tmp_path / "changed.map"
    torch.manual_seed(2)
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        for at in torch.randint(0, len(data) if torch.rand(()) < 0.5 else 900, (3,)).tolist():
            changed[at] = int(torch.randint(0, 256, ()))
        path.write_bytes(changed)
        found = ctypes.c_void_p()
        status = library.call.deepen_map_read(str(path).encode(), ctypes.byref(found))
        assert status in (OK, BAD_FILE)
        refused += status == BAD_FILE
        library.call.deepen_map_free(found)
    assert refused > 100


def test_a_map_that_is_not_whole(library: Library, tmp_path: Path) -> None:
    one = RelativeMap.from_embedding(torch.randn(50, 8), torch.arange(20), entries=4)
    one.ensure(torch.arange(10))
    one.save(tmp_path / "part.map")
    with pytest.raises(Failed, match=r"rows of some tokens only; in Python call fill\(\) before save\(\)"):
        library.read(tmp_path / "part.map")


def test_dense_maps(library: Library, tmp_path: Path) -> None:
    torch.manual_seed(3)
    maps = [RelativeMap.from_dense(torch.randn(vocab, 30).softmax(1)) for vocab in VOCABS]
    for i, one in enumerate(maps):
        one.save(tmp_path / f"{i}.map")
    read = [library.read(tmp_path / f"{i}.map") for i in range(2)]
    logits, weights = logits_of(1), torch.tensor([[0.4, 0.6]])
    new, chosen = by_python(maps, logits, weights)
    assert torch.equal(library.step(library.fusion(read), logits, weights), chosen)
    assert torch.equal(logits[0], new)
