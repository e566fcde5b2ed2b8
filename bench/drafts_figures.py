"""Figures of what bench/drafts.py timed. A ratio is the median of the ratios within a repetition."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common import Figure, compared, percentile, spread
from drafts_runs import AUTO, GENERATE, MAIN, WITHOUT, Record

Case = Mapping[str, Any]
MOST = 1.03  # times no drafts that "auto" may take
SAME = "the same token ids with every draft"
NO_DRAFTS, SUM = "the same without drafts", "sum of the members alone, transformers generate"
_BUDGETS = {"the pair, prose": 0.72, "the pair, GSM8K": 0.80, "the trio": 0.65}
_MAIN_BUDGET = 1.9  # of the pair on prose, in times its main model alone
_FASTER = 0.95  # of the larger main model alone


def figures(raw: Mapping[str, Sequence[Case]]) -> dict[str, list[dict[str, Any]]]:
    """By part, of the parts that were measured."""
    makers = {"larger": _of_larger, "latency": _of_latency}
    made = {part: makers.get(part, _of_cases)(cases) for part, cases in raw.items()}
    return {part: [one.as_dict() for one in found] for part, found in made.items()}


def _beside(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    baseline: str,
    *,
    unit: str = "ms a token",
    budget: float | None = None,
    equality: str = "",
    note: str = "",
) -> Figure:
    """Two kinds of run, the values of each in the order of their repetitions."""
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    return compared(
        name, ours, theirs, baseline, ratio, unit=unit, budget=budget, equality=equality, note=note
    )


def _ms(records: Sequence[Record]) -> list[float]:
    return [one["ms"] for one in records]


def _of_cases(cases: Sequence[Case]) -> list[Figure]:
    """The pair, the trio, and their batches."""
    made = []
    for case in cases:
        name, ways = case["name"], case["ways"]
        exact = not any(one["differ"] for one in ways[AUTO])
        for way, records in ways.items():
            if way.startswith("draft ") and way != WITHOUT:
                budget = None
                if way == AUTO:
                    budget = next((most for of, most in _BUDGETS.items() if name.startswith(of)), MOST)
                made.append(
                    _beside(
                        f"{name}, {way}",
                        _ms(records),
                        _ms(ways[WITHOUT]),
                        NO_DRAFTS,
                        budget=budget,
                        equality=SAME if exact else "",
                        note=f"{_of_drafts(records)}; {case['tokens']} new tokens",
                    )
                )
        if alone := _generates(ways):
            made += _beside_members(name, ways, alone)
            made += _profile(name, ways)
    return made


def _of_drafts(records: Sequence[Record]) -> str:
    """Tokens a cycle, and what became of the drafts' tokens."""
    tokens, drafted = sum(one["tokens"] for one in records), sum(one["drafted"] for one in records)
    shown = [f"{statistics.mean(one['tokens_a_cycle'] for one in records):.2f} tokens a cycle"]
    if drafted:
        stood = sum(one["stood"] for one in records)
        shown.append(f"{drafted} tokens drafted, {stood / drafted:.0%} of these stood")
    else:
        shown.append("none drafted")
    if settled := statistics.mean(one["skipped"] for one in records):
        shown.append(f"{settled:.0%} of the tokens settled")
    if differ := sum(one["differ"] for one in records):
        shown.append(f"{differ / tokens:.1%} of the tokens differ from the text without drafts")
    return "; ".join(shown)


def _generates(ways: Mapping[str, Sequence[Record]]) -> dict[str, list[float]]:
    """Each member alone by transformers' `generate`, by its name; the main model first."""
    return {
        way.removesuffix(GENERATE): _ms(records) for way, records in ways.items() if way.endswith(GENERATE)
    }


def _beside_members(
    name: str, ways: Mapping[str, Sequence[Record]], alone: Mapping[str, Sequence[float]]
) -> list[Figure]:
    together = [sum(times) for times in zip(*alone.values(), strict=True)]
    main = next(iter(alone.values()))
    of_prose = name.startswith("the pair, prose")
    made = [
        _beside(f"{name}, {way}", _ms(ways[way]), together, SUM)  # no budget: there is one against no drafts
        for way in (WITHOUT, AUTO)
    ]
    budget = _MAIN_BUDGET if of_prose else None
    made.append(_beside(f"{name}, {AUTO}", _ms(ways[AUTO]), _ms(ways[MAIN]), MAIN, budget=budget))
    made.append(_beside(f"{name}, {AUTO}", _ms(ways[AUTO]), main, "main model alone, transformers generate"))
    return made


