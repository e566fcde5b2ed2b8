"""A cache that cannot be written to: a warning where it is not needed, a clear error where it is."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from test_models import leftovers, tiny_gguf  # noqa: F401  (a fixture)

from deepen_ext.decoding.trace import Trace
from deepen_ext.errors import ModelError
from deepen_ext.ground.cache_folder import atomic_directory, atomic_write, cache_dir, locked, write_failure
from deepen_ext.measure.evaluation.summary import Summary, write_summary
from deepen_ext.members.hf.gguf_conversion import convert_gguf, converted_folder
from deepen_ext.space.member_maps import MapSettings, MemberMaps

WAY_OUT = r"HF_ASSETS_CACHE to another folder"


@pytest.fixture(params=["a file in its place", "below a file", "a home that cannot be made"])
def no_cache(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = {"a file in its place": tmp_path / "assets", "below a file": tmp_path / "file" / "assets"}
    (tmp_path / "assets").write_text("")
    (tmp_path / "file").write_text("")
    folder = place.get(request.param, Path("/proc/nobody/assets"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder))
    return folder


def test_the_folder_and_the_way_out_are_named(no_cache: Path) -> None:
    with pytest.raises(ModelError, match=rf"{no_cache.parent}.*{WAY_OUT}"):
        cache_dir("models", "x")


def test_maps_are_made_without_it(no_cache: Path, tiny_smollm2: Any, tiny_gemma: Any) -> None:
    with pytest.warns(UserWarning, match=rf"rows are not kept for the next run: .*{WAY_OUT}"):
        maps = MemberMaps([tiny_smollm2, tiny_gemma], MapSettings("bytes", None, 32, True))
    assert maps.maps[0].ensure(torch.arange(10)) == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps.save()


def test_a_conversion_needs_it(no_cache: Path, tiny_gguf: Path) -> None:  # noqa: F811
    with pytest.raises(ModelError, match=rf"{no_cache.parent}.*{WAY_OUT}"):
        convert_gguf(tiny_gguf)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["the system's", "the library's"],
)
def test_a_full_disk_is_no_damaged_file(
    error: Exception,
    tiny_gguf: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(ModelError, match=rf"{tmp_path}.*{os.strerror(errno.ENOSPC)}.*{WAY_OUT}") as raised:
        convert_gguf(tiny_gguf)
    assert "truncated" not in str(raised.value)
    assert not leftovers(tmp_path)


def test_other_errors_are_no_full_disk() -> None:
    assert write_failure(ValueError("x")) is None
    assert write_failure(OSError("no number")) is None
    assert write_failure(FileNotFoundError(errno.ENOENT, "gone")) is None


@pytest.mark.parametrize("name", ["..", ".", "../../x", "a" * 250, "字" * 83])
def test_a_conversion_lies_below_the_hash_of_its_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file is called; and there is room in the name for what is written beside it."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    target = converted_folder("0" * 64, name)
    assert target.resolve().parent == converted_folder("0" * 64, "x").resolve().parent
    assert not target.exists()
    with locked(target), atomic_directory(target):
        pass
    assert target.is_dir()


def test_the_longest_name_that_the_system_takes(tmp_path: Path) -> None:
    """A picture's or a preset's; it was refused when it came to be written."""
    for name in ("a" * 255, "字" * 85):
        for _ in range(2):
            with atomic_write(tmp_path / name) as temporary:
                temporary.write_text(name, encoding="utf-8")
        assert os.listdir(tmp_path) == [name]
        assert (tmp_path / name).read_text(encoding="utf-8") == name
        (tmp_path / name).unlink()


def test_a_trace_on_a_full_disk() -> None:
    trace = Trace("/dev/full")
    with pytest.raises(ModelError, match=r"/dev/full: the trace cannot be written to \(No space left"):
        trace._write_line({"row": 0})
    trace.close()


def test_a_summary_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(ModelError, match=r"summary\.json: cannot be written \(Is a directory\)"):
        write_summary(tmp_path, Summary({}))
