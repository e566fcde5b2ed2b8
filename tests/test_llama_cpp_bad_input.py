"""Wrong and hostile input for members in llama.cpp: clear errors, and a process that lives on."""

from __future__ import annotations

import gc
import math
import os
import random
import re
import select
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
from gguf import GGUFValueType as Type
from sessions import sync
from test_damaged_files import NUMBERS, mutated
from test_models import tiny_gguf  # noqa: F401  (a fixture)

from deepen_ext.errors import InputError, ModelError
from deepen_ext.members.gguf import pre_tokenizers
from deepen_ext.members.llama_cpp import api, library
from deepen_ext.members.llama_cpp.loaded_gguf import LoadedGguf
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

SECONDS = 10  # of processor time, for one file
MEMORY = 1 << 30  # bytes, beside what the libraries take

# Loads the files that are named on its standard input, and computes with those that it can load. It says what
# became of each; a file over which the process ends or never ends is the one without an answer.
WORKER = """
import os, resource, sys
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
import numpy, torch, transformers
from transformers import PreTrainedTokenizerFast
from deepen_ext.errors import DeepenError
from deepen_ext.members.loading import load_member

numpy.seterr(all="ignore")
torch.set_num_threads(1)

def use(path):
    member = load_member(path, backend="llama.cpp")
    with member.backend.open(2) as session:
        session.ask({0: [1, 5, 6, 7], 1: [2, 5]}, 5).wait().topk
        session.ask({0: [1, 5, 6, 7, 8, 9]}, 5, 3).wait().topk
        for said in session.read(1, list(range(1, 9)), 2, 5):
            said.topk
    member.backend.describe()
    member.backend.bytes_needed(2, 10)
    member.backend.close()

print("ready", file=answers)
for line in sys.stdin:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    try:
        use(line.rstrip())
        found = "loaded"
    except DeepenError as error:
        found = "refused " + ascii(str(error))
    except BaseException as error:
        found = f"escaped {type(error).__name__} " + ascii(str(error))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, found, file=answers)
""".replace("SECONDS", str(SECONDS))


