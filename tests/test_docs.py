"""The documents: links lead somewhere, files that are named exist, every block of code runs or is parsed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from doc_blocks import PROGRAMS, Block, blocks
from tiny_models import one_byte_tokens, save_model

from deepen_ext import Ensemble
from deepen_ext.commands.cli import app
from deepen_ext.decoding import settings as decoding_settings
from deepen_ext.fusers.make import FUSERS
from deepen_ext.measure.evaluation.tasks import TASKS
from deepen_ext.members import loading
from deepen_ext.members.load_options import LOAD_OPTIONS, options_of_each
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.presets import load_preset

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("bench", "csrc", "examples", "deepen_ext", "docs", "tests")

# Files of an operation, a fuser and a command that the reader is to write.
INVENTED = re.compile(r"\b(scale_rows\w*|test_scale_rows|mine)\b")
FILE = re.compile(r"[\w./-]+\.(?:py|pyi|h|cc|cu|cuh|md|svg)")


# Blocks that no test here runs, by page and first line, and why. tests/test_ray_replicas.py and
# tests/test_lm_eval.py run smaller ones of the kind.
NOT_RUN = {
    ("distributed.md", "from deepen_ext import Replicas"): "takes eight GPUs",
    ("lm_eval.md", "import lm_eval"): "its task is on the hub",
    ("serving.md", "from openai import OpenAI"): "tests/serving/test_completions.py runs it, with a server",
}


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """GitHub's name for each heading."""
    heads = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def named_files(page: Path) -> Iterator[str]:
    """What stands in backticks and looks like a file of this repository."""
    for words in re.findall(r"`([^`\n]+)`", prose(page)):
        for word in words.split():
            if FILE.fullmatch(word) and not INVENTED.search(word):
                yield word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path) -> None:
    found = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")]
    names = {file.name for file in found} | {file.name for file in ROOT.glob("*.*")}
    for name in named_files(page):
        if name.partition("/")[0] in FOLDERS:
            assert (ROOT / name).is_file(), f"{page.name}: {name}"
        else:
            assert Path(name).name in names, f"{page.name}: {name}"


def test_files_are_looked_for_at_all() -> None:
    assert len(list(named_files(ROOT / "docs" / "architecture.md"))) > 40


