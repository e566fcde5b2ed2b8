"""Presets: written and read again, and every way in which a file can be wrong."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from deepen_ext.errors import InputError
from deepen_ext.members.source import Source, find_source, split_adapter
from deepen_ext.presets import Preset, load_preset, write_preset

DEMO = ["demo:smollm2-135m-instruct", "demo:gemma-3-270m"]


def preset_file(folder: Path, text: str) -> Path:
    file = folder / "preset.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    given = {
        "weights": [0.3, 0.7],
        "fuser": "deepen",
        "recipe": "calibrated",
        "learning_rate": 0.00001,  # YAML reads 1e-05 as text
        "relative_temperature": 20.0,
        "confidence": 0.5,
    }
    loading = {
        "backend": "transformers",
        "dtype": ["bfloat16", None],
        "threads": 2,
        "device_map": {"": "disk", "lm_head": 0},
        "max_memory": {0: "1GiB", "cpu": 5},
        "offload_folder": str(tmp_path / "spare"),
        "quantization": ["int8", None],
        "adapter": [None, "org/tuned"],
        "revision": "1234",  # no number
        "attn_implementation": "eager",
    }
    written = Preset(DEMO, given, {"items": 3, "task": "nq", "note": "naïve: ∂L/∂z"}, loading)
    file = tmp_path / "new folder" / "preset.yaml"
    write_preset(file, written)
    assert load_preset(file) == written
    assert load_preset(file).load_options() == loading
    assert load_preset(file).settings() == given
    assert [one.name for one in file.parent.iterdir()] == ["preset.yaml"]
    write_preset(file, Preset(DEMO))  # in its place
    assert load_preset(file) == Preset(DEMO)
    assert load_preset(file).settings() == {}


@pytest.mark.parametrize(
    ("given", "read"), [(2.5, 2.5), (np.float32(0.5), 0.5), ([None, 2.5], [None, 2.5])], ids=str
)
def test_a_time_limit_is_written_as_a_number(tmp_path: Path, given: Any, read: Any) -> None:
    """As text it would be refused when the file is read."""
    file = tmp_path / "far.yaml"
    write_preset(file, Preset(["a", "b"], loading={"timeout": given, "threads": np.int64(2)}))
    assert load_preset(file).loading == {"timeout": read, "threads": 2}


@pytest.mark.parametrize("given", [{"fuser": len}, {"weights": np.array([0.5, 0.5])}], ids=str)
def test_what_a_file_cannot_hold(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"far.yaml: a preset cannot hold .*; give plain numbers"):
        write_preset(tmp_path / "far.yaml", Preset(["a", "b"], given))
    assert not list(tmp_path.iterdir())


def test_embedded_members_are_models() -> None:
    assert find_source(DEMO[0]) == Source(embedded=DEMO[0].removeprefix("demo:"))
    with pytest.raises(InputError, match=r"no such embedded model; there are .*gemma-3-270m"):
        find_source("demo:gemma-4")


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    """As root `tune --out /dev/null` would have put a file in its place."""
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=r"pipe\.yaml: cannot be written: a pipe or a device"):
        write_preset(pipe, Preset(["a", "b"]))
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_paths_start_from_the_presets_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, models = tmp_path / "here", tmp_path / "models"
    for folder in (here, models / "a", here / "b"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    file = tmp_path / "presets" / "preset.yaml"
    # As named on the command line, from the current folder; what does not exist is the hub's.
    write_preset(file, Preset(["../models/a", "b", str(models / "a"), "org/name"]))
    text = file.read_text(encoding="utf-8")
    assert re.findall(r"^- (.*)$", text, re.M) == ["../models/a", "../here/b", str(models / "a"), "org/name"]
    monkeypatch.chdir(models)
    found = load_preset(file).members
    assert [Path(one).resolve() for one in found[:3]] == [models / "a", here / "b", models / "a"]
    assert found[3] == "org/name"

    beside = preset_file(models, "members: [a, ./gone]")
    monkeypatch.chdir(tmp_path)
    assert load_preset(beside).members == [str(models / "a"), str(models / "gone")]
    with pytest.raises(InputError, match="gone: no such file or folder"):
        find_source(load_preset(beside).members[1])
    stray = preset_file(tmp_path / "presets", "members: [models/a, org/name]")
    with pytest.raises(InputError, match="models/a is in the current folder, but a preset's paths start"):
        load_preset(stray)


def test_paths_and_types_of_the_options_of_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, away = tmp_path / "here", tmp_path / "presets"
    for name in ("base", "tuned", "odd@home"):
        (here / name).mkdir(parents=True)
    monkeypatch.chdir(here)
    file = away / "preset.yaml"
    members = ["base@tuned", "odd@home", "org/name@org/tuned", "demo:gemma-3-270m@tuned"]
    options = {
        "adapter": [None, Path("tuned"), None, None],
        "offload_folder": Path("spare"),  # it need not be there yet
        "dtype": torch.bfloat16,
        "device_map": {"": torch.device("cpu")},
    }
    write_preset(file, Preset(members, loading=options))
    content = yaml.safe_load(file.read_text())
    assert content["members"] == [
        "../here/base@../here/tuned",
        "../here/odd@home",
        "org/name@org/tuned",
        "demo:gemma-3-270m@../here/tuned",
    ]
    assert content["adapter"] == [None, "../here/tuned", None, None]
    assert (content["offload_folder"], content["dtype"]) == ("../here/spare", "bfloat16")
    assert content["device_map"] == {"": "cpu"}
    monkeypatch.chdir("/")
    found = load_preset(file)
    assert find_source(split_adapter(found.members[2])[0]) == Source(hub="org/name")
    pairs = [split_adapter(name) for name in found.members]
    assert [(Path(one).resolve(), Path(other or "").resolve()) for one, other in pairs[:2]] == [
        (here / "base", here / "tuned"),
        (here / "odd@home", Path("/")),
    ]
    assert Path(pairs[3][1] or "").resolve() == here / "tuned"
    assert Path(found.loading["adapter"][1]).resolve() == here / "tuned"
    assert Path(found.loading["offload_folder"]).resolve() == here / "spare"


def test_options_of_loading_above_the_file() -> None:
    preset = Preset(DEMO, loading={"device_map": "auto", "max_memory": {0: 5}, "threads": 2})
    assert preset.load_options(threads=None)["threads"] is None
    assert preset.load_options(trust_remote_code=True) == {**preset.loading, "trust_remote_code": True}
    assert preset.load_options(device="cuda") == {"threads": 2, "device": "cuda"}
    assert preset.load_options(device_map="balanced") == {"threads": 2, "device_map": "balanced"}
    assert Preset(DEMO, loading={"device": "cuda"}).load_options(device_map="auto") == {"device_map": "auto"}


def test_a_fuser_with_its_recipe_and_options_above_the_file(tmp_path: Path) -> None:
    preset = load_preset(preset_file(tmp_path, "members: [a, b]\nfuser: deepen:bytes\nweights: prompt\n"))
    assert preset.settings() == {"fuser": "deepen", "recipe": "bytes", "weights": "prompt"}
    assert preset.settings(weights="size")["weights"] == "size"
    by_size = load_preset(preset_file(tmp_path, "members: [a, b]\nweights: size\n"))
    assert by_size.settings() == {"weights": "size"}
    preset = load_preset(preset_file(tmp_path, "members: [a, b]\nfuser: deepen:bytes\nweights: prompt\n"))
    assert preset.settings(fuser="average", weights=[0.5, 0.5]) == {"fuser": "average", "weights": [0.5, 0.5]}
    assert preset.settings(learning_rate=None)["recipe"] == "bytes"

    text = "members: [a, b]\nfuser: deepen\nrecipe: calibrated\nrelative_temperature: 20\n"
    preset = load_preset(preset_file(tmp_path, text))
    assert preset.settings(recipe="calibrated")["relative_temperature"] == 20
    # A temperature belongs to its recipe.
    assert preset.settings(recipe="bytes") == {"fuser": "deepen", "recipe": "bytes"}
    assert preset.settings(fuser="deepen:paper", relative_temperature=90.0) == {
        "fuser": "deepen",
        "recipe": "paper",
        "relative_temperature": 90.0,
    }
    # A recipe given beside the fuser comes before the one behind the fuser of the file.
    preset = load_preset(preset_file(tmp_path, "members: [a, b]\nfuser: deepen:bytes\n"))
    assert preset.settings(recipe="paper") == {"fuser": "deepen", "recipe": "paper"}
    preset = load_preset(preset_file(tmp_path, "members: [a, b]\nrecipe: paper\n"))
    assert preset.settings(fuser="deepen:bytes") == {"fuser": "deepen", "recipe": "bytes"}
    # Twice the same is no contradiction.
    assert preset.settings(fuser="deepen:bytes", recipe="bytes") == {"fuser": "deepen", "recipe": "bytes"}
    for given in (Preset(DEMO), preset):
        with pytest.raises(InputError, match="fuser 'deepen:bytes' and recipe 'calibrated' contradict each"):
            given.settings(fuser="deepen:bytes", recipe="calibrated")
    preset = load_preset(
        preset_file(tmp_path, "members: [a, b]\nfuser: union-vocab\nrelative_temperature: 20\n")
    )
    assert preset.settings()["fuser"] == "union-vocab"  # it has no recipe at all
    behind = "members: [a, b]\nfuser: deepen:calibrated\nrelative_temperature: 20\n"
    preset = load_preset(preset_file(tmp_path, behind))
    assert preset.settings()["relative_temperature"] == 20
    with pytest.raises(InputError, match="fuser 'avrage'"):
        load_preset(preset_file(tmp_path, "members: [a, b]\nfuser: avrage\n")).settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "members: [a, b]\nweigths: [1, 0]\n",
            r"line 2: 'weigths' is no key of a preset; there are members,",
        ),
        ("members: [a, b]\nweights: [0.5, 0.5]\nweights: [1, 0]\n", "line 3: 'weights' stands twice"),
        ("weights: [0.5, 0.5]\n", "there is no 'members'; list the models"),
        (
            "members: [a, b]\ntrust_remote_code: true\n",
            "line 2: a file cannot choose to run a model's code; .*give --trust-remote-code yourself",
        ),
        ("members: [a, b]\ntrust_remote_code: false\n", "line 2: a file cannot choose"),
        (
            "members: [a, http://x]\napi_key: [null, env:HOME]\n",
            "line 2: a file cannot choose which of your keys is sent to a server; .*--api-key yourself",
        ),
        (
            "members: [a, b]\nattn_implementation: [null, org/fast]\n",
            "line 2: attn_implementation 'org/fast' is a kernel of the hub, and so code",
        ),
        ("members: [a, b]\nweighing: 5\n", "line 2: weighing is 5; use one of confidence, margin"),
        ("members: [a, b]\nweighing: gate\ngate: abcd\n", "line 3: gate is 'abcd'; give a list of 4 numbers"),
        ("members: [a, b]\nbackend: vllm\n", "line 2: a: there is no backend 'vllm'"),
        (
            "members: [a, b]\nthreads: 2\nquantization: [null, int2]\n",
            "line 3: b: there is no quantization 'int2'",
        ),
        ("members: [a, b]\nthreads: 0x1" + "0" * 5000, "line 2: a: threads is a huge number"),
        ("members: [a, b]\nrevision: 1234\n", "line 2: a: revision is 1234; give a branch"),
        ("members: [a, b]\ndtype: [float32]\n", "line 2: there are 1 of dtype for 2 members"),
        ("members: [a, b]\ndevice: cuda\ndevice_map: auto\n", "a: device and device_map exclude each other"),
        ("members: [a, b]\nmax_memory: {cpu: 1}\n", "line 2: a: max_memory is for device_map"),
        ('members: [a, b]\nadapter: "a\\0"\n', r"line 2: 'a\\x00' is no model's name or path"),
        ("members: a\n", "line 1: members is 'a'; give a list of models"),
        ("members: []\n", r"line 1: members is \[\]"),
        ("members: [a, 3]\n", "line 1: members is .*give a list of models"),
        ("members: [a, b]\nweights: [0.5, 0.4]\n", "line 2: weights sum to 0.9"),
        ("members: [a, b]\nweights: [0.2, 0.3, 0.5]\n", "line 2: there are 3 weights for 2 members"),
        ("members: [a, b]\nweights: even\n", r"line 2: weights is 'even'; give a list .*, size or prompt"),
        ("members: [a, b]\nweights: [0.5, yes]\n", r"line 2: weights is \[0.5, True\]"),
        (
            "members: [a, b]\n\nlearning_rate: 1e-1\n",
            "line 3: learning_rate is '1e-1'; give a number such as",
        ),
        ("members: [a, b]\nlearning_rate: true\n", "line 2: learning_rate is True"),
        ("members: [a, b]\nrelative_temperature: .inf\n", "line 2: relative_temperature is inf"),
        ("members: [a, b]\nrecipe: best\n", "line 2: recipe is 'best'; use one of bytes, calibrated, paper"),
        ("members: [a, b]\nrecipe: [bytes]\n", "line 2: recipe is .*use one of"),
        (
            "members: [a, b]\nrecipe: bytes\nrelative_temperature: 40\n",
            "line 3: the bytes recipe has no temp",
        ),
        (
            "members: [a, b]\nrelative_temperature: 20\nfuser: deepen\n",
            "line 2: the bytes recipe has no temperature; take this line out, or name another recipe",
        ),
        ("members: [a, b]\nfuser: deepen:bytes\nrelative_temperature: 40\n", "line 3: the bytes recipe has"),
        (
            "members: [a, b]\nfuser: deepen:bytes\nrecipe: calibrated\n",
            "line 3: fuser 'deepen:bytes' and recipe 'calibrated' contradict each other; keep one of them",
        ),
        ("members: [a, b]\nfuser: 3\n", "line 2: fuser is 3; give a fuser's name"),
        ("members: [a, b]\nmeasured: yes\n", "line 2: measured is True"),
        ("members: [a, b\nfuser: deepen\n", "line 2: this is no YAML: expected ',' or ']'"),
        ("members: !!python/name:os.system\n", "line 1: this is no YAML: could not determine a constructor"),
        ("members: [a, b]\nmeasured: " + "[" * 5000, "line 2: more than 20 levels"),
        ("members: [a, b]\nmeasured: " + "{a: " * 5000, "line 2: more than 20 levels"),
        ("members: [a, b]\nmeasured:" + "\n- " + "- " * 3000, "more than 20 levels"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghij"))
            + "members: *j\n",
            r"line 2: \*a is an alias; write the value out",
        ),
        ("members: &m [*m]\n", r"line 1: \*m is an alias"),
        ("members: [a, b]\nlearning_rate: 1" + "0" * 5000, "a value cannot be read: .*digits"),
        ("members: [a, b]\nlearning_rate: 0x1" + "0" * 5000, "line 2: learning_rate is a huge number; give"),
        ("members: [a, b]\nweights: [0x1" + "0" * 5000 + ", 1]", "line 2: weights is a huge number; give"),
        ("members: [a, b]\nweights: [.nan, 1]", r"line 2: weights is \[nan, 1\]; give a list"),
        ("members: [a, 0x1" + "0" * 5000 + "]", "line 1: members is a huge number"),
        ("members: [a, b]\nmeasured: 2001-99-99", "a value cannot be read: month"),
        ("members: [a, b]\nmeasured: !!bool x", "a value cannot be read"),
        ("members: [a, b]\nmeasured: !!timestamp x", "a value cannot be read"),
        ("members: [a, b]\nmeasured: !!int ''", "a value cannot be read"),
        ("members: [a, b]\n? [c]\n: d\n", "this is no YAML: found unhashable key"),
        ('members: ["a\\0", b]', r"line 1: 'a\\x00' is no model's name or path"),
        ('members: ["\\ud800", b]', r"line 1: '\\ud800' is no model's name or path"),
        ("members: [~nobody_xyz/a, b]", "line 1: '~nobody_xyz/a' is no model's name or path"),
        (f"members: [{'a' * 5000}, b]", "line 1: 'a*'?.* is no model's name or path"),
        ("# " + "x" * 200_000, "longer than 131072 bytes"),
        ("- a\n- b\n", "a preset is keys and values"),
        ("", "a preset is keys and values"),
    ],
)
def test_a_wrong_file_names_its_line_and_the_cure(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load_preset(preset_file(tmp_path, text))
    assert str(tmp_path / "preset.yaml") in str(raised.value)


def test_the_longest_and_deepest_file(tmp_path: Path) -> None:
    def written(size: int = 0, lists: int = 1) -> Path:
        text = f"members: [a, b]\nmeasured: {{a: {'[' * lists}1{']' * lists}}}\n"
        return preset_file(tmp_path, text + "#" * (size - len(text)))

    assert load_preset(written(size=131_072)).members == ["a", "b"]
    assert load_preset(written(lists=18)).members == ["a", "b"]  # in `measured`, in the file: 20 levels
    with pytest.raises(InputError, match="longer than 131072 bytes"):
        load_preset(written(size=131_073))
    with pytest.raises(InputError, match="line 2: more than 20 levels"):
        load_preset(written(lists=19))


def test_code_that_a_file_names_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fuser_of_a_preset.py").write_text(
        "open('imported', 'w').close()\ndef f(logits, said, weights):\n    return logits\n"
    )
    preset = load_preset(preset_file(tmp_path, "members: [a, b]\nfuser: fuser_of_a_preset:f\n"))
    with pytest.raises(InputError, match=r"is code, which a file cannot choose.*--fuser fuser_of_a_preset:f"):
        preset.settings()
    with pytest.raises(InputError, match="is code"):
        preset.settings(recipe="bytes")
    assert preset.settings(fuser="average") == {"fuser": "average"}
    assert not (tmp_path / "imported").exists()
    assert preset.settings(fuser="fuser_of_a_preset:f")["fuser"].__name__ == "f"  # the caller names it
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize("spec", [":f", ".:f", "..os:system", "os:"])
def test_a_fuser_that_is_no_name_of_code(spec: str) -> None:
    with pytest.raises(InputError, match=r"fuser '"):
        Preset(DEMO).settings(fuser=spec)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.yaml: cannot be read as a text file: .*No such file"):
        load_preset(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"members: \xff")
    with pytest.raises(InputError, match="cannot be read as a text file"):
        load_preset(tmp_path / "binary.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match=r"cannot be written: .*choose another place"):
        write_preset(tmp_path / "folder.yaml", Preset(DEMO))
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []
