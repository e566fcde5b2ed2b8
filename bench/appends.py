"""Microseconds an append for tokenizer files: of a word, to a text of 1,000, 10,000 and 100,000 characters.

`python bench/appends.py FILE...`, each a tokenizer.json or a folder with one. `keeps_ids` beside it is the
question that the boundary rule asks for the word that follows. The text is prose, code and Chinese in turns.
The ids after all appends are compared with those of the whole text.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from common import LONG_TEXT, PROMPTS, ROOT, Figure, environment, speed_file, spread, write_json
from tokenizers import Tokenizer

from deepen_ext.errors import ModelError
from deepen_ext.text.growing_text import GrowingText
from deepen_ext.text.vocabulary import Vocabulary

LENGTHS = (1_000, 10_000, 100_000)
APPENDS = 400
CHINESE = "今天天气很好，我们去公园吧。人工智能正在改变世界，但是很多问题还没有答案；每个模型都有自己的词表。"


def words() -> Iterator[str]:
    """Words as a main model writes them: most begin with a space."""
    texts = (LONG_TEXT.replace("\n", " "), PROMPTS[2] * 20, CHINESE * 10)
    for text in cycle(texts):
        if " " in text:
            yield from text.replace(" ", "\0 ").split("\0")
        else:
            yield from (text[i : i + 2] for i in range(0, len(text), 2))


def measure(vocabulary: Vocabulary, name: str) -> list[Figure]:
    figures = []
    for length in LENGTHS:
        source, text = words(), ""
        while len(text) < length:
            text += next(source)
        growing, appends, questions = GrowingText(vocabulary, text), [], []
        for _ in range(APPENDS):
            word = next(source)
            start = time.perf_counter()
            growing.keeps_ids(word)
            middle = time.perf_counter()
            growing.append(word)
            questions.append(1e6 * (middle - start))
            appends.append(1e6 * (time.perf_counter() - middle))
        if growing.ids != vocabulary.prefix_ids + vocabulary.encode(growing.text):
            raise RuntimeError(f"{name}: the ids after the appends are not those of the whole text")
        for what, times in (("append", appends), ("keeps_ids", questions)):
            middle_one = statistics.median(times)
            figures.append(Figure(f"{name}, {what}, {length:,}", middle_one, "µs", spread(times), APPENDS))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "appends")
    options = parser.parse_args()
    found: list[Figure] = []
    refused: dict[str, str] = {}
    print("| tokenizer | append at 1,000 | 10,000 | 100,000 | keeps_ids at 1,000 | 10,000 | 100,000 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in options.files:
        file = path / "tokenizer.json" if path.is_dir() else path
        name = file.parent.name if file.stem == "tokenizer" else file.stem
        try:
            vocabulary = Vocabulary.from_tokenizer(Tokenizer.from_file(str(file)), name=name)
        except ModelError as error:
            refused[name] = str(error)
            print(f"| {name} | refused: {error} |", flush=True)
            continue
        figures = measure(vocabulary, name)
        found += figures
        cells = [f"{one.value:.0f}" for one in (*figures[::2], *figures[1::2])]
        print(f"| {name}{'' if vocabulary.cuts.incremental else ' (whole text again)'} | ", end="")
        print(" | ".join(cells), "|", flush=True)
    machine = environment()
    target = options.results / speed_file(machine)
    write_json(
        target, {**machine, "refused": refused, "figures": {"appends": [one.as_dict() for one in found]}}
    )
    print(f"wrote {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
