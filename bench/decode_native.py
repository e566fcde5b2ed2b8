"""Decoding with llama.cpp members, beside llama.cpp's own loop over the same members.

All that is compared runs in one process with the same threads, in turns: each member by a plain loop over
llama.cpp's C API, each by transformers' greedy `generate` on the dequantised float32 weights, and the
ensemble with the default settings; with the certified skip, which is the search's, by `fuser="deepen"`.
Greedy, without drafts (bench/drafts.py times those); times a token leave out the step that reads the prompt,
on every side.

The three members with a main model of 1.5 billion weights run in a process of their own, for its peak memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Figure, compared, environment, percentile, resident, speed_file, spread, write_json
from decode_parts import alone_in_transformers, not_asked, say, search_of, split_of, texts_of
from plain_llama_cpp import PlainLoop, speed

PAIR = ("smollm2-135m-instruct", "gemma-3-270m")
TRIO = ("qwen2.5-coder-1.5b-instruct", *PAIR)
CONTEXT = 256
BATCH_CONTEXTS = (256, 1024)
BATCHES = (1, 4, 16)
BATCH_TOKENS = 24
CHECKED = 8  # tokens of the plain loop that are compared with the member's
OWN = "sum of the members' own llama.cpp loops"
GENERATE = "sum of the members alone, transformers generate"


def run(options: Any) -> None:
    """Measure what the options ask for, and write the file after each part of it."""
    from deepen_ext.members.llama_cpp.library import load_library

    found = environment()
    target = options.json or options.results / f"{Path(speed_file(found)).stem}-llama-cpp.json"
    whole = target.is_file() and not json.loads(target.read_text(encoding="utf-8")).get("quick", True)
    if options.quick and options.json is None and whole:
        sys.exit(f"{target} holds a whole run; name another file for the quick one with --json")
    found["versions"]["llama.cpp"] = load_library().name
    if found["machine"]["load_average"] > 0.5:
        say("other programs are running: threads that wait by spinning make these times worthless")
    raw: dict[str, Any] = {}

    def write() -> None:
        made = figures(raw)
        kind = {"quick": options.quick, "llama_cpp_threads": options.threads}
        content = {**found, **kind, "figures": {"llama.cpp": [one.as_dict() for one in made]}, "raw": raw}
        write_json(target, content)

    say("three members, in a process of their own")
    raw["trio"] = _trio(options)
    write()
    pair = load_native(PAIR, options.threads)
    raw["single"] = _single(pair, options)
    write()
    if not options.quick:
        raw["batches"] = []
        for context in BATCH_CONTEXTS:
            for batch in BATCHES:
                raw["batches"].append(_batch(pair, context, batch, options.threads))
                write()
    for one in figures(raw):
        ratio = "" if one.ratio is None else f"{one.ratio:8.2f} x"
        verdict = {None: "", True: "met", False: "missed"}[one.met]
        print(f"{one.name:88} {one.value:9.2f} {one.unit:16} {ratio} {verdict}")
    print(f"wrote {target}")


def load_native(names: Sequence[str], threads: int) -> list[Any]:
    """Embedded models as members in llama.cpp.

    The number of threads is fixed. Left to themselves the members take fewer on a busy machine, and would
    beat the plain loop there.
    """
    from deepen_ext.members.loading import load_members

    return load_members([f"demo:{name}" for name in names], backend="llama.cpp", threads=threads)


def _ids(member: Any, texts: Sequence[str]) -> list[list[int]]:
    return [member.vocabulary.prefix_ids + member.vocabulary.encode(text) for text in texts]


def _own_loops(members: Sequence[Any], texts: Sequence[str], tokens: int, threads: int) -> dict[str, Any]:
    """Each member by the plain loop over llama.cpp."""
    found = {}
    for member in members:
        ids = _ids(member, texts)
        loop = PlainLoop(member, len(texts), max(map(len, ids)) + tokens, threads)
        found[member.name] = speed(loop, ids, tokens)
        loop.close()
    return found


def _check_loops(members: Sequence[Any], text: str, threads: int) -> None:
    """That the plain loop writes what the member's session does."""
    loops = _own_loops(members, [text], CHECKED, threads)
    for member in members:
        (ids,) = _ids(member, [text])
        session = member.backend.open(1, len(ids) + CHECKED)
        written: list[int] = []
        for _ in range(CHECKED):
            written.append(int(session.ask({0: ids + written}, 1).wait().scores()[0].argmax()))
        session.close()
        if written != loops[member.name]["ids"]:
            raise RuntimeError(
                f"{member.name}: the plain loop wrote {loops[member.name]['ids']}, not {written}"
            )


