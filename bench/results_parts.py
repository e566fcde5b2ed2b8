"""The parts of the results page that are made from files of answers, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from compare_setup import DEFAULT, default_order
from results_format import (
    MODELS,
    Configuration,
    accuracy_verdict,
    by_ensemble,
    comparisons,
    ensemble_name,
    folded,
    holm,
    method_name,
    method_place,
    of_all,
    points_cell,
    points_verdict,
    signed,
    singles,
    table,
)
from results_read import AS_NAMED, BEFORE, EARLIER, Measure, Results, dtype_of, pairs_of


def verdict(results: Results) -> str:
    """How often the default is better and worse than the best single member, where, and what it lacks."""
    lines = [_verdict(results.tests, DEFAULT, "The default")]
    # Of a task that has it in another precision, or by another machine, `missing` tells.
    has_it = {one.task for one in results.tests if one.has(DEFAULT)}
    without = [one.title for one in results.tests if one.task not in has_it]
    if without:
        lines.append(f"The default was not run on {'; '.join(without)}.")
    return "\n".join(f"- {line}" for line in lines)


def earlier_verdicts(results: Results) -> str:
    """The same counts of what the default does not do, and of the defaults that there were before."""
    titles = {AS_NAMED: "The default's fuser and weights with a far smaller model in front", **EARLIER}
    lines = [_verdict(results.tests, method, title) for method, title in titles.items()]
    return "\n".join(f"- {line}" for line in lines)


def _verdict(measures: Sequence[Measure], method: str, title: str) -> str:
    pairs = pairs_of(measures, method)
    if not pairs:
        return f"{title}, `{method}`, has no results on test items yet."
    tests = [accuracy_verdict(one) for *_, one in pairs]
    remain = _remain(pairs)
    better = sum(one["difference"] > 0 for measure, ensemble, one in pairs if (measure, ensemble) in remain)
    return (
        f"{title}, `{method}`, on test items: {len(pairs)} comparisons with the best single member, "
        f"{_mean([one['difference'] for *_, one in pairs])} points on the average. Outside two standard "
        f"errors it is worse on {_where(pairs, 'harm')}, and better on {_where(pairs, 'gain')}. "
        f"McNemar's test calls {tests.count('harm')} worse and {tests.count('gain')} better at p < 0.05, "
        f"where chance alone gives up to {0.05 * len(pairs):.1f}; after Holm's correction "
        f"{len(remain) - better} worse and {better} better remain."
    )


def _where(pairs: Sequence[tuple[str, str, Configuration]], kind: str) -> str:
    """How many comparisons are of a kind, and which."""
    found: dict[str, list[str]] = {}
    for measure, ensemble, one in pairs:
        if points_verdict(one) == kind:
            found.setdefault(measure, []).append(ensemble_name(ensemble))
    named = "; ".join(f"{measure}: {', '.join(own)}" for measure, own in found.items())
    return f"{sum(map(len, found.values()))}{f' ({named})' if named else ''}"


def _remain(pairs: Sequence[tuple[str, str, Configuration]]) -> set[tuple[str, str]]:
    return set(holm({(measure, ensemble): one["p_value"] for measure, ensemble, one in pairs}))


def gains(results: Results) -> str:
    """The default, and folded the orders that it does not take and the default before: a row an ensemble."""
    named = folded("The same with a far smaller model in front", _gains(results, AS_NAMED))
    before = folded("The same of the default before", _gains(results, BEFORE))
    return f"{_gains(results, DEFAULT)}\n\n{named}\n\n{before}"


def _gains(results: Results, method: str) -> str:
    measures = [one for one in results.tests if one.has(method)]
    remain = _remain(pairs_of(results.tests, method))
    rows = []
    for ensemble in by_ensemble(of_all(one.scores for one in measures), method):
        cells = [_cell(one, one.scores.get(f"{ensemble} {method}")) for one in measures]
        kept = [(one.title, ensemble) in remain for one in measures]
        marks = [f"{cell} H" if own else cell for cell, own in zip(cells, kept, strict=True)]
        if any(cells):
            rows.append([ensemble_name(ensemble), *marks])
    return table([f"`{method}`", *(one.head for one in measures)], rows) if rows else "Not measured yet."


def rules(results: Results) -> str:
    """A row for each rule: mean points over the ensembles, and how many are better and worse."""
    return _rules(results.main()) or "Not measured yet."


def _rules(measures: Sequence[Measure]) -> str:
    methods = {own["method"] for one in measures for own in one.scores.values()} - {"single"}
    rows = []
    for method in sorted(methods, key=lambda one: method_place(one, DEFAULT)):
        cells = [_rule_cell(one, method) for one in measures]
        if any(cells):
            rows.append([_named(method), *cells])
    return table(["rule", *(one.title for one in measures)], rows) if rows else ""


def _rule_cell(measure: Measure, method: str) -> str:
    """Mean points; and the default's on the same ensembles and items, where that is not its own cell's."""
    found = comparisons(measure.scores, method)
    if not found:
        return ""
    verdicts = [points_verdict(paired) for _, paired in found]
    counts = f"{verdicts.count('gain')}, {verdicts.count('harm')} of {len(found)}"
    of_default = [paired["difference"] for _, paired in comparisons(measure.scores, DEFAULT)]
    known = [_default_there(measure, ensemble, method) for ensemble, _ in found]
    there = [one for one in known if one is not None]
    beside = ""
    if of_default and len(there) == len(found) and _mean(there) != _mean(of_default):
        beside = f"; default {_mean(there)}"
    return f"{_mean([paired['difference'] for _, paired in found])} ({counts}{beside})"


def _mean(differences: Sequence[float]) -> str:
    return signed(sum(100 * one for one in differences) / len(differences), 1)


def _default_there(measure: Measure, ensemble: str, method: str) -> float | None:
    """What the default gains on the items that a rule was run on; None where nothing says which these are."""
    own = measure.scores.get(f"{ensemble} {method}")
    default = measure.scores.get(f"{default_order(ensemble)} {DEFAULT}")
    if own is None or default is None:
        return None
    paired = own["against_best_single"]
    if default["n"] == own["n"]:
        return float(default["against_best_single"]["difference"])
    best = measure.scores[paired["configuration"]]
    if not all("right" in one for one in (own, default, best)):
        return None
    items = _items(own) & _items(default) & _items(best)
    right, alone = (len(items & set(one["right"].split())) for one in (default, best))
    return (right - alone) / len(items) if items else None


def _items(own: Configuration) -> set[str]:
    return {*own["right"].split(), *own["wrong"].split()}


def _named(method: str) -> str:
    return f"**{method_name(method)} (default)**" if method == DEFAULT else method_name(method)


def figure(results: Results, kind: str, title: str, name: str) -> str:
    """One figure for a sentence: "points" of an ensemble or per cent "right", on a measure by its title."""
    own = next((one.scores.get(name) for one in results.tests if one.title == title), None)
    if own is None:
        return "(not measured)"
    if kind == "right":
        return f"{own['correct']} of {own['n']} ({100 * own['accuracy']:.1f} %)"
    paired = own["against_best_single"]
    return "(not compared)" if paired is None else points_cell(paired)


def everything(results: Results) -> str:
    """Every ensemble by every rule on every task."""
    if not results.tests:
        return "Not measured yet."
    return folded("Every ensemble, every rule, every task", _everything(results.tests))


def dev(results: Results) -> str:
    """The rules on dev splits, and all ensembles there."""
    if not results.dev:
        return "Not measured yet."
    whole = folded("Every ensemble, every rule, every dev split", _everything(results.dev))
    return "\n\n".join(filter(None, (_rules(results.dev), whole)))


def _everything(measures: Sequence[Measure]) -> str:
    rows = []
    for ensemble, methods in by_ensemble(of_all(one.scores for one in measures), DEFAULT).items():
        rows.append([f"**{ensemble_name(ensemble)}**", *[""] * len(measures)])
        rows += [
            [_named(method), *(_cell(one, one.scores.get(own["name"])) for one in measures)]
            for method, own in methods.items()
        ]
    return table(["points (95 %)", *(one.head for one in measures)], rows)


def _cell(measure: Measure, own: Configuration | None) -> str:
    """Points against the best single member; without one, per cent right."""
    if own is None:
        return ""
    paired = own["against_best_single"]
    n = own["n"] if paired is None else paired["n"]
    cell = f"{100 * own['accuracy']:.1f} % right" if paired is None else points_cell(paired)
    return cell if n == measure.result["items"] else f"{cell}, n {n}"


class Bound(NamedTuple):
    """What a set of members could have gained on a measure, in points against the best of them."""

    measure: str
    members: str
    n: int
    oracle: float
    best: float
    rule: str
    default: Mapping[str, float]  # by ensemble


def oracle(results: Results) -> str:
    """What was to be gained, beside what the best rule and the default got."""
    bounds = list(_bounds(results.main()))
    if not bounds:
        return "Not measured yet."
    rows = [
        [
            f"{one.measure}: {one.members}",
            str(one.n),
            signed(one.oracle, 1),
            f"{signed(one.best, 1)} ({one.rule})",
            "; ".join(f"{ensemble_name(key)} {signed(own, 1)}" for key, own in one.default.items()),
        ]
        for one in bounds
    ]
    # One number for each row, as of the others; a row may have several main models.
    of_default = [sum(one.default.values()) / len(one.default) for one in bounds if one.default]
    means = [[one.oracle for one in bounds], [one.best for one in bounds], of_default]
    gain, best, own = (signed(sum(one) / len(one), 1) if one else "not measured" for one in means)
    return (
        f"An oracle that picks the right member for each item gains {gain} points on average over the "
        f"{len(bounds)} rows below. The best of the rules that were run on all of a row's items, picked "
        f"afterwards on these, gains {best}; the default, over the {len(of_default)} rows that have it so, "
        f"{own}.\n\n"
        + folded("What was to be gained", table(["", "n", "oracle", "best rule", "default"], rows))
    )


def _bounds(measures: Sequence[Measure]) -> Iterator[Bound]:
    for measure in measures:
        sets: dict[frozenset[str], list[Configuration]] = {}
        for own in measure.scores.values():
            paired = own["against_best_single"]
            # The best member's number is known from the ensemble's where these are of the same items.
            if paired is not None and "oracle" in paired and paired["n"] == own["n"]:
                sets.setdefault(frozenset(own["ensemble"].split("+")), []).append(own)
        for letters, found in sets.items():
            n = max(own["n"] for own in found)
            found = [own for own in found if own["n"] == n]
            best = max(found, key=lambda own: own["against_best_single"]["difference"])
            paired = best["against_best_single"]
            alone = best["correct"] - paired["gained"] + paired["lost"]
            yield Bound(
                measure.title,
                ", ".join(name for letter, name in MODELS.items() if letter in letters),
                n,
                100 * (paired["oracle"] - alone) / n,
                100 * paired["difference"],
                f"{ensemble_name(best['ensemble'])}, {method_name(best['method'])}",
                {
                    own["ensemble"]: 100 * own["against_best_single"]["difference"]
                    for own in found
                    if own["method"] == DEFAULT
                },
            )


def votes(results: Results) -> str:
    """Majorities of sampled answers, members and ensembles, beside one greedy answer."""
    found = []
    for measure in results.votes:
        one_answer = next((one for one in results.tests if _same_task(one, measure)), None)
        greedily = "one greedy answer"
        if one_answer is not None and dtype_of(one_answer.result) != dtype_of(measure.result):
            greedily += f" in {dtype_of(one_answer.result)}"
        rows = []
        for name, own in _members_first(measure):
            paired = own["against_best_single"]
            greedy = None if one_answer is None else one_answer.scores.get(name)
            rows.append(
                [
                    _whole_name(own),
                    str(own["n"]),
                    _share(own),
                    _same_items(greedy, own),
                    "" if paired is None else points_cell(paired),
                    "" if paired is None else f"{MODELS[paired['configuration']]}, n {paired['n']}",
                ]
            )
        head = ["n", "% right (95 %)", greedily, "points (95 %)", "against votes of"]
        found.append(table([measure.title, *head], rows))
    return "\n\n".join(found) or "Not measured yet."


def _same_task(one: Measure, voted: Measure) -> bool:
    return (one.machine, one.result["task"]) == (voted.machine, voted.result["task"]) and one.result.get(
        "scoring"
    ) != "likelihood"


def _same_items(greedy: Configuration | None, own: Configuration) -> str:
    """Per cent right with one answer, on the items that were voted on."""
    if greedy is None or "right" not in greedy:
        return ""
    right = set(greedy["right"].split())
    shared = _items(greedy) & _items(own)
    return f"{100 * len(right & shared) / len(shared):.1f}, n {len(shared)}" if shared else ""


def _members_first(measure: Measure) -> Iterator[tuple[str, Configuration]]:
    yield from singles(measure.scores).items()
    for ensemble, methods in by_ensemble(measure.scores, DEFAULT).items():
        yield from ((f"{ensemble} {method}", own) for method, own in methods.items())


def _whole_name(own: Configuration) -> str:
    if own["method"] == "single":
        return f"{MODELS[own['ensemble']]} alone"
    return f"{ensemble_name(own['ensemble'])}, {_named(own['method'])}"


def _share(own: Configuration) -> str:
    low, high = own["interval"]
    return f"{100 * own['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def details(results: Results) -> str:
    """A folded table for each measure: scores, tests, how many texts had an answer."""
    return "\n\n".join(_details(one) for one in results.tests)


def _details(measure: Measure) -> str:
    written = any("changed_share" in own for own in measure.scores.values())
    head = ["", "n", "% right (95 %)", "against", "won, lost", "McNemar p"]
    rows = []
    for _, own in _members_first(measure):
        paired = own["against_best_single"]
        row = [_whole_name(own), str(own["n"]), _share(own)]
        row += [""] * 3 if paired is None else _test(paired)
        if written:
            row += [_percent(own["changed_share"]), _percent(own["unanswered_share"])]
        rows.append(row)
    result = measure.result
    whole = "all" if result["items"] == result["items_in_split"] else "of the"
    title = f"{measure.title}: {result['items']} items, {whole} {result['items_in_split']} of the test file"
    return folded(title, table(head + (["changed", "no answer"] if written else []), rows))


def _test(paired: Configuration) -> list[str]:
    won = f"{paired['gained']}, {paired['lost']}"
    return [MODELS[paired["configuration"]], won, f"{paired['p_value']:.2g}"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def missing(results: Results) -> str:
    """What each file of answers lacks of what some file has."""
    fused = [own for one in results.tests for own in one.scores.values() if own["method"] != "single"]
    ensembles = {own["ensemble"] for own in fused}
    methods = {own["method"] for own in fused}
    lines = []
    for one in _a_file_each((*results.tests, *results.votes)):
        own = [each for each in one.scores.values() if each["method"] != "single"]
        parts = [
            _absent("ensembles", {each["ensemble"] for each in own}, ensembles, ensemble_name),
            _absent("rules", {each["method"] for each in own}, methods, method_name),
        ]
        few = [_whole_name(each) for each in one.scores.values() if each["n"] < one.result["items"]]
        named = ", everywhere" if len(few) == len(one.scores) else f": {_some(few)}"
        parts.append(f"some of its {one.result['items']} items{named}" if few else "")
        gaps = len({each["ensemble"] for each in own}) * len({each["method"] for each in own}) - len(own)
        parts.append(f"{gaps} of the pairs of its ensembles and rules" if gaps else "")
        unpaired = [_whole_name(each) for each in own if each["against_best_single"] is None]
        parts.append(f"a member alone to compare with: {_some(unpaired)}" if unpaired else "")
        if any(parts):
            lines.append(f"- {one.title}: {'; '.join(part for part in parts if part)}.")
    return folded("What each task's results lack", "\n".join(lines)) if lines else "Nothing is missing."


def _a_file_each(measures: Sequence[Measure]) -> list[Measure]:
    """The first measure of each file."""
    files = [id(one.result) for one in measures]
    return [one for place, one in enumerate(measures) if files.index(id(one.result)) == place]


def _absent(what: str, own: set[str], known: set[str], name: Callable[[str], str]) -> str:
    absent = sorted(known - own)
    if not absent:
        return ""
    if len(own) < len(absent):
        return f"all {what} but {_some([name(one) for one in sorted(own)])}"
    return f"{what}: {_some([name(one) for one in absent])}"


def _some(names: Sequence[str], most: int = 8) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more
