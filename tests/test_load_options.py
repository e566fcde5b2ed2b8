"""How members are loaded: the range of every option, values for all or for each, adapters, the backend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backend_stand_in import Asked, recorded
from tiny_models import one_byte_tokens, save_model

from deepen_ext import Ensemble, InputError, load_members
from deepen_ext.members.backend import Description
from deepen_ext.members.http import protocols
from deepen_ext.members.load_options import LoadOptions, options_of_each
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.members.registry import BACKENDS, PROTOCOLS
from deepen_ext.members.source import Source, find_adapter, split_adapter
from deepen_ext.members.top_k_only import TopKOnly

PAIR = ["org/a", "org/b"]


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file of that name, of which nothing is read here."""
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", one_byte_tokens(), seed=1)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path / "adapter"


@pytest.fixture
def _torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "vllm"}, "there is no backend 'vllm'; there are transformers, llama.cpp"),
        ({"backend": 1}, "there is no backend 1; there are"),
        ({"device": 0}, "device must be like 'cpu' or 'cuda:0', got 0"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, got int8"),
        ({"dtype": torch.float64}, "dtype must be one of .*, got torch.float64"),
        ({"threads": 0}, "threads is 0; give a whole number from 1 to 65,535"),
        ({"threads": True}, "threads is True; give a whole number"),
        ({"threads": "2"}, "threads is '2'; give a whole number"),
        ({"threads": 10**5000}, "threads is a huge number; give a whole number"),
        ({"trust_remote_code": "yes"}, "trust_remote_code is 'yes'; give True or False"),
        (
            {"device_map": "cuda"},
            "device_map is 'cuda'; give one of auto, .* For a model on one device give dev",
        ),
        ({"device_map": {}}, r"device_map is \{\}; give one of auto"),
        ({"device_map": 5}, "device_map is 5; give one of auto"),
        (
            {"device_map": {"layers": "gpu7"}},
            "device_map: 'layers': 'gpu7' is no module's name with a device",
        ),
        ({"device_map": {"layers": -1}}, "device_map: 'layers': -1 is no module's name"),
        ({"device_map": {"layers": True}}, "device_map: 'layers': True is no module's name"),
        ({"device_map": {3: "cpu"}}, "device_map: 3: 'cpu' is no module's name"),
        ({"device_map": "auto", "device": "cpu"}, "device and device_map exclude each other"),
        ({"device_map": "auto", "device": "cuda:1"}, "device and device_map exclude each other"),
        (
            {"max_memory": {0: 1}},
            "max_memory is for device_map; give device_map='auto', or leave max_memory out",
        ),
        ({"offload_folder": "x"}, "offload_folder is for device_map; give device_map='auto'"),
        ({"device_map": "auto", "max_memory": {}}, r"max_memory is \{\}; give a mapping"),
        ({"device_map": "auto", "max_memory": "1GB"}, "max_memory is '1GB'; give a mapping"),
        (
            {"device_map": "auto", "max_memory": {"0": 1}},
            r"max_memory is \{'0': 1\}; give a mapping of CUDA dev",
        ),
        ({"device_map": "auto", "max_memory": {0: "much"}}, r"max_memory is \{0: 'much'\}; give a mapping"),
        ({"device_map": "auto", "max_memory": {0: -1}}, r"max_memory is \{0: -1\}; give a mapping"),
        ({"device_map": "auto", "offload_folder": 3}, "offload_folder is 3; give the path of a folder"),
        ({"quantization": "int3"}, "there is no quantization 'int3'; there are int8, int4"),
        ({"quantization": 8}, "there is no quantization 8; there are int8, int4"),
        ({"adapter": ""}, "adapter is ''; give the path of its folder, or its hub name"),
        ({"adapter": 1}, "adapter is 1; give the path of its folder"),
        ({"revision": ""}, "revision is ''; give a branch, a tag or a commit"),
        ({"revision": 1234}, "revision is 1234; give a branch, a tag or a commit"),
        ({"attn_implementation": 1}, "attn_implementation is 1; give a name that transformers knows"),
        (
            {"attn_implementation": "org/fast"},
            "'org/fast' is a kernel of the hub, and so code .*trust_remote_code=T",
        ),
        ({"colour": "red"}, "there is no option 'colour'; there are adapter, api_key, attn_implementation"),
        ({"protocol": "grpc"}, "there is no protocol 'grpc'; there are llama.cpp, openai, sglang"),
        ({"timeout": 0}, "timeout is 0; choose seconds above 0"),
        ({"timeout": "soon"}, "timeout is 'soon'.*give a number"),
        ({"tokenizer": ""}, "tokenizer is ''; give a folder, a hub name"),
        ({"api_key": 5}, "api_key must be env:NAME or file:PATH, where the key is"),
        ({"threads": [1, 2, 3]}, "there are 3 of threads for 2 members; give one, or one for each"),
    ],
)
def test_what_is_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        options_of_each(PAIR, **options)
    if not re.search(r"there are \d+ of|no option", str(raised.value)):
        assert str(raised.value).startswith("org/a: ")


