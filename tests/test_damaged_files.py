"""Damaged files of every kind we read: each ends in our own error or does no harm."""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from counting import counted
from oracle import random_embedding
from safetensors import safe_open
from safetensors.torch import save_file
from test_evaluation import file_header, write
from test_models import tiny_gguf  # noqa: F401  (a fixture)

from deepen_ext import RelativeMap
from deepen_ext.errors import DeepenError, ModelError
from deepen_ext.measure.evaluation.records import RecordFile, check_folder
from deepen_ext.measure.evaluation.summary import summarise
from deepen_ext.measure.evaluation.summary_table import summary_table
from deepen_ext.members.hf.gguf_conversion import convert_gguf
from deepen_ext.presets import load_preset
from deepen_ext.space.map_file import _checksum
from deepen_ext.space.member_maps import MemberMaps

pytestmark = pytest.mark.slow

MUTATIONS = 500  # of a kind of file, in `make test`; `make fuzz` makes more (counting.py)
SECONDS = 10  # for each
MEMORY = 1 << 30  # bytes, beside what the libraries take
NUMBERS = [2**31, 2**31 - 1, 2**63, 2**63 - 1, 2**40, 2**32 - 1, 0, 1, 255]


class Hung(BaseException):
    """Not an Exception, which a reader may turn into its own."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hung

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def mutated(content: bytes, seed: int, span: int, share: float = 0.8) -> bytes:
    """The content with one to three seeded mutations, this share of them in its first `span` bytes."""
    rng = random.Random(seed)
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(min(span, len(data)) if rng.random() < share else len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 8, 200]))
        elif kind == 3:
            data[at : at + rng.choice([1, 8, 100])] = b""
        elif kind == 4:
            form = rng.choice(["<I", "<Q"])
            number = rng.choice(NUMBERS) & (2 ** (32 if form == "<I" else 64) - 1)
            data[at : at + struct.calcsize(form)] = struct.pack(form, number)
        else:
            block = bytes(data[at : at + 40])
            data[at:at] = block * rng.choice([1, 3])
    return bytes(data)


def mutated_text(content: bytes, seed: int) -> bytes:
    """As `mutated`, or a number or a word of the text becomes another one."""
    rng = random.Random(seed)
    if rng.random() < 0.4:
        return mutated(content, seed, len(content))
    words = [
        b"-1",
        b"1e999",
        b"NaN",
        b".inf",
        b"null",
        b"true",
        b"[" * 3000,
        b"{" * 3000,
        b"{}",
        b"[]",
        b'""',
    ]
    words += [
        b"9" * 5000,
        b"0x" + b"9" * 5000,
        b"*a",
        b"&a",
        b"!!int x",
        b"!!binary x",
        b"\x00",
        b"~x/y",
        b"\xff",
    ]
    words += [str(number).encode() for number in NUMBERS]
    text = content.decode()
    starts = [i for i in range(1, len(text)) if text[i].isalnum() and not text[i - 1].isalnum()]
    at = rng.choice(starts)
    end = next(i for i in range(at, len(text) + 1) if i == len(text) or not text[i].isalnum())
    return text[:at].encode() + rng.choice(words) + text[end:].encode()


def mutate(
    path: Path, content: Callable[[int], bytes], use: Callable[[Path], object], mutations: int = MUTATIONS
) -> dict[str, int]:
    """How many of the mutations were refused and how many did no harm; anything else is raised."""
    counts = {"refused": 0, "harmless": 0}
    with counted(f"file {path.name}", mutations) as seeds:
        for seed in seeds:
            path.write_bytes(content(seed))
            with time_limit(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    use(path)
                    counts["harmless"] += 1
                except DeepenError:
                    counts["refused"] += 1
                except BaseException as error:
                    raise AssertionError(f"mutation {seed} of {path}: {type(error).__name__}") from error
    assert min(counts.values()) > min(5, len(seeds) // 10), f"the mutations say nothing: {counts}"
    return counts


@pytest.fixture
def saved_map(tmp_path: Path) -> Path:
    relative = RelativeMap.from_embedding(random_embedding(60, 8, seed=0), torch.arange(0, 60, 2), entries=6)
    relative.ensure(torch.arange(40))
    relative.save(tmp_path / "whole.safetensors")
    return tmp_path / "whole.safetensors"


def rewritten(path: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """The map with its facts and tensors changed, and a checksum that fits them."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors: dict[str, Any] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    facts = json.loads(metadata["facts"])
    replaced = change(facts, tensors)
    text = replaced if isinstance(replaced, str) else json.dumps(facts)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, target, {**metadata, "facts": text, "checksum": _checksum(text, tensors)})
    return target


