"""What `deepen-ext serve` does under load: the demo pair in llama.cpp, clients in this process by HTTP.

    OMP_NUM_THREADS=1 python bench/serve_load.py                       minutes on two idle cores
    python bench/serve_load.py --clients 1 2 --tokens 8 --requests 20  a try

The server is a process of its own. For each number of clients, all of them stream a greedy text at once; the
same prompts are written by `Ensemble.generate` in one batch, in another process, before or after in turns.
The server's own usage counts the tokens. Then: the time between tokens of running texts while a prompt of
--prompt-tokens is read beside them, and without it. Then --requests requests, one in ten of which is dropped
after its second token, and the server's resident memory along the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from common import LONG_TEXT, PROMPTS, ROOT, environment, percentile, resident, speed_file, write_json
from servers import server

BUDGET = 0.9  # of the batch's tokens a second
_ALONE = 8  # prompts that are also written one by one: batches in llama.cpp change last digits, and near-ties


@dataclass
class Text:
    """One streamed answer."""

    text: str = ""
    tokens: int = 0
    first: float = 0.0  # seconds
    between: list[float] = field(default_factory=list)


def prompts(count: int) -> list[str]:
    """No two alike, of a few dozen tokens."""
    return [f"{PROMPTS[i % len(PROMPTS)]} ({i})" if i >= len(PROMPTS) else PROMPTS[i] for i in range(count)]


async def stream(client: openai.AsyncOpenAI, prompt: str, tokens: int, drop_after: int = 0) -> Text:
    """One text; dropped after so many chunks where that is asked for."""
    found = Text()
    began = last = time.perf_counter()
    answer = await client.completions.create(
        model="deepen",
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = 0
    async for chunk in answer:
        now = time.perf_counter()
        if chunk.usage is not None:
            found.tokens = chunk.usage.completion_tokens
            continue
        chunks += 1
        if chunks == 1:
            found.first = now - began
        else:
            found.between.append(now - last)
        last = now
        found.text += chunk.choices[0].text
        if chunks == drop_after:
            await answer.close()
            break
    return found


async def at_once(address: str, asked: Sequence[str], tokens: int) -> tuple[list[Text], float]:
    """All of them at the same time, and the seconds that they took together."""
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=3600) as client:
        began = time.perf_counter()
        texts = await asyncio.gather(*(stream(client, prompt, tokens) for prompt in asked))
        return list(texts), time.perf_counter() - began


def batch(asked: Sequence[str], tokens: int, lanes: int) -> dict[str, Any]:
    """The same texts by `Ensemble.generate`, in a process of its own that ends before the next run."""
    code = (
        "import json, sys, time\n"
        "from deepen_ext import Ensemble, demo\n"
        "asked = json.load(sys.stdin)\n"
        "ensemble = Ensemble.from_pretrained(demo.members(), fuser='deepen')\n"
        "ensemble.generate(asked['prompts'][:1], max_new_tokens=2, draft=0)\n"
        "began = time.perf_counter()\n"
        "found = ensemble.generate(asked['prompts'], max_new_tokens=asked['tokens'], draft=0,\n"
        "                          batch_size=asked['lanes'])\n"
        "seconds = time.perf_counter() - began\n"
        "alone = [ensemble.generate(one, max_new_tokens=asked['tokens'], draft=0).text\n"
        "         for one in asked['prompts'][:asked['alone']]]\n"
        "print(json.dumps({'texts': found.texts, 'alone': alone, 'seconds': seconds,\n"
        "                  'tokens': sum(len(one.token_ids) for one in found)}))\n"
    )
    given = json.dumps({"prompts": list(asked), "tokens": tokens, "lanes": lanes, "alone": _ALONE})
    done = subprocess.run(
        [sys.executable, "-c", code], input=given, capture_output=True, text=True, cwd=ROOT, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "p50": round(1e3 * percentile(values, 0.5), 2),
        "p99": round(1e3 * percentile(values, 0.99), 2),
        "values": len(values),
    }


def load(address: str, clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """So many clients at once, beside one batch of the same prompts."""
    asked = prompts(clients)
    asyncio.run(at_once(address, asked[:1], 2))
    rates, batched, texts = [], [], []
    same = same_alone = alone = 0
    for repetition in range(options.repetitions):
        one: dict[str, Any] | None = batch(asked, options.tokens, options.lanes) if repetition % 2 else None
        found, seconds = asyncio.run(at_once(address, asked, options.tokens))
        one = one or batch(asked, options.tokens, options.lanes)
        rates.append(sum(text.tokens for text in found) / seconds)
        batched.append(one["tokens"] / one["seconds"])
        texts += found
        same += sum(text.text == other for text, other in zip(found, one["texts"], strict=True))
        same_alone += sum(text.text == other for text, other in zip(found, one["alone"], strict=False))
        alone += len(one["alone"])
    rate, beside = statistics.median(rates), statistics.median(batched)
    return {
        "clients": clients,
        "tokens a second": round(rate, 2),
        "batch, tokens a second": round(beside, 2),
        "of the batch's": round(rate / beside, 3),
        "budget": f"at least {BUDGET} of the batch's" if clients in (8, 32) else "",
        "first token, ms": milliseconds([one.first for one in texts]),
        "between tokens, ms": milliseconds([gap for one in texts for gap in one.between]),
        "texts": len(texts),
        "texts that are the batch's": same,
        "texts that are those written alone": f"{same_alone} of {alone}",
        "repetitions": options.repetitions,
    }


async def beside_a_prompt(address: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times between tokens of running texts, before and while a long prompt is read."""
    long = " ".join([LONG_TEXT] * (1 + options.prompt_tokens // 300))
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=3600) as client:
        ids = await _ids(address, long)
        ids = ids[: options.prompt_tokens]
        gaps: dict[str, list[float]] = {"without": [], "while it is read": []}
        state = "without"

        async def running(prompt: str) -> None:
            last = 0.0
            answer = await client.completions.create(
                model="deepen", prompt=prompt, max_tokens=options.running_tokens, temperature=0, stream=True
            )
            async for _ in answer:
                now = time.perf_counter()
                if last:
                    gaps[state].append(now - last)
                last = now

        tasks = [asyncio.create_task(running(one)) for one in prompts(4)]
        while len(gaps["without"]) < 4 * 16 and not all(one.done() for one in tasks):
            await asyncio.sleep(0.01)
        state = "while it is read"
        began = time.perf_counter()
        await client.completions.create(model="deepen", prompt=ids, max_tokens=1, temperature=0)
        read = time.perf_counter() - began
        state = "without"
        await asyncio.gather(*tasks)
    return {
        "prompt tokens": len(ids),
        "seconds to its first token": round(read, 2),
        "running texts": len(tasks),
        **{f"between tokens {name}, ms": milliseconds(values) for name, values in gaps.items()},
    }


async def _ids(address: str, text: str) -> list[int]:
    async with openai.AsyncOpenAI(base_url=address.removesuffix("/v1"), api_key="none") as client:
        found: Any = await client.post("/tokenize", body={"prompt": text, "model": "deepen"}, cast_to=object)
        return list(found["tokens"])


async def memory(address: str, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    """The server's resident megabytes over many requests, one in ten dropped."""
    rss: list[tuple[int, float]] = []
    left = iter(range(options.requests))
    done = 0
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=3600) as client:

        async def some() -> None:
            nonlocal done
            for number in left:
                prompt = f"{PROMPTS[number % len(PROMPTS)]} {number}"
                await stream(client, prompt, 8, drop_after=2 if number % 10 == 0 else 0)
                done += 1
                if done % max(options.requests // 20, 1) == 0:
                    rss.append((done, resident(process=pid)))

        await asyncio.gather(*(some() for _ in range(16)))
    quarter = len(rss) // 4
    return {
        "requests": done,
        "dropped": options.requests // 10,
        "rss, MB": [[count, round(value, 1)] for count, value in rss],
        "grown from the first quarter to the end, MB": round(rss[-1][1] - rss[quarter][1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--tokens", type=int, default=32, help="new ones of a text")
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=4000, help="0: leave this part out")
    parser.add_argument("--running-tokens", type=int, default=200, help="of the texts beside that prompt")
    parser.add_argument("--requests", type=int, default=2000, help="0: leave this part out")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "serve_load")
    options = parser.parse_args()
    found = environment() | {"kind": "serve_load", "tokens": options.tokens, "lanes": options.lanes}
    found["load"] = []

    def keep(measured: dict[str, Any]) -> None:
        """Written after each part, so that a run that is cut off loses one."""
        print(measured, flush=True)
        write_json(options.results / speed_file(found), found)

    with server(lanes=options.lanes) as (address, pid):
        for clients in options.clients:
            found["load"].append(load(address, clients, options))
            keep(found["load"][-1])
        if options.prompt_tokens:
            found["long prompt"] = asyncio.run(beside_a_prompt(address, options))
            keep(found["long prompt"])
        if options.requests:
            found["memory"] = asyncio.run(memory(address, pid, options))
            keep(found["memory"])


if __name__ == "__main__":
    main()
