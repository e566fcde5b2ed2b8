"""Writes docs/results.md and its plots, docs/results/*.svg, from the JSON of the comparisons.

The JSON is that of compare.py, compare_likelihood.py and compare_time.py. The prose is results_text.md, where
``{{name}}`` on a line of its own stands for a part that is made here (`PARTS`). The same JSON and prose give
the same bytes. `--check` changes nothing and exits with 1 where the page or a plot is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import results_parts as parts
from results_format import (
    KINDS,
    MODELS,
    TASKS,
    Configuration,
    Machine,
    accuracy_verdict,
    bits_verdict,
    by_ensemble,
    ensemble_name,
    error_of,
    is_core,
    method_name,
    of_all_tasks,
)
from results_plots import Dot, Group, Row, column, dot_plot

BENCH = Path(__file__).resolve().parent

PARTS: dict[str, Callable[[Machine], str]] = {
    "summary": parts.summary,
    "settings": parts.settings,
    "counts": parts.counts,
    "summary plot": lambda one: _image(one, "summary", "likelihood by the default and by the paper's recipe"),
    "likelihood plot": lambda one: _image(one, "likelihood", "likelihood of each ensemble"),
    "likelihood texts": parts.likelihood_texts,
    "likelihood table": parts.likelihood_table,
    "likelihood details": parts.likelihood_details,
    "accuracy plot": lambda one: _image(one, "accuracy", "accuracy of each ensemble"),
    "accuracy table": parts.accuracy_table,
    "accuracy details": parts.accuracy_details,
    "time table": parts.time_table,
    "hardware": parts.hardware,
}


def machines(results: Path) -> list[Machine]:
    """What has been measured, machine by machine."""

    def load(file: Path) -> Any:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    likelihoods = {file.stem: load(file) for file in (results / "likelihood").glob("*.json")}
    folders = {folder.name for folder in (results / "evaluation").glob("*") if any(folder.glob("*.json"))}
    found = []
    for name in sorted(folders | likelihoods.keys()):
        read = {key: load(results / "evaluation" / name / f"{key}.json") for key in (*TASKS, "time")}
        time = read.pop("time")
        tasks = {task: result for task, result in read.items() if result is not None}
        found.append(Machine(name, tasks, time, likelihoods.get(name)))
    return found


def page(text: str, found: Sequence[Machine]) -> str:
    """The prose with its parts.

    Raises:
        SystemExit: the prose names a part that there is not.
    """

    def part(match: re.Match[str]) -> str:
        name = match[1]
        if name not in PARTS:
            sys.exit(f"results_text.md: there is no part {{{{{name}}}}}; there are {', '.join(PARTS)}")
        made = [(one.name, PARTS[name](one)) for one in found]
        if len(made) > 1:  # what each machine has, under its name
            made = [(name, f"*On {name}:*\n\n{content}") for name, content in made if content]
        return "\n\n".join(content for _, content in made) or "Not measured yet."

    return re.sub(r"^\{\{(.+)\}\}$", part, text, flags=re.MULTILINE)


def _image(one: Machine, kind: str, alternative: str) -> str:
    return f"![{alternative}](results/{kind}-{one.name}.svg)" if kind in plots(one) else ""


def plots(one: Machine) -> dict[str, str]:
    """The pictures of a machine's results, by kind."""
    found = {}
    if one.likelihood is not None:
        found["likelihood"] = likelihood_plot(one)
        found["summary"] = summary_plot(one)
    if one.tasks:
        found["accuracy"] = accuracy_plot(one)
    return found


def likelihood_plot(one: Machine) -> str:
    """Change in bits a byte against the best single member."""
    assert one.likelihood is not None
    return _bits_plot(
        one,
        "Likelihood: change in bits a byte against the best single member",
        [
            (ensemble_name(ensemble), _rows(methods, one.default, lambda own: _bits_dots(one, own)))
            for ensemble, methods in by_ensemble(one.likelihood["configurations"], one.default).items()
        ],
    )


def summary_plot(one: Machine) -> str:
    """The same for two methods, the default and the paper's recipe: a row for each ensemble."""
    assert one.likelihood is not None
    ensembles = by_ensemble(one.likelihood["configurations"], one.default)
    titles = {one.default: f"the default, {one.default}", "deepen:paper": "the paper's recipe, deepen:paper"}
    return _bits_plot(
        one,
        "Quality: change in bits a byte of real text against the best single member",
        [
            (
                title,
                [
                    Row(ensemble_name(ensemble), _bits_dots(one, methods[method]))
                    for ensemble, methods in ensembles.items()
                    if method in methods
                ],
            )
            for method, title in titles.items()
        ],
    )