def _profile(name: str, ways: Mapping[str, Sequence[Record]]) -> list[Figure]:
    """Where a token's time goes with drafts, beside the same without; and the limit."""
    auto, without, main = ([one["split"] for one in ways[way]] for way in (AUTO, WITHOUT, MAIN))
    made = []
    for stage in auto[0]:
        if stage == "total":
            continue
        ours, theirs = ([one[stage] for one in runs] for runs in (auto, without))
        made.append(
            Figure(
                f"{name}, {AUTO}, of which: {stage}",
                statistics.median(ours),
                "ms a token",
                spread(ours),
                len(ours),
                baseline=NO_DRAFTS,
                baseline_value=statistics.median(theirs),
            )
        )
    forwards = next(stage for stage in main[0] if stage.startswith("forward of "))
    limit = [one[forwards] for one in main]
    made.append(
        _beside(
            f"{name}, {AUTO}, against its limit",
            _ms(ways[AUTO]),
            limit,
            "the main model's forwards alone, a token each",
        )
    )
    return made


def _of_larger(cases: Sequence[Case]) -> list[Figure]:
    """Each drafter over all kinds of text, and what is chosen by itself on each of them."""
    ways: dict[str, list[Record]] = {}
    for case in cases:
        for way, records in case["ways"].items():
            ways.setdefault(way, []).extend(records)
    tokens = cases[0]["tokens"]
    kinds = [case["name"].partition(",")[0] for case in cases]
    texts, chosen = ", ".join(kinds), f"{AUTO}, drafter auto"
    made = []
    for way in ways:
        if not way.startswith("draft "):
            continue
        by_text = []
        for kind, case in zip(kinds, cases, strict=True):
            ours, main = case["ways"][way], case["ways"][MAIN]
            by_text.append(f"{kind}: {ours[0]['ms'] / main[0]['ms']:.2f} ×, {_of_drafts(ours)}")
        budget = _FASTER if way == chosen else None
        note = " / ".join(by_text)
        made.append(_beside(way, _ms(ways[way]), _ms(ways[MAIN]), MAIN, budget=budget, note=note))
    (generate,) = (way for way in ways if way.endswith(GENERATE))
    made += [
        _beside(f"{chosen}, {texts}", _ms(ways[chosen]), _ms(ways[generate]), generate),
        _beside(f"{chosen}, {texts}", _ms(ways[chosen]), _ms(ways[WITHOUT]), NO_DRAFTS, budget=MOST),
        *_profile(texts, {AUTO: ways[chosen], WITHOUT: ways[WITHOUT], MAIN: ways[MAIN]}),
    ]
    made[-1].note = f"{tokens} new tokens of each text"
    return made


def _of_latency(cases: Sequence[Case]) -> list[Figure]:
    made = []
    for case in cases:
        ours, theirs = case["ways"][AUTO], case["ways"][WITHOUT]
        made.append(
            _beside(
                f"{case['name']}, {AUTO}, to the first piece of text",
                [one["first"] for one in ours],
                [one["first"] for one in theirs],
                NO_DRAFTS,
                unit="ms",
                budget=MOST,
                equality=SAME,
            )
        )
        gaps, others = ([gap for one in runs for gap in one["gaps"]] for runs in (ours, theirs))
        made.append(
            Figure(
                f"{case['name']}, {AUTO}, between two pieces of text",
                statistics.median(gaps),
                "ms",
                spread(gaps),
                len(gaps),
                baseline=f"{NO_DRAFTS}, p99 {percentile(others, 0.99):.0f} ms",
                baseline_value=statistics.median(others),
                baseline_spread=spread(others),
                baseline_repetitions=len(others),
                p99=percentile(gaps, 0.99),
                equality=SAME,
                note=f"{len(gaps)} pieces, {len(others)} without drafts",
            )
        )
    return made
