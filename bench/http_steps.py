"""What a step takes more with the assistant in a server: the demo pair, Gemma in llama.cpp's server.

    OMP_NUM_THREADS=1 python bench/http_steps.py              some minutes on two idle cores
    python bench/http_steps.py --tokens 8 --repetitions 1     a try

The server is llama.cpp's own, as the package xllamacpp brings it, in another process, with the same file and
one thread, as the member in process has. Both ensembles write the same prompts in turns, without drafts and
with, and the medians over the repetitions are compared: milliseconds a token of the whole, and of the
assistant's share of it. A step of both reads one token in the assistant. Texts may fall apart at near-ties;
how many did is said. Bytes are those of the bodies, of requests and of answers. `alone` is the time of a
request of one new token, less what the server says it computed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import PROMPTS, ROOT, environment, speed_file, write_json

from deepen_ext import Ensemble, demo
from deepen_ext.members.http.protocols.base import Question
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

sys.path.insert(0, str(ROOT / "tests"))
from llama_server import llama_server

MAIN, ASSISTANT = "smollm2-135m-instruct", "gemma-3-270m"
BUDGETS = {0: 2.0, 4: 1.0}  # milliseconds a token more, by the draft's length


def one_run(ensemble: Ensemble, prompt: str, tokens: int, draft: int) -> tuple[float, float, list[int]]:
    """Milliseconds a token, the assistant's share of them, and the token ids."""
    found = ensemble.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, draft=draft)
    timings = found.timings
    share = timings.members_ms[ensemble.names[1]] / timings.later_tokens
    return timings.ms_per_token, share, found.token_ids


class Bytes:
    """Counts the bytes of a member's requests and answers from now on."""

    def __init__(self, member: Member) -> None:
        self.sent = self.received = 0
        client = member.backend.client  # type: ignore[attr-defined]
        once = type(client)._once

        def counting(method: str, path: str, body: bytes | None, deadline: float) -> Any:
            reply = once(client, method, path, body, deadline)
            self.sent += len(body or b"")
            self.received += len(reply.body)
            return reply

        client._once = counting


def compare(pair: dict[str, Ensemble], options: argparse.Namespace, draft: int) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pair}
    more, same = [], []
    counted = Bytes(pair["http"].members[1])
    tokens = 0
    for repetition in range(options.repetitions):
        for prompt in PROMPTS[: options.prompts]:
            texts = {}
            order = list(pair) if repetition % 2 == 0 else list(reversed(pair))
            for name in order:
                ms, share, texts[name] = one_run(pair[name], prompt, options.tokens, draft)
                times[name].append((ms, share))
            tokens += len(texts["http"])
            more.append(times["http"][-1][0] - times["in process"][-1][0])
            if texts["http"] == texts["in process"]:
                same.append(more[-1])
    medians = {
        name: [statistics.median(one) for one in zip(*own, strict=True)] for name, own in times.items()
    }
    return {
        "draft": draft,
        "ms a token": {name: own[0] for name, own in medians.items()},
        "of it the assistant": {name: own[1] for name, own in medians.items()},
        "ms a token more": statistics.median(more),
        "ms a token more, texts that are the same": statistics.median(same) if same else None,
        "budget": BUDGETS[draft],
        "texts": len(more),
        "texts that fell apart": len(more) - len(same),
        "bytes a token, sent": counted.sent / tokens,
        "bytes a token, received": counted.received / tokens,
    }


def alone(member: Member, k: int, rounds: int) -> float:
    """Milliseconds of a request of one new token, less the server's own time for its prompt."""
    backend: Any = member.backend
    ids = member.vocabulary.prefix_ids + member.vocabulary.encode(PROMPTS[0])
    spent = []
    backend.answer(Question(ids, 1, k, 0))
    for i in range(rounds):
        asked = Question([*ids, 500 + i], 1, k, 0)
        payload = backend.protocol.payload(asked)
        payload = {**payload, "response_fields": [*payload["response_fields"], "timings/prompt_ms"]}
        began = time.perf_counter()
        answer = backend.client.post(backend.protocol.path, payload)
        spent.append(1e3 * (time.perf_counter() - began) - answer["timings/prompt_ms"])
    return statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32, help="new ones of a text")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "http_steps")
    options = parser.parse_args()
    found = environment() | {"kind": "http", "threads": torch.get_num_threads()}
    file = demo.gguf_file(ASSISTANT)
    with llama_server(file, context=1024) as server:  # with one thread
        main_model, local = load_member(f"demo:{MAIN}"), load_member(f"demo:{ASSISTANT}", threads=1)
        served = load_member(server.url, tokenizer=f"demo:{ASSISTANT}")
        pair = {
            "http": Ensemble([main_model, served], fuser="deepen"),
            "in process": Ensemble([main_model, local], fuser="deepen"),
        }
        for one in pair.values():
            one.generate(PROMPTS[0], max_new_tokens=4)
        found["alone"] = {f"k {k}": alone(served, k, 16) for k in (1, 128)}
        found["runs"] = [compare(pair, options, draft) for draft in BUDGETS]
        served.backend.close()
    for run in found["runs"]:
        print(run)
    print("a request without the forward pass, ms:", found["alone"])
    write_json(options.results / speed_file(found), found)


if __name__ == "__main__":
    main()