def _ensemble_run(ensemble: Any, prompts: Any, tokens: int, skip: bool) -> dict[str, Any]:
    done = ensemble.generate(prompts, max_new_tokens=tokens, draft=0, certified_skip=skip)
    rows = 1 if isinstance(prompts, str) else len(prompts)
    if done.timings.tokens != rows * tokens:
        raise RuntimeError(f"{done.timings.tokens} tokens came instead of {rows * tokens}: take another text")
    return {
        **split_of(done.timings),
        "prompt": done.timings.prompt_ms,
        "steps": done.timings.step_ms[1:],
        "skipped": done.timings.skipped_share,
    }


def _single(pair: Sequence[Any], options: Any) -> dict[str, Any]:
    """One text: the plain loops, transformers, the ensemble with and without the skip, in turns."""
    from deepen_ext import Ensemble
    from deepen_ext.members.loading import load_members

    say("one text, beside both members in transformers")
    dense = load_members([f"demo:{name}" for name in PAIR], backend="transformers", threads=options.threads)
    text = texts_of(pair[0], CONTEXT, 1)[0]
    _check_loops(pair, text, options.threads)
    ensemble = Ensemble(pair)
    ways = {"asked": (ensemble, False), "skip": (search_of(ensemble), True)}
    tokens = options.new_tokens
    for one, skip in ways.values():
        _ensemble_run(one, text, tokens, skip)  # its rows, and memory
    for member in dense:
        alone_in_transformers(member, text, 4)
    found: dict[str, Any] = {"tokens": tokens, "own": [], "generate": [], "asked": [], "skip": []}
    for number in range(options.repetitions):
        found["own"].append(_own_loops(pair, [text], tokens, options.threads))
        found["generate"].append({m.name: alone_in_transformers(m, text, tokens) for m in dense})
        for kind, (one, skip) in ways.items():
            found[kind].append(_ensemble_run(one, text, tokens, skip))
        say(f"{number + 1} of {options.repetitions}")
    return found


def _batch(pair: Sequence[Any], context: int, batch: int, threads: int) -> dict[str, Any]:
    """Texts side by side: the plain loops and the ensemble."""
    from deepen_ext import Ensemble

    say(f"batch {batch}, context {context}")
    ensemble = Ensemble(pair)
    texts = texts_of(pair[0], context, batch)
    _ensemble_run(ensemble, texts[:1], 2, False)
    own = _own_loops(pair, texts, BATCH_TOKENS, threads)
    ours = _ensemble_run(ensemble, texts, BATCH_TOKENS, False)
    return {"context": context, "batch": batch, "own": own, "asked": ours}


def _trio(options: Any) -> dict[str, Any]:
    """`measure_trio` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trio.json"
        command = [sys.executable, __file__, str(file), str(options.threads), str(options.new_tokens)]
        subprocess.run(command, check=True)
        return dict(json.loads(file.read_text(encoding="utf-8")))


def measure_trio(threads: int, tokens: int) -> dict[str, Any]:
    """Three members in llama.cpp alone; the peak is taken before the plain loops make their caches."""
    from deepen_ext import Ensemble

    members = load_native(TRIO, threads)
    loaded = resident()
    ensemble = Ensemble(members)
    text = texts_of(members[0], CONTEXT, 1)[0]
    _ensemble_run(ensemble, text, 4, False)
    runs: dict[str, Any] = {"asked": [_ensemble_run(ensemble, text, tokens, False)]}
    runs["skip"] = [_ensemble_run(search_of(ensemble), text, tokens, True)]
    peak, mapped = resident("VmHWM"), resident("RssFile")
    _check_loops(members, text, threads)
    own = [_own_loops(members, [text], tokens, threads)]
    runs["asked"].append(_ensemble_run(ensemble, text, tokens, False))
    own.append(_own_loops(members, [text], tokens, threads))
    return {"tokens": tokens, "loaded": loaded, "peak": peak, "mapped": mapped, "own": own, **runs}


def figures(raw: dict[str, Any]) -> list[Figure]:
    """The raw measurements as figures."""
    made = _single_figures(raw["single"]) if "single" in raw else []
    made += _trio_figures(raw["trio"])
    for one in raw.get("batches", []):
        made += _batch_figures(one)
    return made


def _a_token(loop: dict[str, Any]) -> float:
    return statistics.mean(loop["steps"])


def _sums(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Milliseconds a token of all members, one after the other, of each repetition."""
    return [sum(map(_a_token, loops.values())) for loops in runs]


def _beside(
    name: str,
    runs: Sequence[dict[str, Any]],
    theirs: Sequence[float],
    baseline: str,
    budget: float | None,
    note: str,
) -> Figure:
    totals = [one["total"] for one in runs]
    steps = [step for one in runs for step in one["steps"]]
    return compared(
        name,
        totals,
        theirs,
        baseline,
        statistics.median(totals) / statistics.median(theirs),
        budget=budget,
        p99=percentile(steps, 0.99),
        note=note,
        equality=f"each plain loop's first {CHECKED} tokens are those of the member's session",
    )


