"""The documentation site: built without a warning, its links and anchors exist, it needs no network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what a browser fetches to show it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif "src" in given:
            self.fetched.append(given["src"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs")  # the changelog, a link there, becomes a file
    shutil.copy(ROOT / "zensical.toml", folder)
    for sources in ("deepen_ext", "csrc"):  # whose docstrings and headers are pages
        (folder / sources).symlink_to(ROOT / sources)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}


def test_every_page_is_in_the_navigation(pages: dict[Path, Page]) -> None:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]["nav"]
    listed = re.findall(r"'([\w/]+)\.md'", str(nav))
    written = [file.relative_to(ROOT / "docs") for file in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(str(file.with_suffix("")) for file in written)
    assert len(pages) == len(listed)


def test_the_c_interface_is_a_page(site: Path) -> None:
    text = re.sub(r"<[^>]*>", "", (site / "api" / "cpp.html").read_text("utf-8"))
    functions = re.findall(r"^DEEPEN_API.*?(deepen_\w+)\(", (ROOT / "csrc/embed/deepen.h").read_text(), re.M)
    assert len(functions) > 8
    for name in (*functions, "class Fusion"):
        assert name in text


def test_links_and_anchors_exist(site: Path, pages: dict[Path, Page]) -> None:
    checked = 0
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme == "https", f"{file.name}: {link}"
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target.is_dir():
                target = target / "index.html"
            assert target.is_file(), f"{file.relative_to(site)}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{file.relative_to(site)}: {link}"
            checked += 1
    assert checked > 1000


def test_nothing_comes_from_other_hosts(site: Path, pages: dict[Path, Page]) -> None:
    for file, page in pages.items():
        for source in page.fetched:
            assert not urlsplit(source).netloc, f"{file.name}: {source}"
            if not source.startswith("data:"):
                assert (file.parent / unquote(urlsplit(source).path)).exists(), f"{file.name}: {source}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", style.read_text("utf-8")), style.name


def test_the_api_comes_from_docstrings(pages: dict[Path, Page]) -> None:
    """Every public name has its place, with its arguments described."""
    import deepen_ext

    anchors = set().union(*(page.anchors for page in pages.values()))
    homes = deepen_ext._HOME | {"demo": "deepen_ext.members.embedded"}
    for name in set(deepen_ext.__all__) - {"__version__"}:
        home = homes.get(name, "deepen_ext.errors")
        assert {home if name == "demo" else f"{home}.{name}", f"deepen_ext.{name}"} & anchors, name
    text = next(file for file in pages if file.name == "ensemble.html").read_text("utf-8")
    assert "hub names, local folders" in text  # an argument of from_pretrained


def test_tables_and_lists_are_not_left_as_text(pages: dict[Path, Page]) -> None:
    """GitHub reads Markdown that the site does not: tables in folds, lists right under a line."""
    for file in pages:
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", file.read_text("utf-8"), flags=re.DOTALL)
        assert not re.search(r"^\|.*\|$", text, re.MULTILINE), file.name
        for paragraph in re.findall(r"<p>(.*?)</p>", text, flags=re.DOTALL):
            assert not re.search(r"\n(- |\d+\. )", paragraph), f"{file.name}: {paragraph[:200]}"
