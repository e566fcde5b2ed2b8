"""1 to 64 members at 0.1, 1 and 10 ms of network, with drafts and without: round trips and time a token.

What is real: the loop, the fusion, the drafts and who verifies them, the hand-off, the number of calls and
their bytes. What is simulated: the network and the forwards. The members are tiny models with one token a
byte that have read a text and write pieces of it, so that drafts stand often; they compute in about a
millisecond. An assistant's answer is there one round trip (`latency`) and one forward (`--forward-ms`, the
same for one token and for a draft) after it was asked: `wait` sleeps until then.
Assistants are asked before any is waited for, as in the loop, so that their delays pass side by side. The
main model is here and takes no simulated time. Bandwidth, and machines that slow one another down, are left
out: a reply has a kilobyte.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common import ROOT, Figure, environment, speed_file, write_json

from deepen_ext import Ensemble
from deepen_ext.members.backend import Answer, Session
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.loading import load_member
from deepen_ext.members.top_k_only import TopKOnly

sys.path.insert(0, str(ROOT / "tests"))
from tiny_models import PROSE, one_byte_tokens, save_model, tiny_reader

K = 128


@dataclass
class Network:
    """What all delayed assistants of a run share."""

    seconds: float = 0.0  # a round trip and a forward
    calls: int = 0
    sent: int = 0  # bytes, as members/ray/wire.py counts them, of assistants that sent their new ids alone
    received: int = 0


class Delayed(TopKOnly):
    """A backend whose answers come later."""

    def __init__(self, backend: TopKOnly, network: Network) -> None:
        super().__init__(backend, K)
        self.network = network

    def open(self, lanes: int = 1, capacity: int = 0) -> Session:
        return DelayedSession(super().open(lanes, capacity), self.network)


class DelayedSession:
    """See `Session`."""

    def __init__(self, session: Session, network: Network) -> None:
        self._session = session
        self._network = network
        self._lengths: dict[int, int] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> Answer:
        network = self._network
        network.calls += 1
        new = sum(max(1, len(ids) - self._lengths.get(lane, 0)) for lane, ids in targets.items())
        self._lengths |= {lane: len(ids) for lane, ids in targets.items()}
        network.sent += 12 + 16 * len(targets) + 4 * new
        asked = time.perf_counter()
        said = self._session.ask(targets, k, positions).wait()
        network.received += 8 + len(said) * (8 + 8 * said.k)
        return DelayedAnswer(said, asked + network.seconds)

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        return self._session.read(lane, ids, start, k)


@dataclass(frozen=True)
class DelayedAnswer:
    """See `Answer`."""

    said: Distribution
    at: float

    def wait(self) -> Distribution:
        time.sleep(max(0.0, self.at - time.perf_counter()))
        return self.said


def measure(sizes: Sequence[int], tokens: int, forward_ms: float, folder: Path) -> list[Figure]:
    network = Network()
    base = load_member(save_model(folder / "model", one_byte_tokens(), seed=0))
    main, *others = [tiny_reader(base, f"model-{n}", PROSE, seed=n) for n in range(max(sizes))]
    far = [replace(one, backend=Delayed(one.backend, network)) for one in others]  # type: ignore[arg-type]
    figures = []
    for size in sizes:
        # The main model counts half, as a main model whose drafts often stand.
        weights = [0.5, *[0.5 / (size - 1)] * (size - 1)] if size > 1 else [1.0]
        fuser = "average" if size > 1 else "single"
        ensemble = Ensemble([main, *far[: size - 1]], fuser=fuser, weights=weights)
        for latency in (0.1, 1.0, 10.0):
            texts = []
            for draft in (0, 4) if size > 1 else (0,):
                network.seconds = 0.0
                ensemble.generate(PROSE[:200], max_new_tokens=4, draft=draft)  # what is made once is made
                network.seconds = (latency + forward_ms) / 1e3
                network.calls = network.sent = network.received = 0
                began = time.perf_counter()
                text = ensemble.generate(
                    PROSE[:200], max_new_tokens=tokens, min_new_tokens=tokens, draft=draft
                )
                ms = 1e3 * (time.perf_counter() - began) / tokens
                texts.append(text.token_ids)
                trips = network.calls / tokens / max(1, size - 1)
                named = f"drafts of {draft}" if draft else "no drafts"
                figures.append(
                    Figure(
                        f"{size} members, {latency:g} ms, {named}",
                        ms,
                        "ms a token",
                        (ms, ms),
                        1,
                        equality="the same text with drafts and without",
                        note=f"a token {trips:.2f} round trips one after the other, "
                        f"{network.calls / tokens:.1f} calls, {network.sent / tokens:.0f} bytes out, "
                        f"{network.received / tokens:.0f} in; "
                        f"{text.timings.stood} of {text.timings.drafted} drafted tokens stood",
                    )
                )
                print(f"{figures[-1].name}: {ms:.2f} ms a token; {figures[-1].note}", flush=True)
            assert all(one == texts[0] for one in texts), "drafts changed the text"
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--forward-ms", type=float, default=10.0, help="of an assistant, simulated")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "network_steps")
    options = parser.parse_args()
    found = environment()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options.members, options.tokens, options.forward_ms, Path(folder))
    target = options.results / speed_file(found)
    write_json(target, {**found, "figures": {"network_steps": [one.as_dict() for one in figures]}})
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