def _loop_figures(runs: Sequence[dict[str, Any]], of: str) -> list[Figure]:
    made = []
    for name in runs[0]:
        own = [one[name] for one in runs]
        values = [_a_token(one) for one in own]
        reading = statistics.median(1e3 * one["prompt_tokens"] / one["prompt"] for one in own)
        made.append(
            Figure(
                f"{name} alone, llama.cpp's own loop{of}",
                statistics.median(values),
                "ms a token",
                spread(values),
                len(values),
                note=f"reads {reading:.0f} tokens a second",
            )
        )
    return made


def _single_figures(found: dict[str, Any]) -> list[Figure]:
    own, generate = found["own"], [sum(one.values()) for one in found["generate"]]
    made = []
    for kind, text in (("asked", ""), ("skip", ", fuser deepen, certified skip")):
        runs = found[kind]
        first = statistics.median(one["prompt"] for one in runs)
        settled = statistics.mean(one["skipped"] for one in runs)
        note = (
            f"first token {first:.0f} ms; {settled:.0%} of the tokens settled; {found['tokens']} new tokens"
            f"{not_asked(runs)}"
        )
        name = f"prose, context {CONTEXT}, batch 1{text}"
        asked = kind == "asked"
        made.append(_beside(name, runs, _sums(own), OWN, 1.05 if asked else None, note))
        made.append(_beside(name, runs, generate, GENERATE, 0.22 if asked else None, note))
        if asked:
            for stage in runs[0]:
                if stage not in ("total", "prompt", "steps", "skipped"):
                    values = [one[stage] for one in runs]
                    made.append(
                        Figure(
                            f"of which: {stage}",
                            statistics.median(values),
                            "ms a token",
                            spread(values),
                            len(values),
                        )
                    )
    made += _loop_figures(own, "")
    for name in found["generate"][0]:
        values = [one[name] for one in found["generate"]]
        made.append(
            Figure(
                f"{name} alone, transformers generate",
                statistics.median(values),
                "ms a token",
                spread(values),
                len(values),
            )
        )
    return made


def _trio_figures(found: dict[str, Any]) -> list[Figure]:
    made = []
    for kind, text in (("asked", ""), ("skip", ", fuser deepen, certified skip")):
        runs = found[kind]
        a_second = 1e3 / statistics.median(one["total"] for one in runs)
        settled = statistics.mean(one["skipped"] for one in runs)
        first = statistics.median(one["prompt"] for one in runs)
        note = (
            f"{a_second:.1f} tokens a second; first token {first:.0f} ms; {settled:.0%} of the tokens "
            f"settled; {found['tokens']} new tokens{not_asked(runs)}"
        )
        name = f"Qwen2.5-Coder-1.5B with both as assistants, prose, context {CONTEXT}, batch 1{text}"
        made.append(_beside(name, runs, _sums(found["own"]), OWN, None, note))
    peak = Figure(
        "Qwen2.5-Coder-1.5B with both as assistants: memory of the whole process at its peak",
        found["peak"],
        "MB",
        (found["peak"],) * 2,
        1,
        note=f"{found['mapped']:.0f} MB are mapped files; {found['loaded']:.0f} MB once all are loaded",
    )
    return [*made, peak, *_loop_figures(found["own"], ", beside two others")]


def _batch_figures(one: dict[str, Any]) -> list[Figure]:
    ours, own = one["asked"], one["own"]
    batch, context = one["batch"], one["context"]
    theirs = sum(_a_token(loop) for loop in own.values())
    step = statistics.mean(ours["steps"])
    reading = sum(loop["prompt"] for loop in own.values())
    a_second = {name: 1e3 * loop["prompt_tokens"] / loop["prompt"] for name, loop in own.items()}
    prompt_tokens = next(iter(own.values()))["prompt_tokens"]
    alone = ", ".join(f"{name} {1e3 * batch / _a_token(loop):.1f}" for name, loop in own.items())
    reading_alone = ", ".join(f"{name} {value:.0f}" for name, value in a_second.items())
    return [
        Figure(
            f"batch {batch}, context {context}",
            step,
            "ms a step",
            spread(ours["steps"]),
            len(ours["steps"]),
            baseline=OWN,
            baseline_value=theirs,
            ratio=step / theirs,
            ratio_of="ours / baseline",
            note=f"{1e3 * batch / step:.1f} tokens a second; alone: {alone}; {BATCH_TOKENS} tokens a text",
        ),
        Figure(
            f"batch {batch}, context {context}, reading the prompts",
            ours["prompt"],
            "ms",
            (ours["prompt"],) * 2,
            1,
            baseline=OWN,
            baseline_value=reading,
            ratio=ours["prompt"] / reading,
            ratio_of="ours / baseline",
            note=f"{1e3 * prompt_tokens / ours['prompt']:.0f} tokens a second through both; alone: "
            f"{reading_alone}",
        ),
    ]


if __name__ == "__main__":
    write_json(Path(sys.argv[1]), measure_trio(int(sys.argv[2]), int(sys.argv[3])))
