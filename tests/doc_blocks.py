"""Blocks of code in the documents: fenced with a language, or indented lines that begin with a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("deepen-ext", "make", "python", "pip", "curl", "ray", "vllm")


@dataclass(frozen=True)
class Block:
    """One block; `kind` is a fence's language, or "sh" and "yaml" where it is indented."""

    page: Path
    kind: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The words of each command, without settings of the environment before it."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def blocks(page: Path) -> Iterator[Block]:
    """In the page's order, fenced ones first; diagrams and formulas have no language and are none."""
    text = page.read_text("utf-8")
    for language, content in re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield Block(page, language, content)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for content in re.findall(r"(?<=\n\n)((?:    .*\n)+)", rest):
        first = re.sub(r"^(\s*[A-Z_]+=\S*)*\s*", "", content).split()[0]
        if first in PROGRAMS:
            yield Block(page, "sh", re.sub(r"^    ", "", content, flags=re.MULTILINE))
        elif first.endswith(":"):
            yield Block(page, "yaml", re.sub(r"^    ", "", content, flags=re.MULTILINE))