@pytest.mark.parametrize("page", ["usage.md", "glossary.md"])
def test_every_fuser_is_named(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert len(FUSERS) > 5
    assert [name for name in FUSERS if not re.search(f'["`]{name}["`]', text)] == []


def test_every_option_of_loading_is_named() -> None:
    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    assert [name for name in LOAD_OPTIONS if not re.search(f"`{name}[=`]", text)] == []


def test_every_command_that_loads_members_is_named() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    loading = {
        name for name, own in group.commands.items() if any(one.name == "backend" for one in own.params)
    }
    assert len(loading) > 3
    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"options of the commands\s(.*?), keys of", text, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == loading


def test_every_extra_is_named() -> None:
    """Those for users, in the table of extras and no others."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[project.")[0]
    extras = set(re.findall(r"^([a-z-]+) = \[", section, re.MULTILINE)) - {"test", "docs", "bench"}
    assert len(extras) > 5
    table = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8").split("| extra | for |\n")[1]
    firsts = [row.split("|")[1] for row in table.split("\n\n")[0].splitlines()]
    assert set(re.findall(r"`([a-z-]+)`", " ".join(firsts))) == extras


def test_a_record_of_a_trace_is_described(tiny_smollm2: Member, tiny_gemma: Member) -> None:
    """The table of the page has each of its keys, and no other; it names those of its parts."""
    records: list[dict[str, Any]] = []
    Ensemble([tiny_smollm2, tiny_gemma]).generate("The", max_new_tokens=2, trace=records.append)
    section = (ROOT / "docs/page.md").read_text(encoding="utf-8").split("## A record")[1].split("\n## ")[0]
    named = {key for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for key in row.split(", ")}
    assert named == {f"`{key}`" for key in records[0]}
    parts = records[0]["ms"].keys() | records[0]["members"][0].keys()
    assert parts <= set(re.findall(r"`(\w+)`", section))


def test_every_page_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.is_symlink() or f"(docs/{page.name})" in text, page.name


def test_the_readmes_example(
    smollm2: Member, gemma: Member, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = Ensemble([smollm2, gemma])
    monkeypatch.setattr(Ensemble, "from_pretrained", lambda members: pair)
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(snippet.splitlines()) <= 10
    exec(snippet.replace("max_new_tokens=24", "max_new_tokens=6"), {})  # fewer, for the time
    shown = capsys.readouterr().out
    assert "Paris" in shown
    assert len(shown.splitlines()) > 3


# ---------------------------------------------------------------- blocks of code

BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON_PAGES = list(dict.fromkeys(block.page for block in BLOCKS if block.kind == "python"))


def not_run(block: Block) -> bool:
    return any(block.page.name == page and block.text.startswith(line) for page, line in NOT_RUN)


def test_what_kinds_of_blocks_there_are() -> None:
    """A fence without a language is a diagram: it has no code that nothing would run. C++ is headers."""
    assert {block.kind for block in BLOCKS} == {"python", "sh", "yaml", "c", "cpp"}
    headers = [block.text for block in BLOCKS if block.kind in ("c", "cpp")]
    assert headers == [f'--8<-- "csrc/embed/{name}"\n' for name in ("deepen.h", "deepen.hpp")]
    assert sum(map(not_run, BLOCKS)) == len(NOT_RUN)
    for page in PAGES:
        fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        for diagram in (text for language, text in fences if not language):
            assert not re.search(r"^\s*(import|from \w+ import|deepen-ext|make|pip) ", diagram, re.MULTILINE)


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """Three models of single bytes in the demo's names, with a chat template."""
    folder = tmp_path_factory.mktemp("models")
    names = ("SmolLM2-135M-Instruct", "Gemma-3-270M", "third")
    found = [
        load_member(save_model(folder / name, one_byte_tokens(), seed=i)) for i, name in enumerate(names)
    ]
    for one in found:
        one.tokenizer.chat_template = "{% for one in messages %}{{ one.content }}{% endfor %}\n"
    return found


@pytest.fixture
def given(tiny_demo: list[Member], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the pages' snippets take for granted; models of any name are tiny ones, texts are short."""
    main, assistant, _ = tiny_demo

    def load(members: list[str], **options: Any) -> Ensemble:
        options_of_each(members, **{key: options.pop(key) for key in LOAD_OPTIONS if key in options})
        return Ensemble(tiny_demo[: len(members)], cache=False, **options)

    def load_one(name: str) -> Member:
        return main

    monkeypatch.setattr(Ensemble, "from_pretrained", load)
    monkeypatch.setattr(loading, "load_member", load_one)
    monkeypatch.setattr(decoding_settings, "DEFAULT_NEW_TOKENS", 6)
    monkeypatch.setitem(TASKS, "gsm8k", replace(TASKS["gsm8k"], max_new_tokens=4))
    monkeypatch.chdir(tmp_path)
    items = {
        "gsm8k": {"question": "What is 1 + 1?", "answer": "It is 2. #### 2"},
        "piqa": {"question": "To dry a cup", "A": "wipe it", "B": "fill it", "answer": "A"},
    }
    for task, item in items.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for file, lines in (("test", 2), ("dev", 2), ("demos", 1)):
            (tmp_path / "data" / task / f"{file}.jsonl").write_text((json.dumps(item) + "\n") * lines)
    pair = Ensemble([main, assistant], cache=False)
    inputs = main.tokenizer("The capital of France is", return_tensors="pt")
    return {
        "ensemble": pair,
        "main": main.model,
        "inputs": inputs,
        "prompt": "The capital of France is",
        "chat": [{"role": "user", "content": "Hi!"}],
        "prompts": ["The capital of France is", "Once upon", "def"],
        "thousands_of_prompts": ["The capital", "Once upon", "def"],
        "a": main,
        "b": assistant,
        "pair": pair,
        "members": [main, assistant],
        "main_logits": torch.randn(1, main.vocab_size),
        "other_logits": torch.randn(1, assistant.vocab_size),
    }


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.stem)
def test_python_runs(page: Path, given: dict[str, Any]) -> None:
    """Every block of a page, from top to bottom, in the names of those before it."""
    for block in BLOCKS:
        if block.page == page and block.kind == "python" and not not_run(block):
            exec(compile(block.text, page.name, "exec"), given)


def commands(program: str) -> list[tuple[str, list[str]]]:
    found = ((block, words) for block in BLOCKS if block.kind == "sh" for words in block.commands())
    return [(block.page.stem, words[1:]) for block, words in found if words[0] == program]


def test_programs_are_known() -> None:
    found = {words[0] for block in BLOCKS if block.kind == "sh" for words in block.commands()}
    assert found <= set(PROGRAMS)
    assert "deepen-ext" in found


@pytest.mark.parametrize(("page", "words"), commands("deepen-ext"), ids=lambda one: str(one)[:60])
def test_commands_are_parsed(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line itself: every option is known and every value of its type."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands[words[0]]
    if words[0] == "lm-eval":
        harness = pytest.importorskip("lm_eval._cli").HarnessCLI()
        monkeypatch.setattr("sys.argv", words)
        assert harness.parse_args().model == "deepen"
    else:
        command.make_context(words[0], words[1:])


@pytest.mark.parametrize(("page", "words"), commands("make"), ids=lambda one: str(one)[:60])
def test_make_has_the_targets(page: str, words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {word for word in words if not word.startswith("-") and "=" not in word} <= set(targets)


@pytest.mark.parametrize(("page", "words"), commands("pip"), ids=lambda one: str(one)[:60])
def test_pip_has_the_extras(page: str, words: list[str]) -> None:
    extras = re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    (wanted,) = re.findall(r"deepen-ext\[([\w,-]+)\]", " ".join(words))
    assert set(wanted.split(",")) <= set(extras)


@pytest.mark.parametrize(
    "block", [one for one in BLOCKS if one.kind == "yaml"], ids=lambda one: one.page.stem
)
def test_presets_are_read(block: Block, tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(block.text)
    assert len(load_preset(tmp_path / "preset.yaml").members) == 2
