"""Writes what was timed into docs/performance.md, between its bench markers, and docs/performance/*.svg.

Tables and plots are made of bench/results/*.json alone; the prose around them is the page's own. `--check`
changes nothing and exits with 1 where the page or a plot is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marked import write_marked

from deepen_ext.plots.chart import Bar, bar_plot

BENCH = Path(__file__).resolve().parent
SUM = "sum of the members alone, transformers generate"  # bench/decode.py's baseline
ALONE = " alone, transformers generate"


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
    return (
        f"**{gpu['name']}** ({gpu['multiprocessors']} multiprocessors, {gpu['l2_mb']:.0f} MB of L2, a large "
        f"copy moves {gpu['bandwidth_gb_s']:,} GB/s); Python {versions['python']}, torch "
        f"{versions['torch']}, CUDA {versions['cuda']}; commit {_commit(result)}, {result['date'][:10]}."
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
        lines += ["", *_decode_table("greedy decoding, models of 7B size", decoding)]
    for what, cases in (("Not measured", result["skipped"]), ("Failed", result["failed"])):
        if cases:
            lines += ["", f"{what}: {'; '.join(cases)}."]
    return "\n".join(lines)


def _decode_table(of: str, figures: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"| {of} | ours | baseline, in the same run | ratio | budget | more |",
        "| --- | --- | --- | --- | --- | --- |",
        *map(_decode_row, figures),
    ]


def _measured(result: dict[str, Any], what: str, threads: int, others: str = "") -> str:
    """What was measured, on which machine, with which versions, at which commit."""
    machine, versions = result["machine"], result["versions"]
    run = ", a quick run" if result["quick"] else ""
    return (
        f"**{machine['cpu']}, {machine['cores']} cores** ({machine['isa']}), {what}, {threads} threads; "
        f"Python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}"
        f"{others}; commit {_commit(result)}, {result['date'][:10]}{run}"
    )


def _native_section(result: dict[str, Any]) -> str:
    """The demo pair and three members in llama.cpp: a file of their own."""
    llama_cpp = result["versions"]["llama.cpp"]
    lines = [
        f"{_measured(result, f'members in {llama_cpp}', result['llama_cpp_threads'])}. Medians, in brackets "
        "the 10th and 90th percentile; of batches means. Quantised weights, the default settings but for "
        "what a row names. The ratio is ours / baseline.",
        "",
        *_decode_table("greedy decoding, members in llama.cpp", result["figures"]["llama.cpp"]),
    ]
    return "\n".join(lines)


_DRAFT_PARTS = {
    "pair": "drafts, the demo pair in transformers",
    "trio": "drafts, the pair and Qwen2.5-Coder-0.5B in transformers",
    "batches": "drafts, the demo pair in transformers, batches",
    "latency": "drafts, the demo pair in transformers, when its text comes",
    "native": "drafts, the demo pair in llama.cpp, batches",
    "larger": "drafts, Qwen2.5-Coder-0.5B in transformers, its assistants (the pair) in llama.cpp, deepen",
}


def _drafts_section(result: dict[str, Any]) -> str:
    """With and without drafts: a file of their own, a table for each part."""
    others = f", {result['versions']['llama.cpp']}"
    lines = [
        f"{_measured(result, 'drafts', result['threads'], others)}. Greedy where no temperature is named, "
        "the default settings but for what a row names; float32 in transformers, quantised weights in "
        "llama.cpp. Medians, in brackets the 10th and 90th percentile; the ratio, ours / baseline, is the "
        "median of the ratios within a repetition. Each ensemble wrote a text before it was timed, so that "
        "the members' speed was known. In transformers all texts were the same, token for token, with every "
        "draft.",
    ]
    for part, title in _DRAFT_PARTS.items():
        if part in result["figures"]:
            lines += ["", *_decode_table(title, result["figures"][part])]
    return "\n".join(lines)


def speed_plot(result: dict[str, Any]) -> str:
    """A token's time beside that of the members one after the other; "" without such figures."""
    groups: dict[str, list[Bar]] = {}
    alone = []
    for one in result["figures"].get("decode", []):
        if one["name"].endswith(ALONE):
            name = one["name"].removesuffix(ALONE)
            alone.append(Bar(f"{name} alone, transformers", one["value"], "single", *one["spread"]))
        if one.get("baseline") != SUM:
            continue
        text, _, settings = one["name"].partition(", context 256, batch 1")
        if text not in groups:
            title = "the members one after the other, transformers"
            groups[text] = [Bar(title, one["baseline_value"], "single", *one["baseline_spread"])]
        label = settings.removeprefix(", ") or "fused by deepen-ext"
        if "certified skip" in settings:
            (settled,) = (part.split()[0] for part in one["note"].split("; ") if part.endswith("settled"))
            label += f" ({settled} settled)"
        groups[text].append(Bar(label, one["value"], "gain", *one["spread"]))
    if not groups:
        return ""
    first = next(iter(groups.values()))  # the members alone were timed on the first text
    first[:0] = alone
    machine, versions = result["machine"], result["versions"]
    return bar_plot(
        "Speed: milliseconds a token, greedy, context 256, batch 1",
        "Shorter is faster. Medians; the line over a bar goes from the 10th to the 90th percentile.",
        f"{machine['cpu']}, {machine['cores']} cores ({machine['isa']}), torch {versions['torch']}, "
        f"transformers {versions['transformers']}; commit {_commit(result)}, {result['date'][:10]}",
        list(groups.items()),
        unit="ms",
    ).svg()


def _commit(result: dict[str, Any]) -> str:
    return result["commit"][:10] + (" with uncommitted changes" if result["dirty"] else "")


def _section(result: dict[str, Any]) -> str:
    if "gpu" in result["machine"]:
        return _gpu_section(result)
    if result.get("kind") == "drafts":
        return _drafts_section(result)
    if "llama.cpp" in result["figures"]:
        return _native_section(result)
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"**{machine['cpu']}, {machine['cores']} cores** ({machine['isa']}), {machine['ram_gb']} GB, "
        f"{result['torch_threads']} threads; Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {versions['compiler']}; commit {_commit(result)}, "
        f"{result['date'][:10]}. Medians, in brackets the 10th and 90th percentile. The ratio of an "
        "operation is baseline / ours, that of decoding ours / baseline.",
        "",
        "| what | ours | baseline, in the same run | ratio | budget |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_row(one) for name, group in result["figures"].items() if name != "decode" for one in group]
    lines += ["", *_decode_table("greedy decoding, the demo pair", result["figures"].get("decode", []))]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=BENCH.parent / "docs", help="folder of performance.md")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where it is out of date")
    options = parser.parse_args()

    files = sorted(options.results.glob("*.json"))
    if not files:
        sys.exit(f"{options.results} has no results; run bench/run.py first")
    sections = []
    plots = {}
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        if "figures" not in result:
            continue
        if picture := speed_plot(result):
            plots[options.docs / "performance" / f"speed-{file.stem}.svg"] = picture
            sections.append(f"![milliseconds a token](performance/speed-{file.stem}.svg)")
        sections.append(_section(result))
    write_marked(options.docs / "performance.md", "bench", "\n\n".join(sections), check=options.check)
    for path, picture in plots.items():
        if path.is_file() and path.read_text(encoding="utf-8") == picture:
            continue
        if options.check:
            sys.exit(f"{path} is out of date; run python {sys.argv[0]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
