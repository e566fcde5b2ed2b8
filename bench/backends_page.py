"""Writes what bench/backends.py and bench/start.py measured into docs/backends.md, between its markers.

The tables are made of bench/results/backends-*.json and start-*.json alone; the prose around them is the
page's own. `--check` changes nothing and exits with 1 where the page is out of date.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marked import write_marked

BENCH = Path(__file__).resolve().parent
STAGES = ("imports", "loading", "first token")


def head(found: dict[str, Any], more: str) -> str:
    machine, versions = found["machine"], found["versions"]
    commit = found["commit"][:10] + (" with uncommitted changes" if found["dirty"] else "")
    return (
        f"**{machine['cpu']}, {machine['cores']} cores** ({machine['isa']}), {versions['llama.cpp']}, "
        f"transformers {versions['transformers']}, torch {versions['torch']}; commit {commit}, "
        f"{found['date'][:10]}. {more}"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def differences(result: dict[str, Any]) -> str:
    rows = []
    for name, model in result["differences"].items():
        for kind, one in model["kinds"].items():
            exact, rounded = one["bits_per_byte_float32"], one["bits_per_byte_quantised"]
            rows.append(
                [
                    f"{name} ({model['file']})",
                    kind,
                    f"{one['positions']:,}",
                    f"{one['divergence']:.4f}",
                    f"{one['divergence_p99']:.4f}",
                    f"{one['same']:.1%}",
                    f"{exact:.4f}",
                    f"{rounded:.4f}",
                    f"{rounded - exact:+.4f}",
                ]
            )
    columns = ["model", "text", "positions", "KL, mean", "KL, 99 %", "same most probable token"]
    columns += ["bits a byte, float32", "bits a byte, llama.cpp", "difference"]
    more = "KL(float32 ‖ llama.cpp) in nats; 99 % of the positions have at most the second figure."
    return f"{head(result['environment'], more)}\n\n{table(columns, rows)}"


def repeatability(result: dict[str, Any]) -> str:
    found = result["repeatability"]
    rows = []
    for way, one in found["ways"].items():
        parted, tokens = one["texts_differ"], one["tokens_differ"]
        rows.append(
            [
                way,
                str(one["texts"]),
                f"{parted} ({parted / one['texts']:.0%})",
                f"{tokens:,} of {one['tokens']:,} ({tokens / one['tokens']:.1%})",
                "none" if not parted else f"one in {one['decisions'] / parted:,.0f} tokens",
            ]
        )
    columns = ["written", "texts", "texts that differ", "tokens that differ", "first differences"]
    more = (
        f"{' and '.join(found['members'])}, quantised, in llama.cpp; {found['prompts']} prompts of "
        f"{found['prompt_tokens']} tokens or less, greedy, {found['new_tokens']} new tokens or less, each "
        "beside the text that is written alone."
    )
    return f"{head(result['environment'], more)}\n\n{table(columns, rows)}"


def start(result: dict[str, Any]) -> str:
    has_first = any("very first" in found for found in result["start"].values())
    rows = []
    for backend, found in result["start"].items():
        runs, stages = found["command"], found["stages"]

        def middle(of: Sequence[dict[str, float]], key: str) -> float:
            return statistics.median(one[key] for one in of)

        split = " + ".join(f"{middle(stages, stage):.1f}" for stage in STAGES)
        first = found.get("very first")
        shown = "" if first is None else f"{first['first_token']:.1f} s, {first['peak']:,.0f} MB"
        rows.append(
            [
                backend,
                f"{middle(runs, 'first_token'):.1f} s",
                split,
                f"{middle(runs, 'end'):.1f} s",
                f"{middle(runs, 'peak'):,.0f} MB",
                *([shown] if has_first else []),
            ]
        )
    columns = ["backend", "to the first token", f"of it, in seconds: {' + '.join(STAGES)}", "to the end"]
    columns += ["memory at its peak", *(["the very first start"] if has_first else [])]
    runs = min(len(one["command"]) for one in result["start"].values())
    more = (
        f"The command of `make demo`, packages fetched; medians, runs in fresh processes: {runs}. The split "
        "is of runs of its own. Memory is the resident set, mapped files included."
    )
    if has_first:
        more += " At the very first start the cache has nothing but the GGUF files."
    return f"{head(result['environment'], more)}\n\n{table(columns, rows)}"


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str], str]] = {
    "differences": ("backends-*.json", differences, "bench/backends.py"),
    "repeatability": ("backends-*.json", repeatability, "bench/backends.py"),
    "start": ("start-*.json", start, "bench/start.py"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=BENCH.parent / "docs", help="folder of backends.md")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where it is out of date")
    options = parser.parse_args()

    for name, (pattern, section, script) in SECTIONS.items():
        files = sorted(options.results.glob(pattern))
        found = [section(json.loads(file.read_text(encoding="utf-8"))) for file in files]
        text = "\n\n".join(found) or f"Not measured yet: `{script}` does it."
        write_marked(options.docs / "backends.md", name, text, check=options.check)


if __name__ == "__main__":
    main()
