"""Writes the README's measured table from bench/results/*.json, between its bench markers.

`--check` changes nothing and exits with 1 where the README is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marked import write_marked

BENCH = Path(__file__).resolve().parent


def _number(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def _budget(figure: dict[str, Any]) -> str:
    verdict = {True: ": met", False: ": **missed**"}.get(figure.get("met"), "")
    return f"{figure.get('budget', '')}{verdict}"


def _row(figure: dict[str, Any]) -> str:
    def shown(value: float) -> str:
        return f"{_number(value / 1000)} ms" if milli(value) else f"{_number(value)} {figure['unit']}"

    def milli(value: float) -> bool:
        return bool(figure["unit"] == "µs" and value >= 10_000)

    ours = shown(figure["value"])
    if figure["repetitions"] > 1:
        scale = 1000 if milli(figure["value"]) else 1
        ours += " (" + " to ".join(_number(value / scale) for value in figure["spread"]) + ")"
    if "p99" in figure:
        ours += f", p99 {shown(figure['p99'])}"
    baseline = ""
    if "baseline_value" in figure:
        baseline = f"{figure['baseline']}: {shown(figure['baseline_value'])}"
    ratio = ""
    if "ratio" in figure:
        ratio = f"{_number(figure['ratio'])} ×"
    return f"| {figure['name']} | {ours} | {baseline} | {ratio} | {_budget(figure)} |"


def _decode_row(figure: dict[str, Any]) -> str:
    return f"{_row(figure)} {figure.get('note', '')} |"


def _gpu_row(figures: Sequence[dict[str, Any]]) -> str:
    """Of one name: the same figure beside each of its baselines."""
    figure = figures[0]
    ours = f"{_number(figure['value'])} {figure['unit']}"
    if "p99" in figure:
        ours += f" (p99 {_number(figure['p99'])} {figure['unit']})"
    floor = ""
    if "floor" in figure:
        floor = f"{figure['bytes'] / 1e6:,.2f} MB, {figure['floor']:.2f} µs, {figure['floor_ratio']:.1f} ×"
    baselines = [
        f"{one['baseline']}: {_number(one['baseline_value'])} {one['unit']}, {one['ratio']:,.1f} ×"
        for one in figures
        if "baseline_value" in one
    ]
    budgets = dict.fromkeys(_budget(one) for one in figures if "budget" in one)
    return f"| {figure['name']} | {ours} | {floor} | {'; '.join(baselines)} | {'; '.join(budgets)} |"


def _gpu_head(result: dict[str, Any]) -> str:
    gpu, versions = result["machine"]["gpu"], result["versions"]
    commit = result["commit"][:10] + (" with uncommitted changes" if result["dirty"] else "")
    return (
        f"**{gpu['name']}** ({gpu['multiprocessors']} multiprocessors, {gpu['l2_mb']:.0f} MB of L2, a large "
        f"copy moves {gpu['bandwidth_gb_s']:,} GB/s); Python {versions['python']}, torch "
        f"{versions['torch']}, CUDA {versions['cuda']}; commit {commit}, {result['date'][:10]}."
    )


def _gpu_section(result: dict[str, Any]) -> str:
    """Only what has a budget, and the filling of maps: the file has all of it."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for one in result["figures"].get("gpu", []):
        by_name.setdefault(one["name"], []).append(one)
    lines = [_gpu_head(result)]
    if by_name:
        lines[0] += (
            " Medians of a CUDA graph's replays, between events; the floor is the bytes that must be moved, "
            "at that bandwidth, and ours against it."
        )
        lines += [
            "",
            "| what | ours | floor | baseline, in the same run, and its ratio to ours | budget |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            _gpu_row(figures)
            for figures in by_name.values()
            if any("budget" in one for one in figures) or figures[0]["unit"] == "ms"
        ]
    if decoding := result["figures"].get("decode"):
        lines += ["", *_decode_table("models of 7B size", decoding)]
    if result["skipped"]:
        lines += ["", "Not measured: " + "; ".join(result["skipped"]) + "."]
    return "\n".join(lines)


def _decode_table(of: str, figures: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"| greedy decoding, {of} | ours | baseline, in the same run | ratio | budget | more |",
        "| --- | --- | --- | --- | --- | --- |",
        *map(_decode_row, figures),
    ]


def _section(result: dict[str, Any]) -> str:
    if "gpu" in result["machine"]:
        return _gpu_section(result)
    machine, versions = result["machine"], result["versions"]
    commit = result["commit"][:10] + (" with uncommitted changes" if result["dirty"] else "")
    lines = [
        f"**{machine['cpu']}, {machine['cores']} cores** ({machine['isa']}), {machine['ram_gb']} GB, "
        f"{result['torch_threads']} threads; Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {versions['compiler']}; commit {commit}, "
        f"{result['date'][:10]}. Medians, in brackets the 10th and 90th percentile. The ratio of an "
        "operation is baseline / ours, that of decoding ours / baseline.",
        "",
        "| what | ours | baseline, in the same run | ratio | budget |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_row(one) for name, group in result["figures"].items() if name != "decode" for one in group]
    lines += ["", *_decode_table("the demo pair", result["figures"].get("decode", []))]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=BENCH.parent / "README.md")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail where the README is out of date"
    )
    options = parser.parse_args()

    files = sorted(options.results.glob("*.json"))
    if not files:
        sys.exit(f"{options.results} has no results; run bench/run.py first")
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    table = "\n\n".join(_section(one) for one in results if "figures" in one)
    write_marked(options.readme, "bench", table, check=options.check)


if __name__ == "__main__":
    main()
