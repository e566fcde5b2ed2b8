"""Where a member's forward goes: milliseconds a token against the time to read its weights.

A decoding step on the CPU reads every weight once for each token. So the memory's bandwidth is its limit, and
the question is how near to it torch's own linear layers come, and ours (`small_products`), on this processor.
Each member decodes one token at a time after the same 256 tokens, in turns: torch's layers, ours, and ours
with the other member's forward in between, as an ensemble runs them.

`--isa avx2` runs the same with AVX2 alone, in torch, in its matrix library and in our kernels: how a
processor without AVX-512 would fare, as far as this one can show it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from common import LONG_TEXT, ROOT, Figure, environment, speed_file, spread, write_json

Products = Callable[..., AbstractContextManager[Any]]

CONTEXT = 256
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def bandwidth(repetitions: int = 9) -> float:
    """GB/s at which both cores together read 1 GB of float32 (the best of several sums)."""
    import torch

    block = torch.ones(250_000_000)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.nbytes / min(times) / 1e9


def bytes_a_token(model: Any) -> int:
    """Bytes of every linear layer's weight, the head's included: what one token reads."""
    import torch

    return sum(one.weight.nbytes for one in model.modules() if isinstance(one, torch.nn.Linear))


class Decoder:
    """A member's session that goes on by one token at a time."""

    def __init__(self, member: Any) -> None:

        self.name = member.name
        vocabulary = member.vocabulary
        self._ids = (vocabulary.prefix_ids + vocabulary.encode(LONG_TEXT))[:CONTEXT]
        self._session = member.backend.open(1, CONTEXT * 3)
        self._session.ask({0: self._ids}, 1).wait().scores()

    def step(self) -> float:
        """One greedy token, in milliseconds."""
        start = time.perf_counter()
        logits = self._session.ask({0: self._ids}, 1).wait().scores()
        taken = 1e3 * (time.perf_counter() - start)
        self._ids.append(int(logits[0].argmax()))
        return taken

    def drop(self) -> None:
        """Back to the first tokens, so that every round reads a cache of the same length."""
        del self._ids[CONTEXT:]


def measure(tokens: int, rounds: int) -> tuple[list[Figure], float]:
    """The figures of both demo members, and the memory's bandwidth in GB/s."""
    from deepen_ext import demo
    from deepen_ext.members.hf import forwards
    from deepen_ext.members.loading import load_member

    members = [load_member(path, backend="transformers") for path in demo.members()]
    decoders = [Decoder(member) for member in members]
    ours = forwards.small_products
    times: dict[tuple[str, str], list[float]] = {}

    def torch_own(*_: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def run(
        kind: str, products: Callable[..., AbstractContextManager[Any]], turns: list[list[Decoder]]
    ) -> None:
        forwards.small_products = products
        for group in turns:
            for decoder in group:
                decoder.drop()
                decoder.step()
            for _ in range(tokens):
                for decoder in group:
                    times.setdefault((decoder.name, kind), []).append(decoder.step())

    for _ in range(rounds):
        run("torch's linear layers", torch_own, [[one] for one in decoders])
        run("ours", ours, [[one] for one in decoders])
        run("ours, in turns with the other member", ours, [decoders])
    forwards.small_products = ours
    speed = bandwidth()
    figures = []
    for member in members:
        read = bytes_a_token(member.model)
        base = times[member.name, "torch's linear layers"]
        for (name, kind), taken in times.items():
            if name != member.name:
                continue
            figure = Figure(
                f"{name}, {kind}", statistics.median(taken), "ms a token", spread(taken), len(taken)
            )
            figure.bytes, figure.floor = read, read / speed / 1e6
            figure.floor_ratio = figure.value / figure.floor
            if taken is not base:
                figure.baseline, figure.baseline_value = "torch's linear layers", statistics.median(base)
                figure.ratio, figure.ratio_of = figure.value / figure.baseline_value, "ours / baseline"
            figures.append(figure)
    return figures, speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=["best", "avx2"], default="best")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "members")
    options = parser.parse_args()
    if options.isa == "avx2" and any(os.environ.get(key) != value for key, value in AVX2.items()):
        # Read when the libraries load: hence a new process.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})
    if options.isa == "avx2":
        from deepen_ext import _core

        _core.set_isa("avx2")
    figures, speed = measure(options.tokens, options.rounds)
    found = environment()
    for one in figures:
        print(
            f"{one.name}: {one.value:.1f} ms a token ({one.spread[0]:.1f} to {one.spread[1]:.1f}), "
            f"{one.floor_ratio:.2f} times the reading of {one.bytes / 1e6:.0f} MB at {speed:.1f} GB/s"
        )
    target = options.results / speed_file(found)
    write_json(
        target,
        {
            **found,
            "isa_of": "this processor's best" if options.isa == "best" else f"forced: {AVX2}",
            "bandwidth_gb_s": round(speed, 1),
            "figures": {"members": [one.as_dict() for one in figures]},
        },
    )
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
