"""Milliseconds a token of every way of fusing, each with forwards of its own, beside its members alone.

One prompt at a time, greedy (`draw` samples), without drafts, the configurations in turn for every prompt, so
that a drift of the machine hits all of them. Each prompt is continued twice: the first time relative rows may
still have to be computed, the second time they are there. A configuration's figure is the median over
prompts. Then a long prompt is read for its first token, as many times. Writes
bench/results/evaluation/<machine>/time.json. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import LONG_TEXT, PROMPTS, ROOT, environment, machine_name, spread, write_json
from compare_setup import add_options, configurations, load, say, settings_used

from deepen_ext import Ensemble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=32, help="written for each prompt, default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="default: bench/results/evaluation/<machine>/time.json")
    add_options(parser)
    options = parser.parse_args()

    found = environment()
    name = Path("bench", "results", "evaluation", machine_name(found), "time.json")
    ensembles = configurations(load(options.ensembles), options.ensembles, options.methods)
    runs = [(name, one, False) for name, one in ensembles.items()]
    runs += [(f"{name}@skip", one, True) for name, one in ensembles.items() if _has_skip(one)]
    first: dict[str, list[float]] = {name: [] for name, _, _ in runs}
    again: dict[str, list[float]] = {name: [] for name, _, _ in runs}
    for number, prompt in enumerate(PROMPTS[: options.prompts], 1):
        for times in (first, again):
            for key, ensemble, skip in runs:
                own = _sampling(ensemble, number)
                if not ensemble.fuser.spans:  # which take no processor
                    own["min_new_tokens"] = options.tokens
                written = ensemble.generate(
                    prompt, max_new_tokens=options.tokens, draft=0, certified_skip=skip, **own
                )
                times[key].append(written.timings.ms_per_token)
        say(f"prompt {number} of {options.prompts}")
    to_first: dict[str, list[float]] = {name: [] for name in ensembles}
    for _ in range(options.prompts):
        for key, ensemble in ensembles.items():
            written = ensemble.generate(LONG_TEXT, max_new_tokens=1, draft=0, **_sampling(ensemble, 1))
            to_first[key].append(written.timings.prompt_ms)
    output = options.output or ROOT / name
    alone = {key: statistics.median(taken) for key, taken in again.items() if " " not in key}
    write_json(
        output,
        {
            "settings": {
                **settings_used(),
                "prompts": options.prompts,
                "tokens": options.tokens,
                "batch": 1,
                "long_prompt_bytes": len(LONG_TEXT.encode()),
            },
            "configurations": {
                key: _figures(key, first[key], again[key], to_first.get(key, []), alone) for key, _, _ in runs
            },
            "environment": found,
        },
    )
    say(f"written to {output}")


def _has_skip(ensemble: Ensemble) -> bool:
    """Whether its certified skip is worth a line: the default search's."""
    return ensemble.fuser.search_bound() is not None and not ensemble.weighs_prompts


def _sampling(ensemble: Ensemble, seed: int) -> dict[str, Any]:
    """For a fuser that draws; the others are greedy."""
    return {"do_sample": True, "seed": seed} if ensemble.fuser.draws else {}


def _figures(
    name: str, first: list[float], again: list[float], to_first: list[float], alone: dict[str, float]
) -> dict[str, Any]:
    ensemble, _, method = name.partition(" ")
    figures: dict[str, Any] = {
        "ensemble": ensemble,
        "method": method or "single",
        "ms_per_token": round(statistics.median(again), 3),
        "spread": [round(one, 3) for one in spread(again)],
        "first_ms_per_token": round(statistics.median(first), 3),
    }
    if to_first:
        figures["first_token_ms"] = round(statistics.median(to_first), 1)
    if method:
        members = [alone[one] for one in ensemble.split("+")]
        figures["of_members_sum"] = round(figures["ms_per_token"] / sum(members), 4)
    return figures


if __name__ == "__main__":
    main()
