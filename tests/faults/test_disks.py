"""Disks that take nothing more, that none may write to, and clocks that are set back; who may read what."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import random_embedding
from test_damaged_files import SECONDS, time_limit
from test_embedded import PARTS, assets, installed  # noqa: F401  (a fixture)
from test_evaluation import file_header

from deepen_ext import RelativeMap
from deepen_ext.decoding.trace import Trace
from deepen_ext.errors import DeepenError
from deepen_ext.ground.cache_folder import atomic_directory, atomic_write, sweep_temporaries, write_failure
from deepen_ext.measure.evaluation.records import ItemRecord, ItemTiming, RecordFile
from deepen_ext.measure.evaluation.summary import Summary, write_summary
from deepen_ext.members import embedded as demo
from deepen_ext.plots.output_file import write_file
from deepen_ext.presets import Preset, load_preset, write_preset

NOBODY = 65534  # root may write anywhere, whatever the bits say


def _map(folder: Path) -> None:
    relative = RelativeMap.from_embedding(
        random_embedding(200, 8, seed=0), torch.arange(0, 200, 2), entries=6
    )
    relative.ensure(torch.arange(200))
    relative.save(folder / "map.safetensors")


def _records(folder: Path) -> None:
    record = ItemRecord(0, "x" * 9000, None, False, 1, 0, "eos", ItemTiming(1.0, 1.0, 1))
    with RecordFile(folder / "triviaqa.one.jsonl", file_header("one", "a", task="triviaqa")) as file:
        file.append([record])


def _trace(folder: Path) -> None:
    trace = Trace(folder / "trace.jsonl")
    trace._write_line({"row": "x" * 9000})
    trace.close()


def _preset(folder: Path) -> None:
    write_preset(folder / "preset.yaml", Preset(["a", "b"], {}, {"numbers": list(range(3000))}))


def _plot(folder: Path) -> None:
    write_file(folder / "a.svg", "x" * 9000)


def _summary(folder: Path) -> None:
    summary = Summary({"x" * 9000: None})  # type: ignore[dict-item]
    write_summary(folder, summary)


WRITERS: dict[str, Callable[[Path], None]] = {
    **{"map": _map, "records": _records, "trace": _trace, "preset": _preset, "plot": _plot},
    "summary": _summary,
}


def _outcome(work: Callable[[], Any], *, before: Callable[[], Any]) -> str:
    """What a forked process says of its error, after it has given up some of its rights."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            before()
            work()
            said = "nothing"
        except BaseException as error:
            kind = "named" if isinstance(error, DeepenError) else type(error).__name__
            said = f"{kind} {write_failure(error)}: {error}"
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def _full() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


@pytest.mark.parametrize("name", WRITERS)
def test_no_room(tmp_path: Path, name: str) -> None:
    """No file may be longer than 4 kB. What was there is there. `MemberMaps` warns of a map's error."""
    if name != "records":
        WRITERS[name](tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    said = _outcome(lambda: WRITERS[name](tmp_path), before=_full)
    assert said.startswith("SafetensorError" if name == "map" else "named"), said
    assert os.strerror(errno.EFBIG) in said
    if name not in ("records", "trace"):  # these grow line by line
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not list(tmp_path.glob(".*.tmp-*"))
    if name == "records":
        WRITERS[name](tmp_path)
        assert len(RecordFile.read(tmp_path / "triviaqa.one.jsonl")[1]) == 1


def _without_rights() -> None:
    """Root may write whatever the bits say."""
    if os.geteuid() == 0:
        os.setresuid(*[NOBODY] * 3)


@pytest.mark.parametrize("name", WRITERS)
def test_no_right(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    for folder in (one for one in tmp_path.parents if one.is_relative_to(tempfile.gettempdir())):
        folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o555)
    said = _outcome(lambda: WRITERS[name](tmp_path), before=_without_rights)
    tmp_path.chmod(0o755)
    assert said.startswith("PermissionError" if name == "map" else "named"), said
    assert os.strerror(errno.EACCES) in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_linked_model_in_a_cache_of_another_user(
    assets: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a container whose cache was filled by root: nothing is left to write."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    installed(site, 1, PARTS[0])
    parts = (("threefold-part1", "threefold_part1/part1.bin"),)
    single = demo.Embedded("Single", "1.0", parts, hashlib.sha256(PARTS[0]).hexdigest())
    monkeypatch.setitem(demo.MODELS, "single", single)
    assert demo.gguf_file("single").is_symlink()
    above = [one for one in tmp_path.parents if one.is_relative_to(tempfile.gettempdir())]
    for folder in (tmp_path, *above):
        folder.chmod(folder.stat().st_mode | 0o055)
    folders = [one for one in assets.rglob("*") if one.is_dir()]
    for one in assets.rglob("*.lock"):
        one.chmod(0o444)
    for folder in folders:
        folder.chmod(0o555)
    said = _outcome(lambda: demo.gguf_file("single"), before=_without_rights)
    for folder in folders:
        folder.chmod(0o755)
    assert said == "nothing"


def test_a_file_system_that_flushes_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush, refused = os.fsync, []

    def files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            refused.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", files_alone)
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("new")
    with atomic_directory(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("new")
    assert len(refused) == 3
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "new"

    def nothing(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", nothing)
    with pytest.raises(OSError, match="Invalid argument"), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("newer")
    assert (tmp_path / "file").read_text() == "new"


def test_a_pipe_in_the_place_of_a_temporary(tmp_path: Path) -> None:
    """Put into a folder such as /tmp by somebody else: opening one waits for its other end."""
    pipe = tmp_path / f".map.tmp-{'0f' * 16}"
    os.mkfifo(pipe)
    os.utime(pipe, (1, 1))
    with time_limit(SECONDS):
        sweep_temporaries(tmp_path)
    assert not pipe.exists()


def test_a_clock_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a live process writes is not swept whatever the clock says; what a dead one left is."""
    dead = tmp_path / f".map.tmp-{'0f' * 16}"
    now = time.time()
    for hours in (-30, 30):
        dead.mkdir()
        with atomic_write(tmp_path / "map") as temporary:
            temporary.write_text("new")
            monkeypatch.setattr(time, "time", lambda hours=hours: now + 3600 * hours)
            sweep_temporaries(tmp_path)
            assert temporary.exists()
            assert not dead.exists()
        monkeypatch.undo()
        assert (tmp_path / "map").read_text() == "new"
    dead.mkdir()
    sweep_temporaries(tmp_path)
    assert dead.exists()  # it may be about to be locked


def test_who_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records, traces and their pages are their owner's; the rest follows the umask."""
    old = os.umask(0o022)
    try:
        for write in WRITERS.values():
            write(tmp_path)
        with atomic_write(tmp_path / "page.html", private=True) as temporary:
            assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
            temporary.write_text("a prompt")
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    mine = {"page.html", "trace.jsonl", "triviaqa.one.jsonl"}
    assert modes == {name: 0o600 if name in mine else 0o644 for name in modes}
    assert len(modes) == 7
    assert load_preset(tmp_path / "preset.yaml").members


def test_names_are_random(tmp_path: Path) -> None:
    names = set()
    for _ in range(20):
        with atomic_write(tmp_path / "file") as temporary:
            names.add(temporary.parent.name)
            temporary.write_text("x")
    assert len(names) == 20
    assert all(len(name.rpartition("-")[2]) == 32 for name in names)
