"""The documents: links lead somewhere, files that are named exist, the README's example runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepen_ext import Ensemble
from deepen_ext.members.member import Member

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("bench", "csrc", "deepen_ext", "docs", "tests")

# Files of an operation, a fuser and a command that the reader is to write.
INVENTED = re.compile(r"\b(scale_rows\w*|test_scale_rows|mine)\b")
FILE = re.compile(r"[\w./-]+\.(?:py|pyi|h|cc|cu|cuh|md|svg)")


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


def test_every_page_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


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
