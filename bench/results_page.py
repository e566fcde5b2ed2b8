"""Writes docs/results.md and its plots, docs/results/*.svg, from the JSON of the comparisons.

The JSON is that of compare.py, compare_likelihood.py, compare_time.py and peers.py. The prose is
results_text.md, where ``{{name}}`` stands for a part that is made here (`PARTS`), and in a sentence
``{{points | GSM8K | Q+S average}}`` or ``{{right | GSM8K | Q}}`` for one figure. Results on dev splits, on
which rules were chosen, have a part of their own; no other part uses them. The same JSON and prose give the
same bytes. `--check` changes nothing and exits with 1 where the page or a plot is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import results_parts as parts
import results_texts as texts
from compare_setup import DEFAULT
from results_format import (
    KINDS,
    Configuration,
    Result,
    accuracy_verdict,
    bits_verdict,
    by_ensemble,
    ensemble_name,
    error_of,
    of_all,
)
from results_read import BEFORE, EARLIER, Results, read_results

from deepen_ext.plots.chart import Column, Dot, Group, Row, bounds, dot_plot

BENCH = Path(__file__).resolve().parent

PARTS: dict[str, Callable[[Results], str]] = {
    "verdict": parts.verdict,
    "earlier verdicts": parts.earlier_verdicts,
    "gains plot": lambda found: _images(found, "gains", "points of each ensemble against its best member"),
    "gains table": parts.gains,
    "rules table": parts.rules,
    "everything": parts.everything,
    "oracle": parts.oracle,
    "votes": parts.votes,
    "dev": parts.dev,
    "missing": parts.missing,
    "details": parts.details,
    "likelihood counts": texts.likelihood_counts,
    "earlier likelihood counts": texts.earlier_likelihood_counts,
    "likelihood plot": lambda found: _images(found, "summary", "likelihood of each ensemble's texts"),
    "likelihood texts": texts.likelihood_texts,
    "likelihood tables": texts.likelihood_tables,
    "time table": texts.time_table,
    "peers": texts.peers,
    "settings": texts.settings,
    "hardware": texts.hardware,
}


def page(text: str, found: Results) -> str:
    """The prose with its parts.

    Raises:
        SystemExit: the prose names a part that there is not.
    """

    def part(match: re.Match[str]) -> str:
        name, *of = match[1].split(" | ")
        if name in ("points", "right") and len(of) == 2:
            return parts.figure(found, name, *of)
        if name not in PARTS:
            sys.exit(f"results_text.md: there is no part {{{{{name}}}}}; there are {', '.join(PARTS)}")
        return PARTS[name](found)

    return re.sub(r"\{\{(.+?)\}\}", part, text)


def _images(found: Results, kind: str, alternative: str) -> str:
    files = [name for name in plots(found) if name.startswith(kind)]
    return "\n\n".join(f"![{alternative}](results/{name})" for name in files)


def plots(found: Results) -> dict[str, Callable[[], str]]:
    """What draws each picture, by file name."""
    made = {f"summary-{name}.svg": partial(likelihood_plot, one) for name, one in found.likelihood.items()}
    if found.tests:
        made["gains.svg"] = partial(gains_plot, found)
    return made


def gains_plot(found: Results) -> str:
    """Points against the best single member: the default and the one before, a group for each ensemble."""
    measures = found.main()
    groups = []
    for ensemble, methods in by_ensemble(of_all(one.scores for one in measures), DEFAULT).items():
        rows = [
            Row(
                "default" if method == DEFAULT else f"the default before, {method}",
                [_points_dot(one.scores.get(own["name"])) for one in measures],
                method == DEFAULT,
            )
            for method, own in methods.items()
            if method in (DEFAULT, BEFORE)
        ]
        groups.append(Group(ensemble_name(ensemble), rows))
    low, high = bounds(_dots(groups), least=1.0)
    return dot_plot(
        "Points against the best single member, with 95 % intervals",
        "Right is better. Blue: better, orange: worse (McNemar, p < 0.05), hollow: neither.",
        [Column(one.title, low, high) for one in measures],
        [group for group in groups if group.rows],
    ).svg()


def _points_dot(own: Configuration | None) -> Dot | None:
    paired = None if own is None else own["against_best_single"]
    if paired is None:
        return None
    low, high = paired["interval"]
    return Dot(100 * paired["difference"], 100 * low, 100 * high, accuracy_verdict(paired))


def likelihood_plot(likelihood: Result) -> str:
    """Change in bits a byte: a group for the default, those before it and the paper's recipe."""
    ensembles = by_ensemble(likelihood["configurations"], DEFAULT)
    kinds = texts.kinds_of(likelihood)
    titles = {
        DEFAULT: f"the default, {DEFAULT}",
        **{method: method for method in EARLIER},
        "deepen:paper": "the paper's recipe",
    }
    groups = [
        Group(
            title,
            [
                Row(ensemble_name(ensemble), [_bits_dot(methods[method], kind) for kind in kinds])
                for ensemble, methods in ensembles.items()
                if method in methods
            ],
        )
        for method, title in titles.items()
    ]
    low, high = bounds(_dots(groups), least=0.01)
    return dot_plot(
        "Likelihood: change in bits a byte of real text against the best single member",
        "Left is better. Bars: two standard errors. Blue: better, orange: worse, hollow: neither.",
        [Column(KINDS[kind], low, high) for kind in kinds],
        [group for group in groups if group.rows],
    ).svg()


def _bits_dot(own: Configuration, kind: str) -> Dot:
    difference = own["kinds"][kind]["against_best_single"]
    value, error = difference["bits_per_byte"], 2 * error_of(difference)
    return Dot(value, value - error, value + error, bits_verdict(difference))


def _dots(groups: Sequence[Group]) -> Iterator[Dot | None]:
    return (dot for group in groups for row in group.rows for dot in row.dots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--docs", type=Path, default=BENCH.parent / "docs", help="folder of results.md")
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument("--text", type=Path, default=BENCH / "results_text.md", help="the prose")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where it is out of date")
    options = parser.parse_args()

    found = read_results(options.results)
    folder = options.docs / "results"
    wanted = {options.docs / "results.md": page(options.text.read_text(encoding="utf-8"), found)}
    wanted |= {folder / name: draw() for name, draw in plots(found).items()}
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