def test_the_member_that_is_wrong_is_named() -> None:
    with pytest.raises(InputError, match=r"^org/b: threads is 0"):
        options_of_each(PAIR, threads=[4, 0])


def test_one_for_all_and_one_for_each() -> None:
    split = {"": "disk", "lm_head": 0, "embed": "cpu", "layers": torch.device("cuda:1")}
    limits = {0: "1.5 GiB", 1: 10**9, "cpu": "20MB"}
    one, other = options_of_each(
        PAIR,
        device_map=split,
        max_memory=limits,
        offload_folder="spare",
        threads=[2, 3],
        dtype=[None, "bfloat16"],
        quantization=("int8", None),
        backend="transformers",
    )
    assert one.device_map == other.device_map == split
    assert one.max_memory == other.max_memory == limits
    assert (one.threads, other.threads) == (2, 3)
    assert (one.torch_dtype, other.torch_dtype) == (torch.float32, torch.bfloat16)
    assert (one.quantization, other.quantization) == ("int8", None)
    assert one.given().keys() == {
        "backend",
        "threads",
        "device_map",
        "max_memory",
        "offload_folder",
        "quantization",
    }
    assert options_of_each(PAIR) == [LoadOptions()] * 2
    assert options_of_each(["a"], attn_implementation="org/fast", trust_remote_code=True)[0].trust_remote_code


def test_options_that_a_backend_does_not_have() -> None:
    own = LoadOptions(backend="llama.cpp", device=torch.device("cpu"), threads=2, quantization="int8")
    with pytest.raises(
        InputError, match=r"^m: quantization='int8' is no option of the backend llama.cpp; leave"
    ):
        own.refuse_others("llama.cpp", member="m")
    own.refuse_others("llama.cpp", "quantization")


