"""Ensemble decoding beside its members alone, and beside the authors' way of running assistants.

The ensembles have the default settings; the certified skip is the search's, so it is timed with
`fuser="deepen"`, beside the same without it. Everything is greedy, without drafts (bench/drafts.py times
those), and in one process with the same threads. What is compared alternates, but for the authors' way,
which is timed after ours, and the batches, each timed once. Times a token leave out the step that reads the
prompt, on both sides; the time to the first token is that step. Rows that are computed on demand, the
`calibrated` recipe's, are timed once by themselves, cold: the cache folder is empty.

`--backend llama.cpp` measures the members there instead (`decode_native`), and writes a file of its own into
bench/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import decode_native
import torch
from common import (
    ROOT,
    TIMED,
    Figure,
    again_with_an_empty_cache,
    check_data,
    compared,
    percentile,
    resident,
    spread,
    start_of_peak,
    write_json,
)
from decode_parts import (
    alone_in_transformers,
    not_asked,
    questions_of,
    say,
    search_of,
    split_of,
    texts_of,
)

from deepen_ext.measure.evaluation.tasks import TASKS

CONTEXT = 256
QUESTIONS = 4  # of GSM8K
BATCH_CONTEXTS = (64, 256, 1024)
BATCHES = (1, 4, 16)
BATCH_TOKENS = 24
FEW_SHOT_BATCH = 16
FEW_SHOT_TOKENS = 8
AUTHORS_EVERY = 4  # tokens: the authors' way is timed at every fourth
# Runs of an ensemble, and what they are called: as users have it, and its search without and with the skip.
KINDS = {"default": "", "search": ", fuser deepen", "skip": ", fuser deepen, certified skip"}


def measure(folders: Sequence[str], new_tokens: int, repetitions: int, data: Path) -> dict[str, Any]:
    """All raw figures; HF_ASSETS_CACHE must name an empty folder."""
    from deepen_ext import Ensemble
    from deepen_ext.members.loading import load_member

    members = [load_member(folder) for folder in folders[:2]]
    prompt = texts_of(members[0], CONTEXT, 1)[0]
    calibrated = Ensemble(members, **TIMED)
    cold = calibrated.generate(prompt, max_new_tokens=new_tokens, draft=0)
    rows = calibrated.rows_computed
    warm = Ensemble(members, **TIMED)  # reads the rows from the cache folder, as a second process would
    if warm.generate(prompt, max_new_tokens=new_tokens, draft=0).token_ids != cold.token_ids:
        raise RuntimeError("warm and cold rows give different texts")
    if rows == 0 or warm.rows_computed != 0:
        raise RuntimeError(f"rows computed: {rows} cold, {warm.rows_computed} warm; expected some and none")
    pair = Ensemble(members)
    pair.generate(prompt, max_new_tokens=8, draft=0)
    say("beside the members, prose")
    found: dict[str, Any] = {
        "cold": split_of(cold.timings) | {"rows": rows, "prompt": cold.timings.prompt_ms},
        "prose": _beside_members(pair, [prompt], new_tokens, repetitions),
        "gsm8k": _beside_members(pair, questions_of(members[0], data, CONTEXT, QUESTIONS), new_tokens, 1),
        "few-shot": _few_shot(pair, data, 2),
        "authors": _authors(pair, prompt, new_tokens),
        "batches": [
            _batch(search_of(pair) if skip else pair, context, batch, skip)
            for context in BATCH_CONTEXTS
            for batch in BATCHES
            for skip in (False, True)
            if not skip or context == CONTEXT
        ],
    }
    say("three members")
    trio = Ensemble([*members, load_member(folders[2])])
    trio.generate(prompt, max_new_tokens=8, draft=0)
    found["trio"] = _beside_members(trio, [prompt], BATCH_TOKENS, 2)
    return found


def _few_shot(ensemble: Any, data: Path, repetitions: int) -> dict[str, list[float]]:
    """Steps of a batch on whole prompts of GSM8K; what all rows share is read once, and by every row."""
    from deepen_ext.members.hf import attention

    say(f"few-shot prompts, batch {FEW_SHOT_BATCH}")
    prompts = [item.prompt for item in TASKS["gsm8k"].items(data, "dev")[:FEW_SHOT_BATCH]]
    steps: dict[str, list[float]] = {"once": [], "by every row": []}
    fewest, texts = attention._FEWEST_SPARED, []
    try:
        for _ in range(repetitions):
            for kind, spared in (("once", fewest), ("by every row", 1 << 60)):
                attention._FEWEST_SPARED = spared
                done = ensemble.generate(prompts, max_new_tokens=FEW_SHOT_TOKENS, draft=0)
                texts.append(done.texts)
                steps[kind] += done.timings.step_ms[1:]
    finally:
        attention._FEWEST_SPARED = fewest
    if any(one != texts[0] for one in texts):
        raise RuntimeError("reading common states once changed a text")
    return steps


def _beside_members(ensemble: Any, prompts: list[str], new_tokens: int, repetitions: int) -> dict[str, Any]:
    """Each prompt by each member alone, by the ensemble, and by the search with and without the skip."""
    members, search = ensemble.members, search_of(ensemble)
    ways = {"default": (ensemble, False), "search": (search, False), "skip": (search, True)}
    for member in members:
        alone_in_transformers(member, prompts[0], 4)  # warm up
    alone: dict[str, list[float]] = {name: [] for name in ensemble.names}
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(repetitions):
        for prompt in prompts:
            for name, member in zip(ensemble.names, members, strict=True):
                alone[name].append(alone_in_transformers(member, prompt, new_tokens))
            texts = {}
            for kind, (one, skip) in ways.items():
                start_of_peak()
                base = resident()
                done = one.generate(prompt, max_new_tokens=new_tokens, draft=0, certified_skip=skip)
                texts[kind] = done.token_ids
                runs[kind].append(
                    split_of(done.timings)
                    | {
                        "prompt": done.timings.prompt_ms,
                        "steps": done.timings.step_ms[1:],
                        "skipped": done.timings.skipped_share,
                        "peak": resident("VmHWM") - base,
                    }
                )
            if texts["search"] != texts["skip"]:
                raise RuntimeError("the certified skip changed the text")
    return {"alone": alone, "new_tokens": new_tokens, **runs}


def _authors(ensemble: Any, prompt: str, new_tokens: int) -> dict[str, list[float]]:
    """The assistants as the authors run them (OrangeInSouth/DeePEn, src/assist_model_thread.py).

    For every token `generate(max_new_tokens=1)` on the whole text, without a cache. Their transformers, 4.40,
    computes the logits of every position on the way, today's those of the last one alone; both are timed.
    """
    import torch

    say("the authors' way")
    done = ensemble.generate(prompt, max_new_tokens=new_tokens, draft=0)
    main = ensemble.members[0].vocabulary
    every: list[float] = []
    last: list[float] = []
    for length in range(0, len(done.token_ids), AUTHORS_EVERY):
        text = prompt + main.decode(done.token_ids[:length], continues=True).decode(errors="replace")
        spent = [0.0, 0.0]
        for member in ensemble.members[1:]:
            for which, keep in enumerate((0, 1)):
                start = time.perf_counter()
                encoded = member.tokenizer(text, return_tensors="pt")
                with torch.inference_mode():
                    member.model(**encoded, logits_to_keep=keep, use_cache=True).logits[:, -1].float()
                spent[which] += (time.perf_counter() - start) * 1e3
        every.append(spent[0])
        last.append(spent[1])
    return {"every position": every, "last position": last}


def _batch(ensemble: Any, context: int, batch: int, skip: bool) -> dict[str, Any]:
    say(f"batch {batch}, context {context}{', certified skip' if skip else ''}")
    prompts = texts_of(ensemble.members[0], context, batch)
    ensemble.generate(prompts[:1], max_new_tokens=2, draft=0)
    base = start_of_peak()
    timings = ensemble.generate(prompts, max_new_tokens=BATCH_TOKENS, draft=0, certified_skip=skip).timings
    return {
        "context": context,
        "batch": batch,
        "skip": skip,
        "prompt": timings.prompt_ms,
        "steps": timings.step_ms[1:],
        "tokens_per_second": timings.tokens_per_second,
        "skipped": timings.skipped_share,
        "peak": resident("VmHWM") - base,
    }


def figures(found: dict[str, Any]) -> list[Figure]:
    """The raw measurements as figures."""
    made: list[Figure] = []

    def add(name: str, values: Sequence[float], unit: str = "ms a token", **more: Any) -> None:
        made.append(
            Figure(name, statistics.median(values), unit, spread(values), repetitions=len(values), **more)
        )

    def beside(what: str, runs: dict[str, Any], kind: str, budget: float | None) -> None:
        sums = [sum(times) for times in zip(*runs["alone"].values(), strict=True)]
        totals = [one["total"] for one in runs[kind]]
        ratio = statistics.median(ours / theirs for ours, theirs in zip(totals, sums, strict=True))
        steps = [step for one in runs[kind] for step in one["steps"]]
        skipped = statistics.mean(one["skipped"] for one in runs[kind])
        figure = compared(
            what + KINDS[kind],
            totals,
            sums,
            "sum of the members alone, transformers generate",
            ratio,
            budget=budget,
            p99=percentile(steps, 0.99),
            note=f"first token {statistics.median(one['prompt'] for one in runs[kind]):.0f} ms; p50 "
            f"{percentile(steps, 0.5):.0f} ms a token; {skipped:.0%} of the tokens settled; largest member "
            f"alone {max(map(statistics.median, runs['alone'].values())):.0f} ms; resident set "
            f"+{max(one['peak'] for one in runs[kind]):.0f} MB at the peak; {runs['new_tokens']} new tokens"
            f"{not_asked(runs[kind])}",
        )
        made.append(figure)

    prose, gsm8k, trio = found["prose"], found["gsm8k"], found["trio"]
    prefix = f"context {CONTEXT}, batch 1"
    beside(f"prose, {prefix}", prose, "default", 1.10)
    for stage in prose["default"][0]:
        if stage not in ("total", "prompt", "steps", "skipped", "peak"):
            add(f"of which: {stage}", [one[stage] for one in prose["default"]])
    for name, values in prose["alone"].items():
        add(f"{name} alone, transformers generate", values)
    for kind in ("search", "skip"):
        beside(f"prose, {prefix}", prose, kind, None)
    for kind, budget in (("default", 1.10), ("search", None), ("skip", 0.85)):
        beside(f"GSM8K, {prefix}", gsm8k, kind, budget)
    for kind in KINDS:
        beside(f"three members, prose, {prefix}", trio, kind, None)

    main_alone = statistics.median(next(iter(prose["alone"].values())))
    for kind, budget in (("every position", 8.0), ("last position", None)):
        theirs = main_alone + statistics.mean(found["authors"][kind])
        ours = [one["total"] for one in prose["default"]]
        made.append(
            Figure(
                f"prose, context {CONTEXT}, batch 1, the authors' way of running assistants, logits of "
                + (
                    "every position (transformers 4.40)"
                    if budget
                    else "the last position (today's transformers)"
                ),
                statistics.median(ours),
                "ms a token",
                spread(ours),
                len(ours),
                baseline="main model alone, and the assistant on the whole text again for every token",
                baseline_value=theirs,
                ratio=theirs / statistics.median(ours),
                ratio_of="baseline / ours",
                budget="" if budget is None else f"at least {budget:.0f} times faster",
                met=None if budget is None else theirs / statistics.median(ours) >= budget,
                note=f"every {AUTHORS_EVERY}th of {prose['new_tokens']} tokens, timed after ours; no fusion "
                "in the baseline",
            )
        )
    few_shot = found["few-shot"]
    theirs = statistics.median(few_shot["by every row"])
    add(
        f"few-shot prompts of GSM8K, batch {FEW_SHOT_BATCH}",
        few_shot["once"],
        unit="ms a step",
        baseline="the same, with the states that all rows share read by every row",
        baseline_value=theirs,
        baseline_spread=spread(few_shot["by every row"]),
        baseline_repetitions=len(few_shot["by every row"]),
        ratio=statistics.median(few_shot["once"]) / theirs,
        ratio_of="ours / baseline",
        equality="the same texts",
    )
    alone = {(one["context"], one["skip"]): one for one in found["batches"] if one["batch"] == 1}
    for one in found["batches"]:
        single = alone[one["context"], one["skip"]]
        ratio = one["tokens_per_second"] / single["tokens_per_second"]
        wanted = one["batch"] == 16 and one["context"] == CONTEXT and not one["skip"]
        made.append(
            Figure(
                f"batch {one['batch']}, context {one['context']}"
                + KINDS["skip" if one["skip"] else "default"],
                one["tokens_per_second"],
                "tokens a second",
                (one["tokens_per_second"],) * 2,
                1,
                baseline="batch 1",
                baseline_value=single["tokens_per_second"],
                ratio=ratio,
                ratio_of="ours / baseline",
                budget="at least 4 times the baseline" if wanted else "",
                met=ratio >= 4 if wanted else None,
                note=f"first token {one['prompt']:.0f} ms, a step p50 {percentile(one['steps'], 0.5):.0f}, "
                f"p99 {percentile(one['steps'], 0.99):.0f} ms; "
                f"{one['skipped']:.0%} settled; resident set +{one['peak']:.0f} MB at the peak; "
                f"{BATCH_TOKENS} new tokens a row",
            )
        )
    cold = found["cold"]
    add(
        "cold rows (first run, empty cache), prose, batch 1",
        [cold["total"]],
        note=f"{cold['rows']} rows computed; fusion {cold['fusion']:.2f} ms a token; reading the prompt took "
        f"{cold['prompt']:.0f} ms",
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend", choices=["transformers", "llama.cpp"], default="transformers", help="of the members"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, help="5 by default; 3 with --quick")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with gsm8k/ (transformers)"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument(
        "--quick", action="store_true", help="llama.cpp: one text of the pair, and the three members, alone"
    )
    parser.add_argument("--threads", type=int, help="llama.cpp: of a forward pass; default: torch's")
    parser.add_argument("--results", type=Path, help="llama.cpp: folder; default: bench/results")
    parser.add_argument("--members", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repetitions is None:
        options.repetitions = 3 if options.quick else 5
    if options.backend == "llama.cpp":
        options.threads = options.threads or torch.get_num_threads()
        options.results = options.results or ROOT / "bench" / "results"
        decode_native.run(options)
        return
    if options.quick or options.threads or options.results:
        parser.error("--quick, --threads and --results are for --backend llama.cpp")
    check_data(parser, options.data)
    if options.members is None:
        from deepen_ext.members.hf.gguf_conversion import convert_embedded

        names = ("smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct")
        again_with_an_empty_cache([convert_embedded(name, print) for name in names])
    found = measure(options.members, options.new_tokens, options.repetitions, options.data)
    made = figures(found)
    for figure in made:
        ratio = "" if figure.ratio is None else f"{figure.ratio:8.2f} x"
        print(f"{figure.name:100} {figure.value:9.2f} {figure.unit:16} {ratio}")
    if options.json is not None:
        write_json(options.json, {"figures": [figure.as_dict() for figure in made], "raw": found})


if __name__ == "__main__":
    main()