def put(name: str, *where_and_what: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    *where, what = where_and_what
    return lambda facts, tensors: tensors[name].__setitem__(tuple(where), what)


def fact(**changed: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda facts, tensors: facts.update(changed)


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda facts, tensors: tensors.update({name: tensors[name].to(dtype)})


def unused(facts: dict[str, Any], tensors: dict[str, Any]) -> None:
    """An entry in the middle, whose share goes to the rest: the row still sums to 1."""
    tensors["rest"][3] += tensors["values"][3, 2]
    tensors["columns"][3, 2] = -1


def wider(facts: dict[str, Any], tensors: dict[str, Any]) -> None:
    """31 entries for 30 anchors, most of them unused."""
    facts["entries"] = 31
    for name, unused in (("columns", -1), ("values", 0)):
        tensors[name] = torch.nn.functional.pad(tensors[name], (0, 25), value=unused)


FORGED = {
    "a column beyond the anchors": put("columns", 3, 2, 30),
    "a column far beyond": put("columns", 3, 2, 2**31 - 1),
    "a column below -1": put("columns", 3, 2, -2),
    "a column twice": lambda facts, tensors: put("columns", 3, 2, int(tensors["columns"][3, 1]))(
        facts, tensors
    ),
    "a column after an unused entry": unused,
    "NaN": put("values", 3, 2, float("nan")),
    "a negative value": put("values", 3, 2, -0.1),
    "an infinite value": put("values", 3, 2, float("inf")),
    "a huge rest": put("rest", 3, 1e30),
    "a rest of NaN": put("rest", 3, float("nan")),
    "a row that sums to more": put("values", 3, 0, 0.99),
    "a token beyond": put("tokens", 39, 60),
    "a token below 0": put("tokens", 0, -1),
    "a token twice": put("tokens", 1, 0),
    "values as float16": cast("values", torch.float16),
    "values as float64": cast("values", torch.float64),
    "tokens as int64": cast("tokens", torch.int64),
    "rest as bool": cast("rest", torch.bool),
    "rest missing": lambda facts, tensors: tensors.pop("rest"),
    "every tensor missing": lambda facts, tensors: tensors.clear(),
    "a tensor more": lambda facts, tensors: tensors.update(matrix=torch.ones(60, 30) / 30),
    "fewer values": lambda facts, tensors: tensors.update(values=tensors["values"][:, :5]),
    "fewer rows": lambda facts, tensors: tensors.update(rest=tensors["rest"][:30]),
    "rows flat": lambda facts, tensors: tensors.update(columns=tensors["columns"].flatten()),
    "no rows, wide": lambda facts, tensors: tensors.update(
        {n: t[:0] if t.dim() == 1 else t.new_empty(0, 1 << 40) for n, t in tensors.items()}
    ),
    "a matrix of other sizes": lambda facts, tensors: (
        tensors.clear(),
        tensors.update(matrix=torch.ones(3, 1)),
    ),
    "a huge vocabulary": fact(vocab_size=2**40),
    "a vocabulary of text": fact(vocab_size="60"),
    "a vocabulary of truth": fact(vocab_size=True),
    "a vocabulary below its rows": fact(vocab_size=39),
    "no anchors": fact(anchors=0),
    "huge anchors": fact(anchors=10**30),
    "entries of other rows": fact(entries=7),
    "more entries than anchors": wider,
    "negative entries": fact(entries=-6),
    "a source of numbers": fact(source=3),
    "an unknown recipe": fact(recipe="bytes"),
    "a recipe without temperature": fact(temperature=None),
    "a temperature of NaN": fact(temperature=float("nan")),
    "a temperature below 0": fact(temperature=-1.0),
    "a fact more": fact(more=1),
    "a fact missing": lambda facts, tensors: facts.pop("anchors"),
    "facts of a list": lambda facts, tensors: "[]",
    "facts that are no JSON": lambda facts, tensors: "{",
    "facts without end": lambda facts, tensors: "[" * 100_000,
    "facts of huge digits": lambda facts, tensors: '{"vocab_size": ' + "9" * 5000 + "}",
}


# What each is refused for: another check that fails as well would hide that one is missing.
WHY = {
    "a column is out of range": ("a column beyond the anchors", "a column far beyond", "a column below -1"),
    "a row names a column twice": ("a column twice",),
    "a column stands after an unused entry": ("a column after an unused entry",),
    "a value is negative or no number": ("NaN", "a negative value"),
    "a row does not sum to 1": ("an infinite value", "a row that sums to more"),
    "a rest is not between 0 and 1": ("a huge rest", "a rest of NaN"),
    "a token is out of range": ("a token beyond", "a token below 0"),
    "its tokens are not in order": ("a token twice",),
    "values is F(16|64)": ("values as float16", "values as float64"),
    "tokens is I64": ("tokens as int64",),
    "rest is BOOL": ("rest as bool",),
    "its tensors are columns, tokens, values": ("rest missing",),
    "its tensors are missing": ("every tensor missing",),
    "its tensors are columns, matrix, rest": ("a tensor more",),
    r"values is F32 \[40, 5\]": ("fewer values",),
    r"rest is F32 \[30\]": ("fewer rows",),
    r"columns is I32 \[240\]": ("rows flat",),
    r"columns is I32 \[0, \d+\]": ("no rows, wide",),
    r"matrix is F32 \[3, 1\]": ("a matrix of other sizes",),
    "vocab_size is": ("a huge vocabulary", "a vocabulary of text", "a vocabulary of truth"),
    "it has 40 rows of 39 tokens": ("a vocabulary below its rows",),
    "anchors is": ("no anchors", "huge anchors"),
    r"columns is I32 \[40, 6\]; expected I32 \[40, 7\]": ("entries of other rows",),
    "entries is": ("more entries than anchors", "negative entries"),
    "source is 3": ("a source of numbers",),
    "recipe is": ("an unknown recipe", "a recipe without temperature"),
    "temperature is": ("a temperature of NaN", "a temperature below 0"),
    "its facts are not vocab_size": ("a fact more", "a fact missing", "facts of a list"),
    "its facts are no JSON": ("facts that are no JSON", "facts without end", "facts of huge digits"),
}


class TestMap:
    @pytest.mark.parametrize(("name", "why"), [(name, why) for why, names in WHY.items() for name in names])
    def test_wrong_content_with_a_right_checksum(
        self, saved_map: Path, tmp_path: Path, name: str, why: str
    ) -> None:
        forged = rewritten(saved_map, tmp_path / "forged.safetensors", FORGED[name])
        with pytest.raises(ModelError, match=rf"forged\.safetensors is damaged \({why}.*\); delete it"):
            RelativeMap.load(forged)

    def test_each_is_refused_for_something(self) -> None:
        assert sorted(name for names in WHY.values() for name in names) == sorted(FORGED)

    def test_nothing_changed_is_no_damage(self, saved_map: Path, tmp_path: Path) -> None:
        same = rewritten(saved_map, tmp_path / "same.safetensors", lambda facts, tensors: None)
        assert RelativeMap.load(same).rows_known == 40

    def test_sizes_of_another_source(self, saved_map: Path, tmp_path: Path) -> None:
        embedding, anchors = random_embedding(60, 8, seed=0), torch.arange(0, 60, 2)
        wider = rewritten(saved_map, tmp_path / "wider.safetensors", fact(vocab_size=61))
        with pytest.raises(ModelError, match="damaged"):
            RelativeMap.load(wider, embedding=embedding, anchor_ids=anchors)
        mine = RelativeMap.from_embedding(embedding, anchors, entries=6)
        with pytest.raises(ModelError, match="damaged"):
            mine.read(wider)
        dense = lambda facts, tensors: (  # noqa: E731
            facts.update(entries=30),
            tensors.clear(),
            tensors.update(matrix=torch.full((60, 30), 1 / 30)),
        )
        whole = rewritten(saved_map, tmp_path / "dense.safetensors", dense)
        with pytest.raises(ModelError, match="damaged"):
            mine.read(whole)

    def test_mutations(self, saved_map: Path, tmp_path: Path) -> None:
        content = saved_map.read_bytes()

        def change(seed: int) -> bytes:
            if seed % 50 == 0:
                return content
            if seed % 2:
                return mutated(content, seed, 600)
            return forged(seed)

        def forged(seed: int) -> bytes:
            rng = random.Random(seed)

            def one(facts: dict[str, Any], tensors: dict[str, Any]) -> None:
                if rng.random() < 0.5:
                    facts[rng.choice(list(facts))] = rng.choice([*NUMBERS, -1, "x", None, [], 0.5, 1e30])
                else:
                    tensor = tensors[rng.choice(["columns", "values", "rest", "tokens"])].view(-1)
                    raw = tensor.view(torch.uint8)
                    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)

            # A value's lower bits stay within what a row may sum to: nobody can tell, and it does no harm.
            return rewritten(saved_map, tmp_path / "forged.safetensors", one).read_bytes()

        def check(path: Path) -> None:
            loaded = RelativeMap.load(path)
            rows = loaded.rows
            known = loaded.table.known
            assert rows.columns is not None
            assert rows.rest is not None
            assert -1 <= int(rows.columns[known].min()) <= int(rows.columns[known].max()) < rows.anchors
            assert bool(torch.isfinite(rows.values[known]).all())

        mutate(tmp_path / "map.safetensors", change, check)


def test_the_ensembles_own_damaged_map_is_made_anew(
    tiny_smollm2: Any, tiny_gemma: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    settings: Any = ("bytes", None, 32, True)
    maps = MemberMaps([tiny_smollm2, tiny_gemma], _settings(settings))
    for one in maps.maps:
        one.ensure(torch.arange(50))
    maps.save()
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        rewritten(file, tmp_path / "forged", put("columns", 3, 0, 2**31 - 1))
        shutil.move(tmp_path / "forged", file)
    with pytest.warns(UserWarning, match=r"is damaged \(a column is out of range\).*computed anew"):
        again = MemberMaps([tiny_smollm2, tiny_gemma], _settings(settings))
    assert [one.rows_known for one in again.maps] == [0, 0]
    assert [one.ensure(torch.arange(50)) for one in again.maps] == [50, 50]


def _settings(values: Any) -> Any:
    from deepen_ext.space.member_maps import MapSettings

    return MapSettings(*values)


@pytest.mark.slow
def test_presets(tmp_path: Path) -> None:
    content = (
        b"members: [demo:smollm2-135m-instruct, demo:gemma-3-270m]\nweights: [0.4, 0.6]\nfuser: deepen\n"
        b"recipe: calibrated\nlearning_rate: 0.25\nrelative_temperature: 40\nconfidence: 0.5\n"
        b"measured: {items: 3, task: nq, when: 2026-01-02, by: {a: [1, 2.5, x]}}\n"
    )

    def use(path: Path) -> None:
        load_preset(path).settings()

    mutate(tmp_path / "preset.yaml", lambda seed: mutated_text(content, seed), use)


def test_results(tmp_path: Path) -> None:
    content = write(tmp_path, file_header("a", "A"), [True, False, True, True]).read_bytes()
    write(tmp_path, file_header("b", "B"), [True, False, True, True])
    header = file_header("a", "A")

    def use(path: Path) -> None:
        summary_table(summarise(path.parent))
        check_folder(path.parent, header["task"])
        with RecordFile(path, header) as file:
            assert all(type(index) is int for index in file.done)

    mutate(tmp_path / "nq.a.jsonl", lambda seed: mutated_text(content, seed), use)


HUGE = """
import resource, sys
from pathlib import Path
import torch, yaml, safetensors.torch, deepen_ext.measure.evaluation.summary
from deepen_ext import RelativeMap
from deepen_ext.errors import DeepenError
from deepen_ext.measure.evaluation.records import RecordFile
from deepen_ext.members.gguf.checks import check_gguf
from deepen_ext.members.gguf.header import Damaged
from deepen_ext.presets import load_preset

def gguf(path):
    check_gguf(path, weights=True)

readers = {".safetensors": RelativeMap.load, ".yaml": load_preset, ".jsonl": RecordFile.read, ".gguf": gguf}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        readers[Path(name).suffix](Path(name))
        print("read", name)
    except (DeepenError, Damaged):
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_numbers_of_a_file_reserve_no_memory(
    saved_map: Path,
    tiny_gguf: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    files = []
    for number, name in enumerate(FORGED):
        files.append(rewritten(saved_map, tmp_path / f"{number}.safetensors", FORGED[name]))
    (tmp_path / "bomb.yaml").write_text(
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefghij"))
        + "members: *j\n"
    )
    (tmp_path / "deep.jsonl").write_text("[" * 1_000_000 + "\n\n\n")
    content = tiny_gguf.read_bytes()
    for at in range(8, 4000, 4):  # every count, length, side and offset of the file's beginning
        file = tmp_path / f"{at}.gguf"
        file.write_bytes(content[:at] + struct.pack("<Q", 2**40) + content[at + 8 : 4200])
        files.append(file)
    arguments = [*map(str, files), str(tmp_path / "bomb.yaml"), str(tmp_path / "deep.jsonl")]
    done = subprocess.run(
        [sys.executable, "-c", HUGE, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) * 1024 < MEMORY  # nothing but the number: none of the files was read


@pytest.mark.slow
def test_gguf(
    tiny_gguf: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    content = tiny_gguf.read_bytes()
    header = gguf.GGUFReader(tiny_gguf).data_offset

    def use(path: Path) -> None:
        folder = convert_gguf(path)
        assert (folder / "model.safetensors").is_file()
        shutil.rmtree(folder.parent)

    mutate(tmp_path / "file.gguf", lambda seed: mutated(content, seed, header, 0.95), use)
    assert [one for one in (tmp_path / "assets").rglob("*") if ".tmp-" in one.name] == []