class TestAdapters:
    """`base@adapter`, in paths that may hold an @ themselves."""

    def test_the_name_is_cut(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("base", "odd@home", "odd@home/base", "tuned"):
            (tmp_path / name).mkdir()
        for name, parts in {
            "org/name": ("org/name", None),
            "org/name@tuned": ("org/name", "tuned"),
            "org/name@other/tuned": ("org/name", "other/tuned"),
            "name@odd@home/tuned": ("name", "odd@home/tuned"),
            "base@tuned": ("base", "tuned"),
            "odd@home/base": ("odd@home/base", None),  # what exists has no adapter
            "odd@home/base@tuned": ("odd@home/base", "tuned"),
            f"{tmp_path}/odd@home/base@gone": (f"{tmp_path}/odd@home/base", "gone"),
            f"{tmp_path}/odd@home/gone": (f"{tmp_path}/odd@home/gone", None),
            "demo:gemma-3-270m@tuned": ("demo:gemma-3-270m", "tuned"),
            "@tuned": ("@tuned", None),
            "base@": ("base@", None),
        }.items():
            assert split_adapter(name) == parts, name
        assert split_adapter(Path("base@tuned")) == ("base", "tuned")
        monkeypatch.chdir("/")
        assert split_adapter("odd@home/base@tuned", tmp_path) == ("odd@home/base", "tuned")

    def test_folders_and_hub_names(self, adapter: Path, tmp_path: Path) -> None:
        assert find_adapter(str(adapter)) == adapter
        assert find_adapter("org/tuned") == "org/tuned"
        with pytest.raises(InputError, match=r"the folder has no adapter_config\.json"):
            find_adapter(tmp_path)
        for wrong in (tmp_path / "gone", adapter / "adapter_config.json", "a/b/c"):
            with pytest.raises(InputError, match="no folder of an adapter, and not a hub name"):
                find_adapter(wrong)

    def test_by_name_and_by_option(self, folder: Path, adapter: Path) -> None:
        with recorded(3) as asked, pytest.raises(Asked):
            load_members(
                [f"{folder}@{adapter}", folder, "org/name@org/tuned"], adapter=[None, str(adapter), None]
            )
        assert [one[2].adapter for one in asked] == [adapter, adapter, "org/tuned"]
        assert [one[1] for one in asked] == [Source(path=folder), Source(path=folder), Source(hub="org/name")]

    def test_what_cannot_be_an_adapter(self, folder: Path, adapter: Path) -> None:
        with pytest.raises(InputError, match=r"the name has the adapter .*adapter='org/other' is given too"):
            load_member(f"{folder}@{adapter}", adapter="org/other")
        with pytest.raises(InputError, match=rf"^{folder}@/gone: /gone: no folder of an adapter"):
            load_member(f"{folder}@/gone")


class TestTheBackend:
    """Which one a member runs in."""

    def test_a_gguf_file_runs_in_llama_cpp_where_that_is_installed(self, gguf: Path, folder: Path) -> None:
        names = [str(gguf), "demo:gemma-3-270m", str(folder), "org/name"]
        with recorded(4, llama_cpp=True) as asked, pytest.raises(Asked):
            load_members(names, threads=[3, None, None, None], trust_remote_code=True)
        assert [one[0] for one in asked] == ["llama.cpp", "llama.cpp", "transformers", "transformers"]
        assert asked[0][1:] == (
            Source(path=gguf),
            LoadOptions(device=torch.device("cpu"), threads=3, trust_remote_code=True),
        )

    @pytest.mark.parametrize("option", [{"quantization": "int8"}, {"dtype": "float16"}, {"revision": "main"}])
    def test_another_backend_has_the_options_of_every_backend_alone(
        self, folder: Path, option: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else one that it does not look at would be taken in silence."""
        monkeypatch.setitem(BACKENDS, "toy", "nowhere")
        with recorded() as asked, pytest.raises(Asked):
            load_member(folder, backend="toy", threads=2)
        assert asked[0][0] == "toy"
        with recorded(), pytest.raises(InputError, match=rf"{folder}: .* is no option of the backend toy"):
            load_member(folder, backend="toy", **option)

    def test_every_kind_of_server_can_be_named(self) -> None:
        """The names are written out in registry.py: the classes need httpcore, which not everybody has."""
        assert {kind.name for kind in protocols._PROTOCOLS} == set(PROTOCOLS)

    def test_a_note_says_that_it_is_not_installed(self, gguf: Path, folder: Path) -> None:
        said: list[str] = []
        with recorded(3) as asked, pytest.raises(Asked):
            load_members([gguf, folder, "demo:gemma-3-270m"], progress=said.append, dtype="bfloat16")
        assert {one[0] for one in asked} == {"transformers"}
        assert said == [
            f"Note: llama.cpp is not installed. transformers runs {gguf} and demo:gemma-3-270m instead, "
            "converted and slower. To install it: pip install 'deepen-ext[llama-cpp]'"
        ]

    def test_what_is_chosen_counts(self, gguf: Path) -> None:
        said: list[str] = []
        for installed in (True, False):
            with recorded(2, llama_cpp=installed) as asked, pytest.raises(Asked):
                load_members([gguf, gguf], backend=["transformers", "llama.cpp"], progress=said.append)
            assert [one[0] for one in asked] == ["transformers", "llama.cpp"]
        assert said == []

    def test_on_another_device_it_runs_in_transformers(
        self, gguf: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("deepen_ext.members.loading.on_this_machine", lambda options: options)
        with recorded(1, llama_cpp=True) as asked, pytest.raises(Asked):
            load_member(gguf, device="cuda:0", dtype="bfloat16")
        assert asked[0][0] == "transformers"

    @pytest.mark.parametrize(
        "options",
        [
            {"dtype": "bfloat16"},
            {"device_map": "auto"},
            {"quantization": "int8"},
            {"adapter": "org/tuned"},
            {"revision": "main"},
            {"attn_implementation": "eager"},
        ],
    )
    def test_an_option_of_transformers_is_no_silent_choice(self, gguf: Path, options: dict[str, Any]) -> None:
        (name,) = options
        cure = rf"give backend='transformers' \(--backend transformers\), or leave {name} out"
        for member in (str(gguf), "demo:gemma-3-270m"):
            with (
                recorded(llama_cpp=True) as asked,
                pytest.raises(InputError, match=f"^{member}: .* llama.cpp, which has no {name}; {cure}"),
            ):
                load_members(["org/first", member], **{name: [None, options[name]]})
            assert asked == []  # not even the first
            with (
                recorded(llama_cpp=True) as asked,
                pytest.raises(
                    InputError, match=f"^{member}: {name}=.* is no option of the backend llama.cpp"
                ),
            ):
                load_members(
                    ["org/first", member], backend=[None, "llama.cpp"], **{name: [None, options[name]]}
                )
            assert asked == []
        with recorded(llama_cpp=True) as asked, pytest.raises(Asked):
            load_member(gguf, backend="transformers", **options)
        assert asked[0][0] == "transformers"

    def test_llama_cpp_reads_no_other_files(self, folder: Path) -> None:
        for member in (str(folder), "org/name"):
            with pytest.raises(
                InputError, match=rf"^{member}: llama.cpp reads .gguf files, and this is none"
            ):
                load_member(member, backend="llama.cpp")


@pytest.mark.usefixtures("_torch_threads")
def test_members_in_transformers_share_torchs_threads(folder: Path, gguf: Path) -> None:
    count = torch.get_num_threads() + 1
    with pytest.raises(InputError, match=r"threads: 2 for .*, 3 for org/name; members in transformers share"):
        load_members([folder, "org/name"], threads=[2, 3])
    assert torch.get_num_threads() == count - 1
    with recorded(2, llama_cpp=True), pytest.raises(Asked):
        load_members([gguf, folder], threads=[count + 1, None])  # llama.cpp's are its own
    assert torch.get_num_threads() == count - 1
    load_members([folder, folder], threads=[count, None])
    assert torch.get_num_threads() == count


class Elsewhere(TopKOnly):
    """A backend that says another name."""

    def describe(self) -> Description:
        return replace(super().describe(), backend="elsewhere 1.0")


def test_results_say_which_backend_ran(tiny_smollm2: Member, tiny_gemma: Member) -> None:
    own = f"transformers {transformers.__version__}"
    ensemble = Ensemble([tiny_smollm2, replace(tiny_gemma, backend=Elsewhere(tiny_gemma.backend, 40))])
    assert ensemble.backends == [own, "elsewhere 1.0"]
    assert ensemble.generate("The wind", max_new_tokens=2).backends == [own, "elsewhere 1.0"]
    batch = ensemble.generate(["The wind", "She sat"], max_new_tokens=2)
    assert batch.backends == [own, "elsewhere 1.0"] == batch[1].backends
    with ensemble.stream("The wind", max_new_tokens=2) as stream:
        list(stream)
        assert stream.result.backends == [own, "elsewhere 1.0"]
    assert ensemble.variant(fuser="single").backends == [own]