class Worker:
    """A process that loads many files in turn, and a new one where it has ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._first = 0

    def use(self, content: bytes) -> str:
        """What became of a file: "loaded", "refused ...", "escaped ...", "ended ..."."""
        if self._process is None:
            self._start()
        assert self._process is not None
        path = self._folder / "hostile.gguf"
        path.unlink(missing_ok=True)  # another process may have the old one mapped
        path.write_bytes(content)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        answer = self._answer()
        if self._process is None:
            return answer
        memory, found = answer.split(" ", 1)
        self._first = self._first or int(memory)
        taken = int(memory) - self._first
        return found if taken < MEMORY else f"took {taken >> 20} MB"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        here = Path(__file__).parent.parent
        environment = dict(
            os.environ,
            PYTHONPATH=str(here),
            HF_ASSETS_CACHE=str(self._folder / "assets"),
            GGML_NO_BACKTRACE="1",
            OMP_NUM_THREADS="1",
        )
        with (self._folder / "said.txt").open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment,
                text=True,
            )
        self._first = 0
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        # Wall time, for a machine with other load; the process counts its own seconds.
        waits = not select.select([self._process.stdout], [], [], 300)[0]
        if not waits and (line := self._process.stdout.readline()):
            return line.rstrip("\n")
        self._process.kill()
        code = self._process.wait()
        self._process = None
        said = (self._folder / "said.txt").read_text(errors="replace").strip().splitlines()
        return f"ended {'in waiting' if waits else code}: {said[-1] if said else ''}"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    found = Worker(tmp_path_factory.mktemp("worker"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def content(tiny_gguf: Path) -> bytes:  # noqa: F811
    return tiny_gguf.read_bytes()


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))


def check_all(worker: Worker, files: dict[str, bytes]) -> Counter[str]:
    """That every file is loaded or refused; how many were."""
    found = {name: worker.use(data) for name, data in files.items()}
    wrong = {name: what for name, what in found.items() if what.split()[0] not in ("loaded", "refused")}
    assert not wrong
    return Counter(what.split()[0] for what in found.values())


def numbers_of(content: bytes) -> list[tuple[str, int, str]]:
    """Every number of a header but those in lists: what it is, where, and its form."""
    forms = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
    found: list[tuple[str, int, str]] = []
    at = 8

    def number(what: str, form: str) -> Any:
        nonlocal at
        found.append((what, at, form))
        (value,) = struct.unpack_from(f"<{form}", content, at)
        at += struct.calcsize(f"<{form}")
        return value

    def text(what: str) -> str:
        nonlocal at
        length = number(f"length of {what}", "Q")
        at += length
        return content[at - length : at].decode()

    tensors, settings = number("tensors", "Q"), number("settings", "Q")
    for _ in range(settings):
        key = text("a key")
        kind = number(f"kind of {key}", "I")
        if kind == 8:
            text(key)
        elif kind == 9:
            inner, count = number(f"inner kind of {key}", "I"), number(f"length of {key}", "Q")
            for _ in range(count):
                at += (
                    8 + struct.unpack_from("<Q", content, at)[0]
                    if inner == 8
                    else struct.calcsize(forms[inner])
                )
        else:
            number(key, forms[kind])
    for _ in range(tensors):
        name = text("a tensor's name")
        for side in range(number(f"dimensions of {name}", "I")):
            number(f"side {side} of {name}", "Q")
        number(f"type of {name}", "I")
        number(f"offset of {name}", "Q")
    return found


def with_number(content: bytes, at: int, form: str, value: float) -> bytes:
    if form in "fd":
        new = struct.pack(f"<{form}", value)
    else:
        size = struct.calcsize(form)
        new = (int(value) & (2 ** (8 * size) - 1)).to_bytes(size, "little")
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.slow
class TestHostileFiles:
    def test_the_file_itself_loads(self, worker: Worker, content: bytes) -> None:
        assert worker.use(content) == "loaded"

    def test_mutations(self, worker: Worker, content: bytes) -> None:
        header = len(content) - sum(map(len, _weights(content)))
        files = {f"seed {seed}": mutated(content, seed, header, 0.97) for seed in range(300)}
        counts = check_all(worker, files)
        assert min(counts.values()) > 5

    def test_cut_files(self, worker: Worker, content: bytes) -> None:
        cuts = sorted({*range(0, 200, 9), *range(200, len(content), len(content) // 60), len(content) - 1})
        assert check_all(worker, {f"{cut} bytes": content[:cut] for cut in cuts}) == {"refused": len(cuts)}

    def test_every_number(self, worker: Worker, content: bytes) -> None:
        """Each count, length, kind, side, type and offset, and each setting, is another."""
        random_ = random.Random(0)
        files = {}
        for what, at, form in numbers_of(content):
            (old,) = struct.unpack_from(f"<{form}", content, at)
            near = [old + 1, old - 1, old * 2, old // 2, 7]
            odd = (
                [math.nan, math.inf, -1.0, 0.0] if form in "fd" else random_.sample([*NUMBERS, -1, *near], 4)
            )
            for value in odd:
                files[f"{what}: {value}"] = with_number(content, at, form, value)
        counts = check_all(worker, files)
        assert len(files) > 300
        assert min(counts.values()) > 20


def _weights(content: bytes) -> list[bytes]:
    offsets = [
        struct.unpack_from("<Q", content, at)[0] for what, at, _ in numbers_of(content) if "offset" in what
    ]
    return [content[-(max(offsets) + 256) :]]


Fields = dict[str, tuple[Any, Type, Type | None]]


def rewritten(
    source: Path,
    target: Path,
    settings: Callable[[Fields], object] = lambda fields: None,
    weights: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> Path:
    """The file with other settings (value, kind, kind of a list's elements), or weights of numpy's types."""
    reader = gguf.GGUFReader(source)
    fields: Fields = {
        key: (field.contents(), field.types[0], field.types[-1] if field.types[0] == Type.ARRAY else None)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    settings(fields)
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture")[0])
    for key, (value, kind, inner) in fields.items():
        writer.add_key_value(key, value, kind, sub_type=inner)
    for tensor in reader.tensors:
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if weights is not None and (new := weights(tensor.name, dense)) is not dense:
            writer.add_tensor(tensor.name, new)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def put(
    key: str, value: Any, kind: Type = Type.UINT32, inner: Type | None = None
) -> Callable[[Fields], object]:
    return lambda fields: fields.__setitem__(key, (value, kind, inner))


def several(*changes: Callable[[Fields], object]) -> Callable[[Fields], object]:
    return lambda fields: [change(fields) for change in changes]


def token(at: int, text: str) -> Callable[[Fields], object]:
    return lambda fields: fields["tokenizer.ggml.tokens"][0].__setitem__(at, text)


def shorter(key: str) -> Callable[[Fields], object]:
    return lambda fields: fields[key][0].pop()


# Without a check of ours, llama.cpp ends the process over each, or never ends.
SETTINGS = {
    "experts of which none is used": (put("llama.expert_count", 8), "0 of 8 experts"),
    "used experts and none there": (put("llama.expert_used_count", 8), "8 of 0 experts"),
    "groups that do not divide the experts": (
        several(
            put("llama.expert_count", 8),
            put("llama.expert_used_count", 2),
            put("llama.expert_group_count", 3),
        ),
        "2 of 8 experts in 0 of 3 groups",
    ),
    "further layers and fewer layers": (put("llama.nextn_predict_layers", 5), "1 layers, 5 of them"),
    "an unknown scaling": (put("llama.rope.scaling.type", "x", Type.STRING), "scaling.type is 'x'"),
    "no rotation": (put("llama.rope.dimension_count", 0), "dimension_count is 0"),
    "an odd rotation": (put("llama.rope.dimension_count", 7), "dimension_count is 7"),
    "a rotation wider than a head": (put("llama.rope.dimension_count", 64), "dimension_count is 64"),
    "a negative epsilon": (
        put("llama.attention.layer_norm_rms_epsilon", -1.0, Type.FLOAT32),
        "epsilon is -1",
    ),
    "an epsilon that is no number": (
        put("llama.attention.layer_norm_rms_epsilon", math.nan, Type.FLOAT32),
        "epsilon is nan",
    ),
    "two tokens alike": (token(40, "A"), "two of its tokens are 'A'"),
    "merges that are numbers": (
        put("tokenizer.ggml.merges", [1, 2], Type.ARRAY, Type.UINT32),
        r"merges is no list, or a list of another kind",
    ),
    "tokens that are numbers": (
        put("tokenizer.ggml.tokens", [1, 2], Type.ARRAY, Type.UINT32),
        r"tokens is no list, or a list of another kind",
    ),
    "kinds for fewer tokens": (shorter("tokenizer.ggml.token_type"), "token_type has .* entries for"),
    "scores for fewer tokens": (
        put("tokenizer.ggml.scores", [1.0], Type.ARRAY, Type.FLOAT32),
        "scores has 1 entries for",
    ),
}
WEIGHTS = {
    "a norm in float16": ("output_norm.weight", np.float16, "output_norm.weight is float16; llama.cpp wants"),
    "a norm of integers": ("blk.0.attn_norm.weight", np.int32, "int32, which is no type of weights"),
    "an embedding of integers": ("token_embd.weight", np.int8, "int8, which is no type of weights"),
    "a matrix of integers": ("blk.0.attn_q.weight", np.int16, "int16, which is no type of weights"),
    "a matrix in float64": ("blk.0.ffn_down.weight", np.float64, "float64, which is no type of weights"),
}


@pytest.mark.slow
class TestWhatLlamaCppTakesForGranted:
    @pytest.mark.parametrize("name", SETTINGS)
    def test_settings(self, worker: Worker, tiny_gguf: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
        change, said = SETTINGS[name]
        self.refused(worker, rewritten(tiny_gguf, tmp_path / "changed.gguf", change), said)

    @pytest.mark.parametrize("name", WEIGHTS)
    def test_weights(self, worker: Worker, tiny_gguf: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
        which, kind, said = WEIGHTS[name]
        change = lambda tensor, dense: dense.astype(kind) if tensor == which else dense  # noqa: E731
        self.refused(worker, rewritten(tiny_gguf, tmp_path / "changed.gguf", weights=change), said)

    def refused(self, worker: Worker, path: Path, said: str) -> None:
        found = worker.use(path.read_bytes())
        assert found.startswith("refused"), found
        assert re.search(said, found.encode().decode("unicode_escape")), found
        assert "hostile.gguf" in found

    def test_what_it_can_compute_is_not_refused(
        self,
        worker: Worker,
        tiny_gguf: Path,  # noqa: F811
        tmp_path: Path,
    ) -> None:
        half = rewritten(
            tiny_gguf,
            tmp_path / "half.gguf",
            put("llama.rope.dimension_count", 32),
            lambda name, dense: dense.astype(np.float16) if dense.ndim > 1 else dense,
        )
        assert worker.use(half.read_bytes()) == "loaded"


class TestFilesOfOthers:
    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            (
                b"llama",
                b"lLama",
                r"odd: llama.cpp cannot load .*odd\.gguf: unknown model architecture: 'lLama'",
            ),
            (
                b"smollm",
                b"smollx",
                r"odd\.gguf: its metadata names the pre-tokenizer 'smollx'.*--pre-tokenizer",
            ),
            (b"ffn_down", b"ffn_dowm", r"llama.cpp cannot load .*'blk.0.ffn_down.weight' not found"),
            (
                b"ggml.tokens",
                b"ggml.tokenz",
                r"odd\.gguf: it has no tokenizer .*use a GGUF file of the whole",
            ),
        ],
    )
    def test_what_it_lacks_is_in_the_message(
        self, content: bytes, tmp_path: Path, assets: None, old: bytes, new: bytes, said: str
    ) -> None:
        path = tmp_path / "odd.gguf"
        path.write_bytes(content.replace(old, new))
        with pytest.raises(ModelError, match=said):
            load_member(path, backend="llama.cpp")

    def test_tokenizers_that_differ(
        self,
        tiny_gguf: Path,  # noqa: F811
        assets: None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A name by which llama.cpp takes every digit for itself, and we do not."""
        monkeypatch.setitem(pre_tokenizers.SPLIT_RULES, "smollm", pre_tokenizers.SPLIT_RULES["gpt-2"])
        with pytest.raises(
            ModelError, match=r"tiny: .*def f.* is .* from token 18 on by our tokenizer and .*"
        ):
            load_member(tiny_gguf, backend="llama.cpp")


class TestTheLibrary:
    @pytest.fixture(autouse=True)
    def anew(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """It is looked for again; what the process has already goes on saying why it fails."""
        kept = library.load_library()
        monkeypatch.setattr(library, "_load", library._load.__wrapped__)
        yield
        kept.call.llama_log_set(kept._log, None)

    def test_no_package(self, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        monkeypatch.delenv(library.VARIABLE, raising=False)
        monkeypatch.setattr(library, "find_spec", lambda module: None)
        with pytest.raises(
            ModelError, match=r"llama.cpp is not installed; install it with: pip install 'deepen"
        ):
            load_member(tiny_gguf, backend="llama.cpp")

    @pytest.mark.parametrize(
        ("file", "said"),
        [
            ("libm.so.6", "DEEPEN_LLAMA_CPP=libm.so.6: .*undefined symbol: llama_version"),
            ("/nowhere/libllama.so", "DEEPEN_LLAMA_CPP=/nowhere/libllama.so: .*No such file"),
        ],
    )
    def test_a_file_that_is_none(
        self,
        tiny_gguf: Path,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
        file: str,
        said: str,
    ) -> None:
        monkeypatch.setenv(library.VARIABLE, file)
        with pytest.raises(ModelError, match=rf"{said}.*unset DEEPEN_LLAMA_CPP .*pip install 'deepen-ext"):
            load_member(tiny_gguf, backend="llama.cpp")

    def test_a_version_with_other_structures(
        self,
        tiny_gguf: Path,  # noqa: F811
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """It has every function, and its defaults are not those that are documented."""
        other = self.compiled(tmp_path / "libllama.so")
        monkeypatch.delenv(library.VARIABLE, raising=False)
        monkeypatch.setattr(library, "_found", lambda: iter([(other, "llama-cpp-python 0.0.1")]))
        said = (
            r"not supported \(llama-cpp-python 0.0.1: its structures are not those of a known release\)\. "
            r"Known are .*xllamacpp 2026.*install one with: pip install 'deepen-ext\[llama-cpp\]'"
        )
        with pytest.raises(ModelError, match=said):
            load_member(tiny_gguf, backend="llama.cpp")

    def test_the_next_package_is_taken(
        self,
        tiny_gguf: Path,  # noqa: F811
        tmp_path: Path,
        assets: None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """One of two packages has an unsupported version."""
        whole = list(library._found())
        other = (self.compiled(tmp_path / "libllama.so"), "llama-cpp-python 0.0.1")
        monkeypatch.delenv(library.VARIABLE, raising=False)
        monkeypatch.setattr(library, "_found", lambda: iter([other, *whole]))
        found = library.load_library()
        assert whole[0][1] in found.name

    def compiled(self, target: Path) -> Path:
        """A library with llama.cpp's functions, of which none does anything."""
        big = ("llama_model_default_params", "llama_context_default_params")
        others = {*api._FUNCTIONS, "llama_model_load_from_file", "llama_init_from_model"}
        source = target.with_suffix(".c")
        source.write_text(
            "struct big { int field[30]; };\n"
            + "".join(
                f"struct big {one}(void) {{ struct big all = {{{{7}}}}; return all; }}\n" for one in big
            )
            + "".join(f"void *{one}(void) {{ return 0; }}\n" for one in sorted(others))
        )
        subprocess.run(["cc", "-shared", "-fPIC", "-o", target, source], check=True)
        return target


class TestOptions:
    def test_a_gpu(self, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        found = library.load_library()
        monkeypatch.setattr(found.call, "llama_supports_gpu_offload", lambda: False)
        with pytest.raises(
            ModelError, match=r"tiny: device=cuda:0 needs a llama.cpp .*CUDA, and llama.cpp .*was not"
        ):
            LlamaModel(found, tiny_gguf, "tiny", torch.device("cuda:0"))

    def test_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(
            InputError, match=rf"{tmp_path}: llama.cpp reads .gguf files, and this is none; leave"
        ):
            load_member(tmp_path, backend="llama.cpp")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("dtype", "bfloat16"),
            ("device_map", "auto"),
            ("quantization", "int8"),
            ("adapter", "org/adapter"),
            ("revision", "main"),
            ("attn_implementation", "eager"),
        ],
    )
    def test_what_transformers_alone_has(self, tiny_gguf: Path, name: str, value: str) -> None:  # noqa: F811
        with pytest.raises(InputError, match=rf"tiny\.gguf: .*{name}"):
            load_member(tiny_gguf, backend="llama.cpp", **{name: value})


@pytest.fixture
def member(tiny_gguf: Path, tmp_path: Path, assets: None) -> Member:  # noqa: F811
    """With a context that is longer than the least cache, and float32 weights: the same however it is fed."""
    longer = put("llama.context_length", 2000)
    path = rewritten(tiny_gguf, tmp_path / "longer.gguf", longer, lambda name, dense: dense.copy())
    return load_member(path, backend="llama.cpp", threads=1)


def texts(length: int, seed: int = 0) -> dict[int, list[int]]:
    """Of two lanes, with nothing in common, each a beginning of the longer ones."""
    random_ = random.Random(seed)
    ids = [[4 + lane, *(random_.randrange(4, 250) for _ in range(600))] for lane in range(2)]
    return {lane: ids[lane][:length] for lane in range(2)}


class TestTooFewCells:
    @pytest.fixture
    def few(self, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        """Every cache has 256 cells, whatever is asked for."""
        whole = LoadedGguf.new_context
        monkeypatch.setattr(LoadedGguf, "new_context", lambda loaded, lanes, cells: whole(loaded, lanes, 256))
        return monkeypatch

    def test_the_error_and_what_goes_on(self, member: Member, few: pytest.MonkeyPatch) -> None:
        name = rf"{member.name}: its forward pass failed: none of its cache's 256 positions is left; take "
        with member.backend.open(2) as session, member.backend.open(2) as other:
            before = sync(session, texts(100)).clone()
            there = sync(other, texts(90, seed=1)).clone()
            for _ in range(2):
                with pytest.raises(ModelError, match=name):
                    sync(session, texts(140))  # of 80 tokens there is room for 56
            # Both lanes hold what they held.
            assert torch.allclose(sync(session, texts(100)), before, atol=1e-4)
            again = {lane: ids[:50] + ids[60:90] for lane, ids in texts(100).items()}
            fresh = member.backend.open(2)
            assert torch.allclose(sync(session, again), sync(fresh, again), atol=1e-4)
            fresh.close()
            assert torch.equal(sync(other, texts(90, seed=1)), there)
            few.undo()
            with member.backend.open(2) as roomy:
                assert torch.allclose(sync(session, texts(300)), sync(roomy, texts(300)), atol=1e-4)

    def test_reading(self, member: Member, few: pytest.MonkeyPatch) -> None:
        with member.backend.open(2) as session:
            sync(session, texts(100))
            blocks = session.read(0, texts(600)[0], 0, 5)
            with pytest.raises(ModelError, match="none of its cache's 256 positions is left"):
                for _ in blocks:
                    pass
            assert torch.isfinite(sync(session, texts(100))).all()

    def test_memory_does_not_grow(self, member: Member, few: pytest.MonkeyPatch) -> None:
        def fail(times: int) -> int:
            for seed in range(times):
                with member.backend.open(2) as session:
                    sync(session, texts(100, seed))
                    with pytest.raises(ModelError):
                        sync(session, texts(140, seed))
            gc.collect()
            return psutil.Process().memory_info().rss

        cache = member.backend.cache_bytes(256)
        before = fail(50)
        assert fail(200) - before < 50 * cache


# Every logit that a session gave is read again, long after its buffer was written to, moved or freed.
VIEWS = """
import random, sys
import torch
from deepen_ext.members.loading import load_member

torch.set_num_threads(1)
member = load_member(sys.argv[1], backend="llama.cpp")
numbers = random.Random(0)
kept = []
for turn in range(int(sys.argv[2])):
    lanes = numbers.randint(1, 4)
    session = member.backend.open(lanes)
    for _ in range(numbers.randint(1, 6)):
        asked = numbers.sample(range(lanes), numbers.randint(1, lanes))
        positions = numbers.choice([1, 1, 2, 5, 30])
        length = numbers.randint(positions, 120)
        start = numbers.randint(4, 6)
        texts = {lane: [start + lane, *(numbers.randrange(4, 250) for _ in range(length))] for lane in asked}
        said = session.ask(texts, 5, positions).wait()
        assert said.logits.shape == (len(asked) * positions, member.vocab_size)
        kept.append((said, said.logits.sum().item()))
        for one, _ in kept:
            one.logits.sum().item()
        if numbers.random() < 0.2:
            for block in session.read(asked[0], texts[asked[0]], 0, 5):
                kept.append((block, None))
    last, total = kept[-1] if kept[-1][1] is not None else (None, None)
    session.close()
    del session
    if last is not None:
        assert last.logits.sum().item() == total
    while len(kept) > 40:
        kept.pop(numbers.randrange(len(kept)))
member.backend.close()
del member
for one, _ in kept:
    one.logits.sum().item()
print("done")
"""


@pytest.mark.slow
def test_logits_outlive_sessions_and_the_member(tiny_gguf: Path) -> None:  # noqa: F811
    """Nothing that was freed is read: the allocator fills what is freed, and reads of it end the process."""
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1")
    # Every buffer of 64 kB or more is a mapping of its own, so that a read after it was freed is a fault.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_PERTURB_": "165"}
    done = subprocess.run(
        [sys.executable, "-c", VIEWS, str(tiny_gguf), "200"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr[-2000:]
    assert done.returncode == 0
