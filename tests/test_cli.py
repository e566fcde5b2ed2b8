"""The command line as a script sees it: its streams and its exit code.

The demo pair, and what needs a process (signals, pipes, a terminal, what is imported), are in processes of
their own; the rest is in this one, on small models.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import typer
from backend_stand_in import Asked, recorded
from command_line import COMMAND, ROOT, run, run_process
from tiny_models import one_byte_tokens, save_model

from deepen_ext import __version__
from deepen_ext.commands import console
from deepen_ext.commands.options import FUSER_NAMES
from deepen_ext.errors import ModelError
from deepen_ext.fusers import FUSERS
from deepen_ext.members import loading
from deepen_ext.members.load_options import LOAD_OPTIONS


@pytest.fixture
def _demo_models(smollm2_dir: Path, gemma_dir: Path) -> None:
    """Converted beforehand, so that no test here waits for it."""


@pytest.fixture(scope="module")
def models(tiny_smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small SmolLM2, which has a chat template, and a model of single bytes, which has none."""
    folder = tmp_path_factory.mktemp("models") / "bytes"
    save_model(folder, one_byte_tokens(), seed=1)
    return ["--model", str(tiny_smollm2_dir), "--model", str(folder)]


def test_help_and_version() -> None:
    done = run("generate", "--help")
    assert done.returncode == 0
    for option in ("--model", "--demo", "--prompt", "--max-new-tokens", "--weight", "--json", "--debug"):
        assert option in done.stdout
    assert run("--version").stdout == f"deepen-ext {__version__}\n"


def test_help_names_every_fuser() -> None:
    """The names are written out in options.py, because importing the fusers loads torch."""
    named = re.findall(r"[\w-]+", FUSER_NAMES)
    assert {name for name in FUSERS if name != "single"} <= set(named)


def test_nll_refuses_spans_before_it_loads(tmp_path) -> None:
    (tmp_path / "text").write_text("some text")
    done = run(
        "nll", "--model", "no/a", "--model", "no/b", "--text", str(tmp_path / "text"), "--fuser", "spans"
    )
    assert done.returncode == 2
    assert "there is no likelihood" in done.stderr


def test_progress_in_a_log_has_a_line_now_and_then(monkeypatch, capsys) -> None:
    """What does not take long by its name is told when nothing has been for half a minute."""
    clock = [0.0]
    monkeypatch.setattr(console, "monotonic", lambda: clock[0])
    with console.progress() as say:
        for seconds, message in ((29, "Reading dev items, 1 of 20"), (31, "Reading dev items, 2 of 20"),
                                 (32, "Converting a, 1 of 2"), (61, "Trying configuration 1"),
                                 (62, "Trying configuration 2")):  # fmt: skip
            clock[0] = seconds
            say(message)
    assert capsys.readouterr().err.splitlines() == [
        "Reading dev items, 2 of 20", "Converting a", "Trying configuration 2"
    ]  # fmt: skip


BRACKETS = "m[red] :fire:"  # to rich a colour and a picture


def test_a_name_with_brackets_in_a_table(tiny_smollm2_dir: Path, tmp_path: Path) -> None:
    named = tmp_path / BRACKETS
    named.symlink_to(tiny_smollm2_dir)
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog.")
    models = ["--model", str(tiny_smollm2_dir), "--model", str(named)]
    done = run("nll", *models, "--text", str(tmp_path / "text"), "--fuser", "average")
    assert done.returncode == 0, done.stderr
    assert BRACKETS in done.stdout


@pytest.mark.parametrize("message", [f"Loading {BRACKETS}", f"Note: {BRACKETS}"])
def test_a_name_with_brackets_in_the_progress_of_a_terminal(monkeypatch, capsys, message: str) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.progress() as say:
        say(message)
    assert BRACKETS in capsys.readouterr().err


def test_an_error_does_not_control_the_terminal(capsys) -> None:
    with pytest.raises(typer.Exit), console.exit_codes(False):
        raise ModelError("the server says: \x1b]0;title\x07\r\x9b2J\n\tgone")
    assert capsys.readouterr().err == (r"error: the server says: \x1b]0;title\x07\x0d\x9b2J" + "\n\tgone\n")


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys, deepen_ext.commands.cli; print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
@pytest.mark.usefixtures("_demo_models")
def test_the_demo_pair_in_a_process() -> None:
    done = run_process("generate", "--demo", "--max-new-tokens", "10", stdin="The capital of France is\n")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert re.search(
        r"10 tokens by SmolLM2-135M-Instruct, \d+ of them changed by Gemma-3-270M", done.stderr
    ), done.stderr


