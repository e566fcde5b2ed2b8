"""Hours of mixed work in one process and one server: does memory stay flat, and every text the same?

    make soak                        an hour: the library in this process, and `deepen-ext serve` beside it
    make soak SOAK_MINUTES=5         a try

One set of loaded members is shared by several ensembles. Each round does every job below once, in an order of
its own: batches, streams, streams closed early or forgotten, chats, samples, errors, threads, new variants,
transformers' `generate`, and the server's endpoints with clients that leave. A job's text must be that of the
first round. After each round the resident memory, the open files and the threads of both processes are noted.
The result is the slope of the memory after a warm-up, in KB (1000 bytes) an hour, with its standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
from common import LONG_TEXT, PROMPTS, ROOT, environment, resident, speed_file, write_json
from servers import server

Job = Callable[[], str]
# Where the pieces of a stream are counted, drafts are off: with them a piece is what was accepted, and how
# many tokens are tried goes by measured times.
CHAT = [{"role": "user", "content": "Name three rivers of Europe."}]


def library_jobs() -> dict[str, Job]:
    """Work in this process: the demo pair in llama.cpp and in transformers, several ensembles of each."""
    from deepen_ext import Ensemble, InputError, demo

    native = Ensemble.from_pretrained(demo.members())
    hf = Ensemble.from_pretrained(demo.members(), backend="transformers")
    deepen, average = native.variant(fuser="deepen"), native.variant(fuser="average")
    main = hf.members[0]

    def refused(prompt: str = PROMPTS[0], **settings: Any) -> str:
        try:
            native.generate(prompt, **settings)
        except InputError as error:
            return str(error)
        raise AssertionError(f"not refused: {settings}")

    def closed_early(ensemble: Ensemble) -> str:
        with ensemble.stream(PROMPTS[1], max_new_tokens=24, draft=0) as stream:
            return next(stream) + next(stream)

    def forgotten() -> str:
        return next(hf.stream(PROMPTS[2], max_new_tokens=24, draft=0))

    def side_by_side() -> str:
        texts = [""] * 3

        def write(place: int, ensemble: Ensemble) -> None:
            texts[place] = ensemble.generate(PROMPTS[place], max_new_tokens=8).text

        threads = [
            threading.Thread(target=write, args=(place, one))
            for place, one in enumerate((native, deepen, average))
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        return "|".join(texts)

    def inside_transformers() -> str:
        ids = main.tokenizer(PROMPTS[3], return_tensors="pt")
        written = main.model.generate(**ids, max_new_tokens=8, custom_generate=hf.custom_generate)
        return str(main.tokenizer.decode(written[0]))

    def batch(ensemble: Ensemble, **settings: Any) -> str:
        return "|".join(
            ensemble.generate(list(PROMPTS[:3]), max_new_tokens=8, batch_size=2, **settings).texts
        )

    return {
        "batch, llama.cpp": lambda: batch(native),
        "batch, transformers": lambda: batch(hf),
        "batch, sampled": lambda: batch(hf, do_sample=True, temperature=0.8, seed=7),
        "stream": lambda: "".join(deepen.stream(PROMPTS[4], max_new_tokens=16)),
        "closed early, llama.cpp": lambda: closed_early(native),
        "closed early, transformers": lambda: closed_early(hf),
        "forgotten": forgotten,
        "chat": lambda: native.generate(CHAT, max_new_tokens=16, without_template="plain").text,
        "chat, transformers": lambda: hf.generate(CHAT, max_new_tokens=8, without_template="plain").text,
        "long prompt": lambda: average.generate(LONG_TEXT, max_new_tokens=4).text,
        "drafts": lambda: hf.generate(PROMPTS[5], max_new_tokens=16, draft=4).text,
        "a new variant": lambda: (
            native.variant(weights=[0.7, 0.3], fuser="deepen").generate(PROMPTS[6], max_new_tokens=8).text
        ),
        "threads": side_by_side,
        "generate of transformers": inside_transformers,
        "error: no prompt": lambda: refused(prompt=""),
        "error: too long": lambda: refused(max_new_tokens=10**6),
        "error: unknown setting": lambda: refused(no_such_setting=1),
    }


def server_jobs(address: str) -> dict[str, Job]:
    """Work at the server's endpoints."""
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)

    def completion(prompt: str, temperature: float = 0) -> str:
        answer = client.completions.create(
            model="deepen", prompt=prompt, max_tokens=12, temperature=temperature
        )
        return str(answer.choices[0].text)

    def streamed(leave_after: int = 0) -> str:
        pieces = []
        with client.chat.completions.create(
            model="deepen", messages=CHAT, max_tokens=16, temperature=0, stream=True, extra_body={"draft": 0}
        ) as answer:
            for chunk in answer:
                pieces.append(chunk.choices[0].delta.content or "" if chunk.choices else "")
                if len(pieces) == leave_after:
                    break
        return "".join(pieces)

    def refused() -> str:
        try:
            completion("Hello", temperature=-1)
        except openai.BadRequestError as error:
            return str(error)
        raise AssertionError("not refused")

    async def at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as many:
            answers = await asyncio.gather(
                *(
                    many.completions.create(model="deepen", prompt=one, max_tokens=8, temperature=0)
                    for one in PROMPTS
                )
            )
        return [one.choices[0].text for one in answers]

    return {
        "server: completion": lambda: completion(PROMPTS[0]),
        "server: chat, streamed": streamed,
        "server: a client leaves": lambda: streamed(leave_after=3),
        "server: refused": refused,
        "server: eight at once": lambda: "|".join(asyncio.run(at_once())),
    }


