"""What `bench/peers.py` measures a program on, and how it takes each figure: the same for us and for a peer.

A row is one way of fusing (or one member alone) on one pair. It holds a figure for each part that could be
measured; of a part that could not, `errors` holds the last line of the error.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import inspect
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import PROMPTS, error_line, resident, start_of_peak
from compare_setup import MODELS, letters_of

from deepen_ext.measure.evaluation.tasks import TASKS

KINDS = ("gsm8k", "arc_challenge", "code")
# Modules of Python's library that no text of the results page is from.
MODULES = ("textwrap", "shelve", "bisect", "heapq", "fractions", "calendar")
BLOCK = 128  # bytes
LETTERS = "ABCD"

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a child process is asked for.

    Attributes:
        pair: letters, the main model first.
        checkout: of the peer; None for us.
        items: questions of ARC-Challenge's dev split, by the likelihood of their choices.
        letters: how many of them are asked for the letter too.
        texts: of each kind.
        context, scored: characters of a text that are read only, and that are scored.
        tokens: of the main model, written for each prompt.
        prompts: that are written one after the other.
        batch: how many of them are written side by side, for the second time.
    """

    pair: str
    data: Path
    checkout: Path | None
    items: int
    letters: int
    texts: int
    context: int
    scored: int
    tokens: int
    prompts: int
    batch: int

    @property
    def models(self) -> list[str]:
        """Names of the embedded models."""
        return [MODELS[letter] for letter in letters_of(self.pair)]

    def prompt_texts(self, count: int) -> list[str]:
        return list(itertools.islice(itertools.cycle(PROMPTS), count))


@dataclass(frozen=True)
class Text:
    kind: str
    context: str
    scored: str


@dataclass(frozen=True)
class Question:
    """One item of ARC-Challenge, to be asked in two ways.

    Attributes:
        fields: of its line of JSON, as UniTE's own code reads them.
        prompt, choices: lm-evaluation-harness's: the likelihood of each choice after the prompt.
        letters_prompt: UniTE's: the next token has to be the letter.
        gold: number of the right choice.
    """

    fields: dict[str, str]
    prompt: str
    choices: list[str]
    letters_prompt: str
    gold: int


def texts(job: Job) -> list[Text]:
    """Passages of dev splits and of Python's library, as many of each kind."""
    found = []
    for kind in KINDS:
        passages = _code() if kind == "code" else _items(job.data, kind)
        long_enough = (one for one in _joined(passages, job.context + job.scored))
        for passage in itertools.islice(long_enough, job.texts):
            begin = _between_words(passage, job.context)
            end = _between_words(passage, len(passage))
            found.append(Text(kind, passage[:begin], passage[begin:end]))
    return found


def _between_words(text: str, before: int) -> int:
    """Place of the last space that stands between words: no tokenizer has a token across it."""
    places = [one.start() for one in re.finditer(r"(?<=\S) (?=\w)", text[:before])]
    return places[-1]


def _joined(passages: Iterable[str], characters: int) -> Iterable[str]:
    text = ""
    for passage in passages:
        text += passage
        if len(text) >= characters:
            yield text[:characters]
            text = ""


def _items(data: Path, task: str) -> Iterable[str]:
    for item in TASKS[task].items(data, "dev"):
        answer = item.fields["answer"]
        yield f"Question: {item.fields['question']}\nAnswer: {item.fields.get(answer, answer)}\n\n"


def _code() -> Iterable[str]:
    for module in MODULES:
        source = inspect.getsource(importlib.import_module(module))
        yield source[source.index("\n", len(source) // 3) + 1 :]


def questions(job: Job) -> list[Question]:
    found = []
    for item in TASKS["arc_challenge"].items(job.data, "dev", job.items):
        fields = item.fields
        answer = fields["answer"]
        found.append(
            Question(
                fields,
                f"Question: {fields['question']}\nAnswer:",
                [f" {fields[letter]}" for letter in LETTERS],
                "Answer the question by replying A, B, C or D.\n"
                f"Question: {fields['question']}\n"
                + "".join(f"{letter}: {fields[letter]}\n" for letter in LETTERS)
                + "Answer:",
                LETTERS.index(answer) if answer in LETTERS else int(answer) - 1,
            )
        )
    return found


def choices_right(found: Sequence[tuple[Question, Sequence[float]]]) -> dict[str, list[int]]:
    """Which questions are right by the choices' log-likelihoods, and by those for each byte."""
    right, by_bytes = [], []
    for question, values in found:
        sizes = [len(choice.strip().encode()) for choice in question.choices]
        each = [value / size for value, size in zip(values, sizes, strict=True)]
        right.append(int(values.index(max(values)) == question.gold))
        by_bytes.append(int(each.index(max(each)) == question.gold))
    return {"right": right, "right_by_bytes": by_bytes}


def attempt(row: Row, part: str, measure: Callable[[], Any]) -> None:
    """Measure one part of a row; an error is kept beside the other parts."""
    try:
        row[part] = measure()
    except Exception as error:  # a peer's code can fail in any way, and its line is the result then
        row.setdefault("errors", {})[part] = error_line(error)


class Memory:
    """Peak of the resident set beyond the models, in MB.

    Each model has to have run once before: weights are mapped from files, and resident when they are read.
    """

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._base = start_of_peak()

    def figures(self) -> dict[str, float]:
        peak = resident("VmHWM")
        return {"peak_mb": round(peak, 1), "beyond_models_mb": round(peak - self._base, 1)}


def speed(job: Job, write: Callable[[list[str]], float], memory: Memory) -> dict[str, Any]:
    """Wall time over tokens of the main model, the reading of the prompts included.

    Args:
        job: how many prompts and tokens.
        write: continues prompts side by side; gives how many of the main model's tokens it has written for
            each, on average.
        memory: from before the program made anything of its own; taken for one prompt at a time.
    """
    write(job.prompt_texts(1))
    taken = []
    for prompt in job.prompt_texts(job.prompts):
        began = time.perf_counter()
        tokens = write([prompt])
        taken.append(1e3 * (time.perf_counter() - began) / tokens)
    found = {
        "ms_a_token": round(statistics.median(taken), 2),
        "each": [round(one, 2) for one in taken],
        **memory.figures(),
    }

    def together() -> float:
        began = time.perf_counter()
        tokens = write(job.prompt_texts(job.batch))
        return round(1e3 * (time.perf_counter() - began) / (tokens * job.batch), 2)

    attempt(found, "ms_a_token_in_a_batch", together)
    return found