def test_the_same_text_from_standard_input_and_as_json(models: list[str]) -> None:
    """Streamed, then as JSON; the second command computes no relative row anew."""
    prompt = "She sat on her suitcase"
    streamed = run("generate", *models, "--max-new-tokens", "10", stdin=f"{prompt}\n")
    assert streamed.returncode == 0, streamed.stderr
    done = run("generate", *models, "--prompt", prompt, "--max-new-tokens", "10", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) >= {
        "text",
        "tokens",
        "finish_reason",
        "ms_per_token",
        "fusion_ms_per_token",
        "members",
    }
    assert report["tokens"] == len(report["token_ids"]) == 10
    assert report["finish_reason"] == "length"
    assert len(report["text"]) > 20
    assert [member["name"] for member in report["members"]] == ["tiny-smollm2", "bytes"]
    assert report["weights"] == "size"
    assert [member["weight"] for member in report["members"]] == [None, None]  # found for this prompt
    assert 0 < report["fusion_ms_per_token"] < report["ms_per_token"]
    assert report["rows_computed"] == 0
    own = f"transformers {transformers.__version__}"
    assert report["backends"] == [own, own]
    assert streamed.stderr.endswith(f"; run by {own}\n")
    assert streamed.stdout == report["text"] + "\n"
    assert f"{report['changed_tokens']} of them changed by bytes" in streamed.stderr


def test_sampling_and_stop_strings(models: list[str]) -> None:
    sampled = ["--sample", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "16"]
    asked = ["generate", *models, "--prompt", "The wind", *sampled, "--json"]
    plain = json.loads(run(*asked).stdout)
    assert json.loads(run(*asked).stdout)["token_ids"] == plain["token_ids"]
    stop = plain["text"].split()[3]
    done = run(*asked, "--stop", stop, "--weight", "0.5", "--weight", "0.5")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["finish_reason"] == "stop_string"
    assert report["text"] == plain["text"][: plain["text"].index(stop) + len(stop)]
    other = json.loads(run(*asked, "--weight", "0.7", "--weight", "0.3").stdout)
    assert [member["weight"] for member in other["members"]] == other["weights"] == [0.7, 0.3]


def test_a_text_of_one_token_has_no_time_a_token(models: list[str]) -> None:
    asked = ["generate", *models, "--prompt", "The wind", "--max-new-tokens", "1"]
    report = json.loads(run(*asked, "--fuser", "union-vocab", "--json").stdout)
    assert report["ms_per_token"] is report["tokens_per_second"] is report["fusion_ms_per_token"] is None
    assert report["prompt_ms"] > 0
    assert report["recipe"] is None  # union-vocab has none
    done = run(*asked, "--fuser", "single")
    assert re.match(r"1 tokens by tiny-smollm2 \(ended by length\); run by", done.stderr), done.stderr


def test_no_file_is_written_over_another_of_the_command(models: list[str], tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("text.txt", "page.html", "both.svg", "model.gguf")}
    for file in files.values():
        Path(file).write_text("mine")
    text, page, both, gguf = files.values()
    for command, options in (
        ("tune", ["--text", text, "--out", text]),
        ("tune", ["--text", text, "--out", both, "--plot", both]),
        ("doctor", ["--text", page, "--html", page]),
        ("nll", ["--text", both, "--plot", f"{tmp_path}/../{tmp_path.name}/both.svg"]),
        ("generate", ["--model", gguf, "--prompt", "a", "--trace", gguf]),
    ):
        done = run(command, *models, *options)
        assert done.returncode == 2
        assert re.search(r"--\w+ \S+ is the file of --\w+ too; choose another name", done.stderr), done.stderr
    assert all(Path(file).read_text() == "mine" for file in files.values())