def _bits_dots(one: Machine, own: Configuration) -> list[Dot | None]:
    found: list[Dot | None] = []
    for kind in one.kinds():
        difference = own["kinds"][kind]["against_best_single"]
        value, error = difference["bits_per_byte"], 2 * error_of(difference)
        found.append(Dot(value, value - error, value + error, bits_verdict(difference)))
    return found


def _bits_plot(one: Machine, title: str, titled: Sequence[tuple[str, Sequence[Row]]]) -> str:
    groups = [Group(name, rows, [0.0] * len(one.kinds())) for name, rows in titled if rows]
    shown = [dot for group in groups for row in group.rows for dot in row.dots if dot is not None]
    low = min([dot.low for dot in shown], default=0.0)
    low = min(1.1 * low, -0.01)
    # A method that does great harm must not press the others into a line.
    high = max(min(1.1 * max([dot.high for dot in shown], default=0.0), -2 * low), -low / 2)
    return dot_plot(
        title,
        "Left is better. Bars: two standard errors. Blue: better, orange: worse, hollow: neither.",
        [column(KINDS[kind], low, high) for kind in one.kinds()],
        groups,
        signed=True,
    )


def _rows(
    methods: dict[str, Configuration], default: str, dots: Callable[[Configuration], list[Dot | None]]
) -> list[Row]:
    return [
        Row(method_name(method), dots(own), method == default)
        for method, own in methods.items()
        if is_core(method, default)
    ]


def accuracy_plot(one: Machine) -> str:
    """Accuracy with Wilson's interval, members and ensembles."""
    results = list(one.tasks.values())
    merged = of_all_tasks(results)

    def dots(own: Configuration) -> list[Dot | None]:
        return [_accuracy_dot(result["configurations"].get(own["name"])) for result in results]

    groups = []
    for ensemble, methods in by_ensemble(merged, one.default).items():
        members = [letter for letter in ensemble.split("+") if letter in merged]
        rows = [Row(f"{MODELS[letter]} alone", dots(merged[letter])) for letter in members]
        best = [
            max(
                (100 * r["configurations"][m]["accuracy"] for m in members if m in r["configurations"]),
                default=None,
            )
            for r in results
        ]
        groups.append(Group(ensemble_name(ensemble), rows + _rows(methods, one.default, dots), best))
    columns = []
    for i, result in enumerate(results):
        shown = [row.dots[i] for group in groups for row in group.rows]
        low = min((dot.low for dot in shown if dot is not None), default=0.0)
        high = max((dot.high for dot in shown if dot is not None), default=100.0)
        columns.append(
            column(f"{TASKS[result['task']]} ({result['items']})", max(low - 1, 0.0), min(high + 1, 100.0))
        )
    return dot_plot(
        "Accuracy: per cent right, with 95 % intervals",
        "Dashed: the best single member. Blue: better, orange: worse (McNemar, p < 0.05), hollow: neither.",
        columns,
        groups,
    )


def _accuracy_dot(own: Configuration | None) -> Dot | None:
    if own is None:
        return None
    paired = own["against_best_single"]
    verdict = (
        "single" if own["method"] == "single" else "none" if paired is None else accuracy_verdict(paired)
    )
    low, high = own["interval"]
    return Dot(100 * own["accuracy"], 100 * low, 100 * high, verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--docs", type=Path, default=BENCH.parent / "docs", help="folder of results.md")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument("--text", type=Path, default=BENCH / "results_text.md", help="the prose")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where it is out of date")
    options = parser.parse_args()

    found = machines(options.results)
    folder = options.docs / "results"
    wanted = {options.docs / "results.md": page(options.text.read_text(encoding="utf-8"), found)}
    for one in found:
        wanted |= {folder / f"{kind}-{one.name}.svg": picture for kind, picture in plots(one).items()}
    stale = [
        file for file, content in wanted.items() if not file.is_file() or file.read_text("utf-8") != content
    ]
    left = sorted(set(folder.glob("*.svg")) - wanted.keys())
    if options.check:
        if stale or left:
            names = ", ".join(map(str, [*stale, *left]))
            sys.exit(f"out of date: {names}; run python bench/results_page.py")
        return
    for file in left:
        file.unlink()
    for file in stale:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(wanted[file], encoding="utf-8")


if __name__ == "__main__":
    main()
