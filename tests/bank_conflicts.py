"""Bank conflicts of the kernels' accesses to shared memory, counted by the emulator (tests/emulator/banks.cc)
at the default shape: k 128, m 32, two members, about 3,900 anchors touched.

    python tests/bank_conflicts.py    prints them by kernel and place, the costliest first
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import emulated
import torch

ROOT = emulated.ROOT
K, ENTRIES, ANCHORS, VOCAB = 128, 32, 40_000, 32_000


# Places that follow from the data, from hashing or from who came first: here some conflicts are bound to be.
_SCATTERED = re.compile(
    r"relative\[anchors\.of|index\.named\[w\], several|index\.before\[2 \* w|\*seen|\[index\.group_"
    r"|group_\w+\[to\]|next\[a\] \+|bits\[|whole\[anchor\]|rest\[anchor\]|to\[next_|index\.named\[w\] &"
    r"|bins\[uint32_t|bins\[\(|\[rank\] =|\[atomicAdd|list\[at\] ="
)


@dataclass
class Accesses:
    """Of one kernel at one place in a line."""

    kernel: str
    place: str  # csrc/...:line
    text: str  # of that line
    kind: str  # read, write or atomic
    size: int  # bytes that a lane moves
    order: int  # among the line's accesses of this kind, as the compiler put them
    instructions: int = 0  # of whole warps
    least: int = 0  # wavefronts without a conflict
    wavefronts: int = 0
    worst: int = 0  # degree: different words in one bank
    worst_count: int = 0  # instructions that had it
    same_word: int = 0  # lanes of an atomic at one word, at most: they come one after another too

    @property
    def mean(self) -> float:
        return self.wavefronts / self.least

    @property
    def extra(self) -> int:
        """Wavefronts that conflicts cost."""
        return self.wavefronts - self.least

    @property
    def scattered(self) -> bool:
        return _SCATTERED.search(self.text) is not None

    def add(self, least: int, wavefronts: int, instructions: int, worst: int, count: int, same: int) -> None:
        self.instructions += instructions
        self.least += least
        self.wavefronts += wavefronts
        self.worst_count = (self.worst_count if self.worst >= worst else 0) + (
            count if worst >= self.worst else 0
        )
        self.worst = max(self.worst, worst)
        self.same_word = max(self.same_word, same)


def _places(program: Path, offsets: list[str]) -> list[tuple[str, Path, int]]:
    """Function, file and line of each call, the innermost that is not the emulator's own."""
    found = subprocess.run(
        ["addr2line", "--inlines", "--addresses", "--functions", "-e", str(program), *offsets],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    places = []
    for frames in re.split(r"^0x[0-9a-f]+\n", found, flags=re.MULTILINE)[1:]:
        lines = frames.splitlines()
        pairs = zip(lines[::2], lines[1::2], strict=True)
        function, where = next(one for one in pairs if "/emulator.h:" not in one[1])
        path, number = re.sub(r" \(discriminator.*", "", where).rsplit(":", 1)
        places.append((function, Path(path).resolve(), int(number)))
    return places


def read_report(report: str, program: Path) -> list[Accesses]:
    """The emulator's report with places in the sources, the costliest first. `program` is what was run."""
    lines = [line.split("\t") for line in report.splitlines()]
    places = _places(program, [line[1] for line in lines])
    order: Counter[tuple[str, ...]] = Counter()
    by_place: dict[tuple[str, ...], Accesses] = {}
    for (kernel, _, kind, size, *numbers), (function, path, number) in zip(lines, places, strict=True):
        place, name = f"{path.relative_to(ROOT)}:{number}", re.sub(r"\W.*", "", kernel.lstrip("("))
        order[kernel, function, place, kind] += 1
        which = order[kernel, function, place, kind]
        key = (name, place, kind, size, str(which))
        if key not in by_place:
            text = path.read_text().splitlines()[number - 1].strip()
            by_place[key] = Accesses(name, place, text, kind, int(size), which)
        instructions, least, wavefronts, worst, count, same = map(int, numbers)
        by_place[key].add(least, wavefronts, instructions, worst, count, same)
    return sorted(by_place.values(), key=lambda one: -one.extra)


def measure() -> list[Accesses]:
    """Runs the operations in a process of its own."""
    core = emulated.core_in(emulated.build_banks())
    done = subprocess.run(
        [sys.executable, __file__, "--in-the-emulator"],
        env=emulated.bare_environment(core),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    return read_report(done.stdout, core)


def _sparse_rows(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """columns, values, rest of VOCAB rows; a row's columns are random and differ."""
    generator = torch.Generator().manual_seed(seed)
    width = ANCHORS // ENTRIES
    columns = torch.randint(width, (VOCAB, ENTRIES), generator=generator) + width * torch.arange(ENTRIES)
    order = torch.rand(VOCAB, ENTRIES, generator=generator).argsort(dim=1)
    values = torch.rand(VOCAB, ENTRIES, generator=generator).sort(dim=1, descending=True).values
    values = 0.9 * values / values.sum(dim=1, keepdim=True)
    rest = 1 - values.sum(dim=1)
    return columns.gather(1, order).int().contiguous(), values.contiguous(), rest


def _run() -> None:
    """Every kernel once, on emulated CUDA."""
    from oracle import random_embedding, random_logits

    from deepen_ext import ops
    from deepen_ext.space.row_sources import SimilarityRows

    for name in ("topk_softmax", "relative_rows", "inverse_search", "fuse"):
        vars(sys.modules[f"deepen_ext.ops.{name}"])["backend_of"] = lambda operation, device: (1, 0, 0)

    embedding, anchors = random_embedding(1200, 64, seed=0), torch.arange(0, 1200, 2)
    for recipe in ("calibrated", "paper"):
        source = SimilarityRows(embedding, anchors, recipe=recipe, entries=ENTRIES)
        for count in (64, 5):
            source.compute(torch.arange(count))

    main_logits = random_logits(1, VOCAB, seed=0)
    other_logits = main_logits + random_logits(1, VOCAB, seed=1)
    rows = ops.RelativeRows(*_sparse_rows(0), ANCHORS)
    main, other = ops.topk_softmax(main_logits, K), ops.topk_softmax(other_logits, K)
    assert rows.columns is not None
    touched = len(torch.unique(rows.columns[main.ids.long()]))
    assert 3585 <= touched <= 4096, touched
    weights = torch.full((1, 2), 0.5)
    members = [ops.FuseInput(main, rows), ops.FuseInput(other, rows)]
    ops.fuse(main_logits.clone(), members, weights, learning_rate=0.1)
    ops.topk_softmax(random_logits(1, 3001, seed=2), 1500)  # another path: k above 1,024

    # The same search without the rest of a step, and dense rows.
    target = torch.softmax(random_logits(1, ANCHORS, seed=3), dim=1)
    logits = main.probs.log()
    ops.inverse_search(logits, main.ids, main.tail.log(), target, rows, learning_rate=0.1)
    dense = ops.RelativeRows(None, torch.softmax(random_logits(600, 500, seed=4), dim=1), None, 500)
    few_logits = random_logits(1, 600, seed=5)
    few = ops.topk_softmax(few_logits, K)
    ops.fuse(few_logits.clone(), [ops.FuseInput(few, dense)] * 2, weights, learning_rate=0.1)
    target = torch.softmax(random_logits(1, 500, seed=6), dim=1)
    ops.inverse_search(few.probs.log(), few.ids, few.tail.log(), target, dense, learning_rate=0.1)


def table(found: list[Accesses]) -> Iterator[str]:
    yield "  extra  worst  times   mean      of  one word  what"
    for one in found:
        if one.worst == 1:
            continue
        same = str(one.same_word) if one.kind == "atomic" else ""
        yield (
            f"{one.extra:7}{one.worst:7}{one.worst_count:7}{one.mean:7.2f}{one.instructions:8}{same:>10}  "
            f"{one.kernel}, {one.place}, {one.kind} {one.order} of {one.size} bytes: {one.text}"
        )
    yield f"{sum(one.worst == 1 for one in found)} other places have no conflict"


if __name__ == "__main__":
    if sys.argv[1:] == ["--in-the-emulator"]:
        assert emulated.EMULATOR is not None
        _run()
        print(emulated.EMULATOR.bank_report(), end="")
    else:
        print("\n".join(table(measure())))