def test_the_home_folder(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for options in (
        ["eval", *models, "--task", "nq", "--data=~/data", "--json=~/out"],
        ["doctor", *models, "--text=~/data"],
        ["nll", *models, "--text=~/data"],
    ):
        (tmp_path / "data").unlink(missing_ok=True)
        done = run(*options)
        assert done.returncode == 2, done.stderr
        assert not (tmp_path / "~").exists()
    assert f"{tmp_path}/data" in run("eval", *models, "--task", "nq", "--data=~/data", "--json=~/out").stderr
    (tmp_path / "data").write_bytes(b"\xff")
    for command in ("doctor", "nll"):
        assert "UTF-8" in run(command, *models, "--text=~/data").stderr


def test_a_chat_with_skip_and_trace(models: list[str], tmp_path: Path) -> None:
    chat = ["generate", *models, "--chat", "--prompt", "What is the capital of France?"]
    done = run(*chat, "--max-new-tokens", "4")
    assert done.returncode == 2
    assert "bytes: its tokenizer has no chat template" in done.stderr

    file = tmp_path / "trace.jsonl"
    more = ["--without-template", "plain", "--certified-skip", "--trace", str(file), "--json"]
    done = run(*chat, "--max-new-tokens", "12", *more)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [one["token"]["id"] for one in records] == report["token_ids"]
    settled = sum(one["not_asked"] == "settled" for one in records)
    assert 1 > report["skipped_share"] == round(settled / len(records), 4) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demo", "--prompt", "x", "--weight", "0.9", "--weight", "0.9"], "error: .*weight.*sum"),
        (["--demo", "--prompt", "x", "--weight", "1"], "error: .*weight"),
        (
            ["--model", "/no/such/folder", "--model", "b", "--prompt", "x"],
            "error: /no/such/folder: no such file",
        ),
        (["--model", "one-model", "--prompt", "x"], "error: .*two or more"),
        (["--demo"], "error: the prompt is empty"),
        (["--prompt", "x"], "error: name the models with --model"),
        (["--demo", "--model", "x", "--prompt", "x"], "error: name the models with --model"),
        (["--demo", "--prompt", "x", "--temperature", "0.5"], "error: --temperature needs --sample"),
        (
            ["--demo", "--prompt", "x", "--certified-skip", "--sample"],
            "error: --certified-skip is for greedy",
        ),
        (["--demo", "--prompt", "x", "--dtype", "int8"], "int8"),
        (["--demo", "--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens"),
    ],
)
@pytest.mark.usefixtures("_demo_models")
def test_wrong_input_is_one_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = run("generate", *arguments)
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "--temperature", "-1"], "temperature is -1"),
        (["--sample", "--top-p", "2"], "top_p is 2"),
        (["--sample", "--seed", str(2**70)], "seed is"),
        (["--stop", ""], "stop_strings"),
        (["--confidence-gate", "2"], "confidence_gate is 2"),
        (["--draft", "99"], "is 99"),
        (["--trace", "/"], "--trace / is a folder"),
        (["--trace", "/no/such/folder/t.jsonl"], "there is no folder /no/such/folder"),
        (["--prompt", "\udcff"], "lone surrogate"),
        (["--fuser", "os:system"], "is called with (logits, said, weights)"),
        (["--fuser", "draw"], "'draw' is a way to sample; set do_sample=True (--sample)"),
        (["--fuser", "spans", "--sample"], "'spans' writes whole words"),
        (["--fuser", "average", "--certified-skip"], "which average has not; leave it out"),
        (["--fuser", "average", "--recipe", "paper"], "--recipe: of the search, which average does without"),
    ],
)
def test_what_needs_no_model_is_said_before_models_are_loaded(arguments: list[str], message: str) -> None:
    named = ["--model", "/no/such/main", "--model", "/no/such/assistant", "--prompt", "x"]
    done = run("generate", *named, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("command", ["serve", "eval", "nll"])
def test_settings_of_a_search_where_there_is_none(command: str, tmp_path: Path) -> None:
    named = ["--model", "/no/such/main", "--model", "/no/such/assistant", "--learning-rate", "0.2"]
    if command == "nll":
        (tmp_path / "text").write_text("The wind blew. " * 100)
        named += ["--text", str(tmp_path / "text")]
    if command == "eval":
        (tmp_path / "piqa").mkdir()
        item = {"question": "To dry hands", "A": "use a towel", "B": "use a stone", "answer": "A"}
        (tmp_path / "piqa" / "test.jsonl").write_text(json.dumps(item))
        named += ["--task", "piqa", "--data", str(tmp_path), "--json", str(tmp_path / "out")]
    done = run(command, *named, "--fuser", "product")
    assert done.returncode == 2
    assert (
        "--learning-rate: of the search, which product does without; leave it out, or name --fuser deepen"
        in done.stderr
    )
    preset = tmp_path / "preset.yaml"
    preset.write_text("members: [/no/such/main, /no/such/assistant]\nfuser: product\n")
    assert "product does without" in run(command, *named, "--preset", str(preset)).stderr
    # Enough that one of several fusers has it; and the default is made of the search.
    several = ["--fuser", "product", "--fuser", "follow"] if command != "serve" else []
    assert "/no/such/main: no such file" in run(command, *named, *several).stderr


def test_a_full_disk_is_one_message(monkeypatch, capsys) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115 - closing it fails
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(typer.Exit) as ended, console.exit_codes(False):
        console.write("text")
    with contextlib.suppress(OSError):
        full.close()
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == (
        "error: no space is left where the output goes; make room, or send it elsewhere\n"
    )


def test_a_process_ends_with_the_exit_code() -> None:
    done = run_process("generate", "--demo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the prompt is empty; give some text to continue\n"


def test_no_prompt_on_a_terminal_is_an_error_not_a_wait() -> None:
    terminal, process_end = pty.openpty()
    try:
        done = subprocess.run(
            [*COMMAND, "generate", "--demo"],
            stdin=process_end,
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
    finally:
        os.close(process_end)
        os.close(terminal)
    assert done.returncode == 2
    assert "no prompt: give --prompt" in done.stderr


def test_a_preset_names_the_models(tmp_path: Path) -> None:
    """Of every command that takes one: what is wrong here is then the next thing."""
    preset = tmp_path / "preset.yaml"
    preset.write_text("members: [demo:smollm2-135m-instruct, demo:gemma-3-270m]\n", encoding="utf-8")
    for command, message in (
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["nll", "--text", str(tmp_path / "nowhere")], "No such file or directory"),
        (["eval", "--task", "nq", "--data", str(tmp_path), "--json", str(tmp_path / "out")], "there is no"),
    ):
        done = run(*command, "--preset", str(preset))
        assert done.returncode == 2
        assert message in done.stderr


def commands(folder: Path) -> dict[str, list[str]]:
    """Each command that loads members, with what it needs beside them."""
    text, data, out = folder / "text.txt", folder / "data", folder / "out"
    text.write_text("A short text.\n" * 40, encoding="utf-8")
    (data / "arc_challenge").mkdir(parents=True)
    item = {"question": "Which?", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "A"}
    (data / "arc_challenge" / "test.jsonl").write_text(json.dumps(item) + "\n")
    return {
        "generate": ["generate", "--prompt", "x"],
        "nll": ["nll", "--text", str(text)],
        "doctor": ["doctor"],
        "tune": ["tune", "--text", str(text), "--out", str(out / "preset.yaml")],
        "eval": ["eval", "--task", "arc_challenge", "--data", str(data), "--json", str(out)],
    }


@pytest.mark.parametrize("name", ["generate", "nll", "doctor", "tune", "eval"])
def test_every_command_takes_the_options_of_loading(name: str, tmp_path: Path) -> None:
    command = [*commands(tmp_path)[name], "--model", "org/a", "--model", "org/b@org/tuned"]
    split = '{"": "disk", "lm_head": 0}'
    options = [
        *("--backend", "transformers", "--threads", "2"),
        *("--device-map", "-", "--device-map", split, "--offload-folder", "-", "--offload-folder", "spare"),
        *("--max-memory", "-", "--max-memory", '{"0": "1GiB", "cpu": 5}', "--dtype", "bfloat16"),
        *("--quantization", "int8", "--quantization", "-", "--revision", "main", "--revision", "v2"),
        *("--attn-implementation", "eager", "--trust-remote-code"),
    ]
    before = torch.get_num_threads()
    try:
        with recorded(2) as asked, pytest.raises(Asked):
            run(*command, *options)
    finally:
        torch.set_num_threads(before)
    (_, _, one), (_, source, other) = asked
    assert {key: value for key, value in one.given().items() if key != "device"} == {
        "backend": "transformers",
        "threads": 2,
        "dtype": "bfloat16",
        "quantization": "int8",
        "revision": "main",
        "attn_implementation": "eager",
        "trust_remote_code": True,
    }
    assert other.device_map == {"": "disk", "lm_head": 0}
    assert other.max_memory == {0: "1GiB", "cpu": 5}
    assert (other.offload_folder, other.quantization, other.revision) == ("spare", None, "v2")
    assert (source.hub, other.adapter) == ("org/b", "org/tuned")
    help_text = run(name, "--help").stdout
    assert all(f"--{option.replace('_', '-')}" in help_text for option in LOAD_OPTIONS)
    with recorded(2) as asked, pytest.raises(Asked):
        run(*command)
    assert [one.given() for _, _, one in asked] == [{}, {"adapter": "org/tuned"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "vllm"], "org/a: there is no backend 'vllm'; there are transformers, llama.cpp"),
        (
            ["--backend", "-", "--backend", "llama.cpp"],
            "org/b: llama.cpp reads .gguf files, and this is none",
        ),
        (["--threads", "two"], "threads is 'two'; give a whole number"),
        (["--threads", "1", "--threads", "0"], "org/b: threads is 0; give a whole number from 1 to 65,535"),
        (["--device-map", "{x}"], "device_map is '{x}', which is no JSON"),
        (["--max-memory", "1GB"], "max_memory is '1GB', which is no JSON"),
        (["--device", "cpu", "--device-map", "auto"], "device and device_map exclude each other"),
        (["--quantization", "int2"], "there is no quantization 'int2'; there are int8, int4"),
        (["--dtype", "-", "--dtype", "-", "--dtype", "-"], "there are 3 of dtype for 2 members"),
        (["--attn-implementation", "org/fast"], "is a kernel of the hub, and so code"),
        (["--adapter", "/gone"], "org/a: /gone: no folder of an adapter"),
    ],
)
def test_wrong_options_of_loading(arguments: list[str], message: str) -> None:
    done = run("generate", "--prompt", "x", "--model", "org/a", "--model", "org/b", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_a_presets_options_of_loading_and_those_of_the_caller(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    text = "members: [org/a, org/b]\nrevision: [v1, null]\ndevice_map: auto\nmax_memory: {0: 1GiB}\n"
    preset.write_text(text, encoding="utf-8")
    command = ["generate", "--prompt", "x", "--preset", str(preset)]

    def asked_for(*arguments: str) -> list[dict[str, object]]:
        with recorded(2) as asked, pytest.raises(Asked):
            run(*command, *arguments)
        return [one.given() for _, _, one in asked]

    spread = {"device_map": "auto", "max_memory": {0: "1GiB"}}
    assert asked_for() == [{**spread, "revision": "v1"}, spread]
    assert asked_for("--revision", "-", "--device", "cpu") == [{}, {}]
    assert asked_for("--device-map", "balanced") == [
        {"device_map": "balanced", "revision": "v1"},
        {"device_map": "balanced"},
    ]
    # They are for the preset's own members.
    assert asked_for("--model", "org/c", "--model", "org/d") == [{}, {}]


def test_debug_shows_the_traceback() -> None:
    done = run("generate", "--debug", "--prompt", "x", "--model", "/no/a", "--model", "/no/b")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.strip().endswith("check the spelling of the path")


def test_a_damaged_model_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    command = ["generate", "--prompt", "x", "--model", str(broken), "--model", "b"]
    done = run(*command, "--backend", "transformers")
    assert done.returncode == 1
    assert "cannot read this GGUF file" in done.stderr
    assert "Traceback" not in done.stderr
    assert "llama.cpp" not in done.stderr
    monkeypatch.setattr(loading, "is_installed", lambda: False)
    without = run(*command)
    assert without.returncode == 1
    assert f"Note: llama.cpp is not installed. transformers runs {broken} instead" in without.stderr
    assert "pip install 'deepen-ext[llama-cpp]'" in without.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("close", 141), ("interrupt", 130)])
def test_a_reader_that_leaves_and_an_interrupt(tiny_smollm2_dir: Path, how: str, code: int) -> None:
    """After the first piece of text, as in `| head -c 1`, or Ctrl-C."""
    twice = ["--model", str(tiny_smollm2_dir)] * 2
    process = subprocess.Popen(
        [*COMMAND, "generate", *twice, "--prompt", "The wind", "--max-new-tokens", "5000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        # Where the tests run in the background, Ctrl-C is ignored and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        assert process.stdout.read(1)
        if how == "close":
            process.stdout.close()
        else:
            process.send_signal(signal.SIGINT)
        messages = process.stderr.read().decode()
    assert process.returncode == code
    assert "Traceback" not in messages
    assert "Exception" not in messages
