"""`deepen-ext serve`: what it refuses before anything is loaded, and that members are loaded once."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from typer.main import get_command

from deepen_ext.commands.cli import app
from deepen_ext.commands.loading import load_ensembles, named_members
from deepen_ext.errors import InputError
from deepen_ext.presets import Preset, write_preset
from deepen_ext.serving.models import with_members
from deepen_ext.serving.run import WebServer
from deepen_ext.serving.service import Service


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--demo"),
        (["--demo", "--api-key", "the-key-itself"], "env:NAME or file:PATH"),
        (["--demo", "--api-key", "env:NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["--ensemble", "x"], "NAME=PRESET.yaml"),
        (["--ensemble", "a b=c.yaml"], "NAME=PRESET.yaml"),
        (["--ensemble", "x=not-there.yaml"], "not-there.yaml"),
        (["--demo", "--model", "a"], "the embedded pair with --demo alone"),
        (["--demo", "--queue", "0"], "--queue"),
        (["--model", "/no/a", "--model", "/no/b", "--grace", "inf"], "--grace"),
        (["--model", "/no/a", "--model", "/no/b", "--time-limit", "inf"], "--time-limit"),
        (["--model", "/no/a", "--model", "/no/b", "--max-body", "inf"], "--max-body"),
        (["--model", "/no/such/main", "--model", "/no/such/other", "--weight", "1"], "weights"),
        (["--model", "/no/such/main"], "name at least two models"),
    ],
)
def test_what_is_refused_at_once(options: list[str], words: str) -> None:
    done = run("serve", *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert "the-key-itself" not in done.stderr


def test_help_names_the_options() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    for option in ("--ensemble", "--lanes", "--queue", "--max-body", "--grace", "--log-prompts", "--api-key"):
        assert option in text
    assert "--member-api-key" in text


def test_it_listens_to_this_machine_alone_unless_told_otherwise() -> None:
    (host,) = (one for one in get_command(app).commands["serve"].params if one.name == "host")
    assert host.default == "127.0.0.1"


def test_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        load = None

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("deepen_ext.serving.run.make_app", lambda service: None)
        server = WebServer(Service(Nothing(), []), host="127.0.0.1", port=port, grace=1)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="choose another --port"):
            server.bind()


def test_a_taken_port_is_told_before_models_are_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", "--model", "/no/such/main", "--model", "/no/such/other", "--port", port)
    assert done.returncode == 2
    assert "choose another --port" in done.stderr


class TestSeveralEnsembles:
    """What is said of one is not done to the presets of others."""

    @pytest.fixture
    def ensembles(self, tmp_path: Path) -> list[str]:
        options = []
        for name in ("first", "second"):
            preset = Preset([f"/no/such/{name}", "http://elsewhere"], {"fuser": "average"})
            write_preset(tmp_path / f"{name}.yaml", preset)
            options += ["--ensemble", f"{name}={tmp_path / name}.yaml"]
        return options

    @pytest.mark.parametrize(
        "option", [("--fuser", "deepen"), ("--weight", "1"), ("--member-api-key", "env:A")]
    )
    def test_nobody_knows_whose_it_is(self, ensembles: list[str], option: Sequence[str]) -> None:
        done = run("serve", *ensembles, *option)
        assert done.returncode == 2
        assert option[0] in done.stderr
        assert "are for one ensemble" in done.stderr

    def test_it_is_for_the_main_one(self, ensembles: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        asked: dict[str, Any] = {}

        def load(wanted: dict[str, Any]) -> None:
            asked.update(wanted)
            raise InputError("enough")

        monkeypatch.setattr("deepen_ext.commands.serve.load_ensembles", load)
        own = ["--demo", "--fuser", "union-topk", "--weight", "2", "--weight", "1", "--threads", "1"]
        invoke = [*own, "--member-api-key", "env:A", "--on-failure", "continue", "--port", "0", *ensembles]
        assert "enough" in run("serve", *invoke).stderr
        _, mine = asked.pop("deepen")
        assert (mine["fuser"], mine["weights"], mine["api_key"]) == ("union-topk", [2.0, 1.0], "env:A")
        assert list(asked) == ["first", "second"]
        for _, keywords in asked.values():
            assert keywords["fuser"] == "average"
            assert not keywords.keys() & {"weights", "api_key"}
            assert (keywords["threads"], keywords["on_failure"]) == (1, "continue")


def test_members_of_several_ensembles_are_loaded_once(tiny_smollm2_dir: Path, tmp_path: Path) -> None:
    member = str(tiny_smollm2_dir)
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    write_preset(first, Preset([member, member], {"fuser": "average", "weights": [0.5, 0.5]}))
    write_preset(
        second, Preset([member, member], {"fuser": "union-topk"}, loading={"dtype": ["float32", "float16"]})
    )
    asked: dict[str, Any] = {}
    for path in (first, second):
        named = named_members(None, False, path)
        assert named.preset is not None
        asked[path.stem] = (named, named.preset.load_options() | named.preset.settings())
    found = load_ensembles(asked)
    one, other = found["first"].members
    assert one is other  # the same in all respects
    again, half = found["second"].members
    assert again.model is not half.model
    served = with_members({"deepen": found["second"]})
    assert list(served) == ["deepen", "tiny-smollm2", "tiny-smollm2#2"]
    assert served["tiny-smollm2"].members[0] is again
