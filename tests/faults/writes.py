"""Every write of the package, over small inputs, as `kills.py` kills them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cached_writes import Conversion, EmbeddedLink, EmbeddedModel, TokenizerConversion
from oracle import random_embedding
from test_evaluation import item_lines, timeless
from tiny_models import PROSE, one_byte_tokens, save_model

from deepen_ext import Ensemble, RelativeMap
from deepen_ext.commands.trace import trace as trace_command
from deepen_ext.errors import InputError
from deepen_ext.measure.evaluation.runner import evaluate
from deepen_ext.measure.evaluation.summary import summarise
from deepen_ext.members.loading import load_members
from deepen_ext.plots.output_file import write_file
from deepen_ext.presets import Preset, load_preset, write_preset
from deepen_ext.serving.page.trace_file import read_trace


class Map:
    """Relative rows: 300 of an earlier run, 900 after this one."""

    name = "relative map"

    def prepare(self, shared: Path) -> None:
        self.embedding = random_embedding(900, 16, seed=0)

    def _map(self) -> RelativeMap:
        return RelativeMap.from_embedding(self.embedding, torch.arange(0, 900, 10), entries=64)

    def _save(self, place: Path, rows: int) -> None:
        relative, file = self._map(), place / "rows" / "map.safetensors"
        if file.exists():
            relative.read(file)
        relative.ensure(torch.arange(rows))
        relative.save(file)

    def before(self, place: Path) -> None:
        self._save(place, 300)

    def write(self, place: Path) -> None:
        self._save(place, 900)

    def read(self, place: Path) -> str:
        relative, fresh = self._map(), self._map()
        count = relative.read(place / "rows" / "map.safetensors")
        fresh.ensure(torch.arange(count))
        assert relative.ensure(torch.arange(count)) == 0
        for one, other in zip(relative.rows[:3], fresh.rows[:3], strict=True):
            assert torch.equal(one[:count], other[:count])
        return {300: "old", 900: "new"}[count]


class PresetFile:
    """An ensemble's settings."""

    name = "preset"

    def prepare(self, shared: Path) -> None:
        self.old = Preset(["a/model", "b/model"], {"fuser": "average"})
        self.new = Preset(["c/model", "d/model"], {"weights": [0.25, 0.75]}, {"items": list(range(1000))})

    def before(self, place: Path) -> None:
        write_preset(place / "preset.yaml", self.old)

    def write(self, place: Path) -> None:
        write_preset(place / "preset.yaml", self.new)

    def read(self, place: Path) -> str:
        return {repr(self.old): "old", repr(self.new): "new"}[repr(load_preset(place / "preset.yaml"))]


class _OneFile:
    """A file that is replaced by another one."""

    name = ""

    def prepare(self, shared: Path) -> None:
        self.shared = shared

    def contents(self) -> dict[str, bytes]:
        """The old and the new one."""
        return {"old": b"old " * 200_000, "new": b"new content " * 200_000}

    def put(self, place: Path, which: str) -> None:
        write_file(place / "picture.svg", self.contents()[which])

    def before(self, place: Path) -> None:
        self.put(place, "old")

    def write(self, place: Path) -> None:
        self.put(place, "new")

    def read(self, place: Path) -> str:
        (file,) = (path for path in place.iterdir() if path.is_file())
        content = file.read_bytes()
        return next(which for which, one in self.contents().items() if one == content)


class Picture(_OneFile):
    """A plot, or `doctor`'s page."""

    name = "plot"


class TracePage(_OneFile):
    """The page that `deepen-ext trace` makes."""

    name = "trace page"

    def prepare(self, shared: Path) -> None:
        super().prepare(shared)
        token = {"id": 1, "text": " a", "probability": 0.5}
        record = {
            **{"row": 0, "position": 0, "text": " a", "token": token, "main_choice": token, "draft": None},
            **{"not_asked": None, "members": [{"name": "m", "weight": 1.0, "top": [token]}], "lost": []},
            **{"fused": [token], "ms": {"members": {"m": 1.0}}},
        }
        for which, count in (("old", 20), ("new", 400)):
            lines = [json.dumps({**record, "position": i}) for i in range(count)]
            (shared / f"{which}.jsonl").write_text("\n".join(lines) + "\n")
            trace_command(str(shared / f"{which}.jsonl"), shared / f"{which}.html")

    def contents(self) -> dict[str, bytes]:
        return {which: (self.shared / f"{which}.html").read_bytes() for which in ("old", "new")}

    def put(self, place: Path, which: str) -> None:
        trace_command(str(self.shared / f"{which}.jsonl"), place / "page.html")


class _Models:
    """An ensemble of two tiny models."""

    def prepare(self, shared: Path) -> None:
        self.shared = shared
        folders = [save_model(shared / f"tiny-{seed}", one_byte_tokens(), seed=seed) for seed in (1, 2)]
        self.ensemble = Ensemble(load_members(folders), fuser="average", cache=False, boundary_aware=False)


class TraceFile(_Models):
    """A trace, a line for each token. What a killed run leaves begins as the whole trace does."""

    name = "trace"

    def before(self, place: Path) -> None:
        self.write(self.shared)

    def write(self, place: Path) -> None:
        self.ensemble.generate(PROSE[:30], max_new_tokens=8, draft=0, trace=place / "trace.jsonl")

    def read(self, place: Path) -> str:
        whole = _without(read_trace(self.shared / "trace.jsonl"), "ms")
        assert len(whole) == 8
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*is cut off")
                found = _without(read_trace(place / "trace.jsonl"), "ms")
        except InputError as error:
            assert "No such file" in str(error) or "has no record" in str(error)  # noqa: PT017
            return "old"
        assert found == whole[: len(found)]
        return "new" if len(found) == len(whole) else "part"


def _without(records: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in one.items() if name != key} for one in records]


class Records(_Models):
    """An evaluation's records and its summary. The same call goes on, to the same lines."""

    name = "results"
    items = 3

    def prepare(self, shared: Path) -> None:
        super().prepare(shared)
        (shared / "data" / "piqa").mkdir(parents=True)
        lines = [
            {"question": f"To dry {n} hands", "A": f"use towel {n}", "B": "use oil", "answer": "AB"[n % 2]}
            for n in range(self.items)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (shared / "data" / "piqa" / "test.jsonl").write_text(text)
        self.ensembles = {"pair": self.ensemble, "one": self.ensemble.variant(fuser="union-topk")}

    def before(self, place: Path) -> None:
        self.write(self.shared / "reference")

    def write(self, place: Path) -> None:
        evaluate(
            self.ensembles,
            "piqa",
            self.shared / "data",
            out=place / "results" if place.name == "place" else place,
            batch_size=1,
            scoring="likelihood",
        )

    def read(self, place: Path) -> str:
        out, reference = place / "results", self.shared / "reference"
        lines = item_lines(reference)
        files = [path for path in out.glob("*.jsonl") if path.read_bytes()]
        if any(b"\n" in path.read_bytes() for path in files):
            summarise(out)  # what there is of whole lines can be read before the run goes on
        was_there = (out / "summary.json").exists()
        if was_there:
            self._check_summary(out, reference)
        self.write(place)
        assert item_lines(out) == lines
        assert sum(map(len, lines.values())) == 2 * self.items
        self._check_summary(out, reference)
        return "new" if was_there else "rebuilt"

    def _check_summary(self, out: Path, reference: Path) -> None:
        found, wanted = (timeless(json.loads((one / "summary.json").read_text())) for one in (out, reference))
        assert found == wanted


WRITES: dict[str, Callable[[], Any]] = {
    one.name: one
    for one in (
        PresetFile,
        Map,
        Conversion,
        Records,
        TokenizerConversion,
        EmbeddedModel,
        EmbeddedLink,
        TraceFile,
        TracePage,
        Picture,
    )
}