def noted(pid: int) -> dict[str, float]:
    """Resident megabytes (10^6 bytes), open files and threads of a process."""
    folder = Path(f"/proc/{pid}")
    return {
        "rss, MB": resident(process=pid),
        "open files": len(list((folder / "fd").iterdir())),
        "threads": len(list((folder / "task").iterdir())),
    }


def slope(hours: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Least squares' slope of values over hours, and its standard error.

    What a round leaves in memory is still there in the next one, so the residuals are correlated. The error
    is widened by sqrt((1 + r) / (1 - r)), with r their lag-1 correlation.
    """
    count = len(values)
    if count < 4:
        return math.nan, math.nan
    middle, mean = sum(hours) / count, sum(values) / count
    spread = sum((hour - middle) ** 2 for hour in hours)
    found = sum((hour - middle) * (value - mean) for hour, value in zip(hours, values, strict=True)) / spread
    left = [value - mean - found * (hour - middle) for hour, value in zip(hours, values, strict=True)]
    squares = sum(one**2 for one in left)
    if squares == 0:
        return found, 0.0
    follow = sum(one * other for one, other in itertools.pairwise(left)) / squares
    widened = math.sqrt((1 + max(follow, 0)) / (1 - min(follow, 0.99)))
    return found, widened * math.sqrt(squares / (count - 2) / spread)


def has_grown(values: Sequence[float]) -> bool:
    """Whether the second half lies above the first; what comes and goes has not grown."""
    half = len(values) // 2
    return half > 0 and min(values[half:]) > max(values[:half])


def summary(samples: Sequence[Mapping[str, Any]], process: str, warm_up: float) -> dict[str, Any]:
    """What came of one process after the first `warm_up` hours."""
    kept = [one for one in samples if one["hours"] >= warm_up]
    if not kept:
        return {}
    hours = [one["hours"] for one in kept]
    found, error = slope(hours, [one[process]["rss, MB"] for one in kept])
    return {
        "slope, KB an hour": round(1e3 * found, 1),
        "its standard error": round(1e3 * error, 1),
        "rounds": len(kept),
        "rss, MB": [round(kept[0][process]["rss, MB"], 1), round(kept[-1][process]["rss, MB"], 1)],
        **{
            name: [min(one[process][name] for one in kept), max(one[process][name] for one in kept)]
            for name in ("open files", "threads")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--warm-up", type=float, default=0.2, help="this share of the time is not in the slope"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the orders of the jobs")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "soak")
    options = parser.parse_args()
    orders = random.Random(options.seed)
    found = environment() | {
        "kind": "soak",
        "arenas": os.environ.get("MALLOC_ARENA_MAX", "any number"),
        "minutes": options.minutes,
        "warm_up": options.warm_up,
    }
    first: dict[str, str] = {}
    changed: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    # In llama.cpp the last digits depend on what is computed beside a text, or kept of an earlier one, and a
    # near-tie may fall the other way. In transformers each text is the same in any company.
    with server("--backend", "transformers", lanes=8) as (address, pid):
        jobs = library_jobs() | server_jobs(address)
        began = time.monotonic()
        while not samples or time.monotonic() - began < 60 * options.minutes:
            for name in orders.sample(sorted(jobs), len(jobs)):
                text = jobs[name]()
                if first.setdefault(name, text) != text:
                    changed.append(
                        {"job": name, "round": str(len(samples)), "first": first[name], "now": text}
                    )
                    print(f"round {len(samples)}, {name}: {first[name]!r} became {text!r}", flush=True)
            here = {"library": noted(os.getpid()), "server": noted(pid)}
            samples.append({"hours": (time.monotonic() - began) / 3600, **here})
            ended = samples[-1]["hours"]
            found |= {
                "rounds": len(samples),
                "jobs": len(samples) * len(jobs),
                "hours": round(ended, 3),
                "texts that changed": changed,
                **{
                    one: summary(samples, one, options.warm_up * options.minutes / 60)
                    for one in ("library", "server")
                },
                "samples": samples,
            }
            write_json(options.results / speed_file(found), found)
            print(f"round {len(samples)}, {60 * ended:.1f} min: {here}", flush=True)
    for one in ("library", "server"):
        print(one, found[one])
    grown = [
        f"{one}, {name}"
        for one in ("library", "server")
        for name in ("open files", "threads")
        if has_grown([sample[one][name] for sample in samples])
    ]
    for line in grown:
        print(f"grown: {line}")
    print(f"{len(changed)} of {found['jobs']} texts changed")
    if changed or grown:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
