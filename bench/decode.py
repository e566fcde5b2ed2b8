"""Milliseconds a token of greedy ensemble decoding, split by stage, beside each member alone in transformers.

Every repetition runs each member's own `generate` and the ensemble one after the other in one process, on
the same text of 256 tokens, with the same number of new tokens and the same threads. Reading the prompt is
left out on both sides. Relative rows are cold in the first generation (the cache folder is empty) and warm in
all others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import LONG_TEXT, Figure, spread, write_json

CONTEXT = 256
TOLERATED = 1.10


def measure(folders: list[str], new_tokens: int, repetitions: int) -> dict[str, Any]:
    """All figures of the decode benchmark; HF_ASSETS_CACHE must name an empty folder."""
    from deepen_ext import Ensemble
    from deepen_ext.models import load_member

    members = [load_member(folder) for folder in folders]
    prompts = [_prompt(member) for member in members]
    main_text = members[0].vocabulary.decode(prompts[0]).decode()

    def run(ensemble: Ensemble) -> Any:
        generation = ensemble.generate(main_text, max_new_tokens=new_tokens)
        if generation.finish_reason != "length":
            raise RuntimeError(
                f"the text ended early ({generation.finish_reason}): no figures; change LONG_TEXT"
            )
        return generation

    first = Ensemble(members)
    cold = run(first)
    cold_rows = first.rows_computed
    second = Ensemble(members)  # reads the rows from the cache folder, as a second process would
    second_run = run(second)
    if second_run.token_ids != cold.token_ids:
        raise RuntimeError("warm and cold rows give different texts")
    warm_rows = second.rows_computed
    if cold_rows == 0 or warm_rows != 0:
        raise RuntimeError(f"rows computed: {cold_rows} cold, {warm_rows} warm; expected some and none")
    for member, prompt in zip(members, prompts, strict=True):
        _alone(member, prompt, new_tokens)  # warm up

    alone: dict[str, list[float]] = {member.name: [] for member in members}
    stages: dict[str, list[float]] = {}
    ratios: list[float] = []
    for _ in range(repetitions):
        for member, prompt in zip(members, prompts, strict=True):
            alone[member.name].append(_alone(member, prompt, new_tokens))
        split = _split(run(second).timings)
        for stage, value in split.items():
            stages.setdefault(stage, []).append(value)
        ratios.append(split["total"] / sum(times[-1] for times in alone.values()))
    return {
        "new_tokens": new_tokens,
        "context": CONTEXT,
        "alone": alone,
        "stages": stages,
        "ratios": ratios,
        "cold": _split(cold.timings) | {"rows computed": cold_rows, "prompt": cold.timings.prompt_ms},
        "warm prompt": second_run.timings.prompt_ms,
        "changed_tokens": cold.changed_tokens,
    }


def _prompt(member: Any) -> list[int]:
    """The first 256 tokens of the text, in the member's own vocabulary."""
    ids = member.vocabulary.prefix_ids + member.vocabulary.encode(LONG_TEXT)
    if len(ids) < CONTEXT:
        raise RuntimeError(f"{member.name}: LONG_TEXT has only {len(ids)} tokens")
    return ids[:CONTEXT]


def _alone(member: Any, prompt: list[int], new_tokens: int) -> float:
    """Milliseconds a token of transformers' greedy `generate`, from the first new token to the last."""
    import torch
    from transformers import GenerationConfig

    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    ids = torch.tensor([prompt])
    # Without EOS it never stops early.
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    kept = member.model.generation_config
    member.model.generation_config = settings
    try:
        member.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock
        )
    finally:
        member.model.generation_config = kept
    tokens = clock.times[1:]  # the first call shows the prompt
    if len(tokens) != new_tokens:
        raise RuntimeError(f"{member.name}: {len(tokens)} tokens came instead of {new_tokens}")
    return 1e3 * (tokens[-1] - tokens[0]) / (new_tokens - 1)


def _split(timings: Any) -> dict[str, float]:
    tokens = timings.steps - 1
    members = {f"forward of {name}": value / tokens for name, value in timings.members_ms.items()}
    split = {
        **members,
        "fusion": timings.fusion_ms / tokens,
        "hand-off": timings.handoff_ms / tokens,
        "sampling": timings.sampling_ms / tokens,
    }
    total = timings.ms_per_token
    return {**split, "everything else": total - sum(split.values()), "total": total}


def figures(found: dict[str, Any]) -> list[Figure]:
    """The raw measurements as figures."""
    repetitions = len(found["ratios"])
    made = []

    def add(name: str, values: list[float], **more: Any) -> None:
        made.append(
            Figure(
                name, statistics.median(values), "ms a token", spread(values), repetitions=len(values), **more
            )
        )

    sums = [sum(times) for times in zip(*found["alone"].values(), strict=True)]
    ratio = statistics.median(found["ratios"])
    add(
        "greedy ensemble decoding, warm rows",
        found["stages"]["total"],
        baseline="sum of the members alone, transformers generate",
        baseline_value=statistics.median(sums),
        baseline_spread=spread(sums),
        baseline_repetitions=repetitions,
        ratio=ratio,
        ratio_of="ours / baseline",
        budget=f"at most {TOLERATED:.2f} times the baseline",
        met=ratio <= TOLERATED,
        equality="warm and cold rows give the same text",
        note=f"{CONTEXT}-token context, {found['new_tokens']} new tokens, prompt left out; median of the "
        f"ratios of {repetitions} interleaved repetitions",
    )
    for stage, values in found["stages"].items():
        if stage != "total":
            add(f"of which: {stage}", values)
    for name, values in found["alone"].items():
        add(f"{name} alone, transformers generate", values)
    cold = found["cold"]
    add(
        "greedy ensemble decoding, cold rows (first run, empty cache)",
        [cold["total"]],
        note=f"{cold['rows computed']} rows computed; fusion {cold['fusion']:.2f} ms a token; reading the "
        f"prompt took {cold['prompt']:.0f} ms, {found['warm prompt']:.0f} ms with warm rows",
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--members", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.members is None:
        # The models come from the usual cache; the measuring process has an empty one for relative rows.
        # Hugging Face reads the variable on import, hence a process of its own.
        from deepen_ext import demo

        folders = [str(path) for path in demo.members(progress=print)]
        with tempfile.TemporaryDirectory(prefix="deepen-ext-bench-") as empty:
            command = [sys.executable, *sys.argv, "--members", *folders]
            raise SystemExit(subprocess.run(command, env={**os.environ, "HF_ASSETS_CACHE": empty}).returncode)
    found = measure(options.members, options.new_tokens, options.repetitions)
    made = figures(found)
    for figure in made:
        print(f"{figure.name:70} {figure.value:9.3f} {figure.unit}")
    print(f"ratio ensemble / sum of members: {statistics.median(found['ratios']):.3f}")
    if options.json is not None:
        write_json(options.json, {"figures": [figure.as_dict() for figure in made], "raw": found})
        json.loads(options.json.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
