"""The demo pair with its assistant in an actor of Ray on this machine, beside the same in process.

Milliseconds a step without drafts, and a token with drafts, and the bytes of the calls. Before anything is
timed the texts are compared: an actor is asked token by token, where a draft in process is read at once, and
quantised weights then differ in last digits. Prompts whose texts fall apart at a near-tie are left out, and
counted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import ray
from common import PROMPTS, ROOT, Figure, environment, percentile, speed_file, spread, write_json

from deepen_ext import Ensemble
from deepen_ext.members.from_text import DEMO_PAIR
from deepen_ext.members.ray.remote import RemoteMember

BUDGETS = {0: ("a step", 2.0), 4: ("a token", 1.0)}  # by the draft's length


class Counted:
    """Bytes there and back, of all calls while it is on."""

    def __init__(self) -> None:
        self.calls = self.sent = self.received = 0

    def __enter__(self) -> Counted:
        self._call, self._get = RemoteMember.call, RemoteMember.get
        counted = self

        def call(member: RemoteMember, method: str, *args: Any) -> Any:
            counted.calls += method == "ask"
            counted.sent += sum(len(one) for one in args if isinstance(one, bytes))
            return counted._call(member, method, *args)

        def get(member: RemoteMember, reference: Any) -> Any:
            reply = counted._get(member, reference)
            counted.received += len(reply) if isinstance(reply, bytes) else 0
            return reply

        RemoteMember.call, RemoteMember.get = call, get  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        RemoteMember.call, RemoteMember.get = self._call, self._get  # type: ignore[method-assign]


def write(ensemble: Ensemble, prompt: str, draft: int, tokens: int) -> tuple[list[int], list[float], float]:
    """The text's ids, each step's milliseconds without the first, and the whole time after the first step."""
    run = ensemble.start(prompt, max_new_tokens=tokens, min_new_tokens=tokens, draft=draft)
    try:
        times, before = [], time.perf_counter()
        for _ in run:
            now = time.perf_counter()
            times.append(1e3 * (now - before))
            before = now
    finally:
        run.close()
    return run.results()[0].token_ids, times[1:], sum(times[1:])


def measure(tokens: int, rounds: int, threads: int) -> list[Figure]:
    settings: dict[str, Any] = {"backend": "llama.cpp", "threads": threads, "fuser": "deepen"}
    here = Ensemble.from_pretrained(DEMO_PAIR, **settings)
    there = Ensemble.from_pretrained(DEMO_PAIR, **settings, placement=[None, {"num_cpus": threads}])
    figures = []
    for draft, (what, budget) in BUDGETS.items():
        prompts = [
            prompt
            for prompt in PROMPTS
            if write(here, prompt, draft, tokens)[0] == write(there, prompt, draft, tokens)[0]
        ]
        assert prompts, "all texts differ: near-ties fell the other way; give fewer --tokens"
        found: dict[str, list[float]] = {"here": [], "there": []}
        with Counted() as counted:
            for _ in range(rounds):
                for prompt in prompts:  # side by side, so that both see the same machine
                    for name, one in (("here", here), ("there", there)):
                        _, steps, whole = write(one, prompt, draft, tokens)
                        found[name] += steps if draft == 0 else [whole / (tokens - 1)]
        more = percentile(found["there"], 0.5) - percentile(found["here"], 0.5)
        written = rounds * len(prompts) * tokens
        figure = Figure(
            f"assistant in an actor, {f'drafts of {draft}' if draft else 'no drafts'}, {what}",
            percentile(found["there"], 0.5),
            "ms",
            spread(found["there"]),
            len(found["there"]),
            baseline="in process",
            baseline_value=percentile(found["here"], 0.5),
            baseline_spread=spread(found["here"]),
            baseline_repetitions=len(found["here"]),
            equality="the same tokens",
            budget=f"at most {budget:g} ms more",
            met=more <= budget,
            note=f"{more:+.2f} ms; a token {counted.calls / written:.2f} calls, {counted.sent / written:.0f} "
            f"bytes there, {counted.received / written:.0f} bytes back; {len(prompts)} of {len(PROMPTS)} "
            "prompts, whose texts are the same",
        )
        figures.append(figure)
        print(f"{figure.name}: {figure.value:.2f} against {figure.baseline_value:.2f} ms, {figure.note}")
    there.members[1].backend.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of each member's forwards")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "ray_steps")
    options = parser.parse_args()
    ray.init(
        address="local", num_cpus=options.threads, object_store_memory=100 << 20, include_dashboard=False
    )
    found = environment()
    figures = measure(options.tokens, options.rounds, options.threads)
    target = options.results / speed_file(found)
    write_json(target, {**found, "figures": {"ray_steps": [one.as_dict() for one in figures]}})
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
