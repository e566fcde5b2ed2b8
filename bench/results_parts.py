"""The parts of the results page that are made from the JSON, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from results_format import (
    KINDS,
    MODELS,
    TASKS,
    Configuration,
    Machine,
    Result,
    accuracy_verdict,
    bits_cell,
    bits_verdict,
    by_ensemble,
    ensemble_name,
    folded,
    holm,
    is_core,
    marked,
    method_name,
    of_all_tasks,
    points_cell,
    signed,
    singles,
    table,
)


def summary(one: Machine) -> str:
    """A row for each ensemble: the default method, and the paper's recipe."""
    bits = {} if one.likelihood is None else by_ensemble(one.likelihood["configurations"], one.default)
    scores = {task: by_ensemble(result["configurations"], one.default) for task, result in one.tasks.items()}
    times = {} if one.time is None else by_ensemble(one.time["configurations"], one.default)
    kinds = one.kinds()
    head = ["main + assistants", *(f"bits a byte, {KINDS[kind]}" for kind in kinds)]
    head += ["the same, paper's recipe, all"] if kinds else []
    head += ["tasks better, worse, of", "mean points", "ms a token, × members' sum"]
    rows = []
    for ensemble in {key: None for found in (bits, *scores.values(), times) for key in found}:
        own = bits.get(ensemble, {})
        cells = [_bits_of(own, one.default, kind) for kind in kinds]
        cells += [_bits_of(own, "deepen:paper", "all")] if kinds else []
        paired = [
            found[ensemble][one.default]["against_best_single"]
            for found in scores.values()
            if one.default in found.get(ensemble, {})
        ]
        verdicts = [accuracy_verdict(each) for each in paired if each is not None]
        better, worse = verdicts.count("gain"), verdicts.count("harm")
        cells.append(f"{better}, {worse}, {len(verdicts)}" if verdicts else "")
        points = [100 * each["difference"] for each in paired if each is not None]
        cells.append(signed(sum(points) / len(points), 1) if points else "")
        clock = times.get(ensemble, {}).get(one.default)
        cells.append("" if clock is None else f"{clock['ms_per_token']:.0f}, {clock['of_members_sum']:.2f} ×")
        rows.append([ensemble_name(ensemble), *cells])
    return table(head, rows)


def _bits_of(methods: Mapping[str, Configuration], method: str, kind: str) -> str:
    return bits_cell(methods[method]["kinds"][kind]["against_best_single"]) if method in methods else ""


def likelihood_texts(one: Machine) -> str:
    """How much text there is of each kind."""
    if one.likelihood is None:
        return "Not measured yet."
    kinds = one.likelihood["kinds"].items()
    return "; ".join(f"{KINDS[k]}: {v['texts']} texts, {v['bytes']:,} bytes" for k, v in kinds) + "."


def likelihood_table(one: Machine) -> str:
    return _likelihood(one, "against_best_single", core=True) if one.likelihood else ""


def likelihood_details(one: Machine) -> str:
    """Against the main model, and settings that are not the package's own."""
    if one.likelihood is None:
        return ""
    parts = [folded("The same against the main model alone", _likelihood(one, "against_main", core=True))]
    methods = {each["method"] for each in one.likelihood["configurations"].values()} - {"single"}
    if not all(is_core(method, one.default) for method in methods):
        others = _likelihood(one, "against_best_single", core=False)
        parts.append(folded("Other weights and settings, against the best single member", others))
    return "\n\n".join(parts)


def _likelihood(one: Machine, against: str, *, core: bool) -> str:
    assert one.likelihood is not None
    found, kinds = one.likelihood["configurations"], one.kinds()
    rows = [
        [f"{MODELS[letter]} alone", *(f"{single['kinds'][kind]['bits_per_byte']:.3f}" for kind in kinds)]
        for letter, single in singles(found).items()
    ]
    for ensemble, methods in by_ensemble(found, one.default).items():
        chosen = {name: own for name, own in methods.items() if is_core(name, one.default) == core}
        if chosen:
            rows.append([f"**{ensemble_name(ensemble)}**", *[""] * len(kinds)])
        for name, own in chosen.items():
            cells = [own["kinds"][kind] for kind in kinds]
            rows.append(
                [
                    method_name(name) + (" (default)" if name == one.default else ""),
                    *(f"{cell['bits_per_byte']:.3f}, {bits_cell(cell[against])}" for cell in cells),
                ]
            )
    return table(["bits a byte", *(KINDS[kind] for kind in kinds)], rows)


def accuracy_table(one: Machine) -> str:
    """All tasks side by side: per cent right, and points against the best single member."""
    merged = of_all_tasks(one.tasks.values())
    tasks = list(one.tasks.values())
    rows = [
        [f"{MODELS[letter]} alone", *(_share(each["configurations"].get(letter)) for each in tasks)]
        for letter in singles(merged)
    ]
    for ensemble, methods in by_ensemble(merged, one.default).items():
        rows.append([f"**{ensemble_name(ensemble)}**", *[""] * len(tasks)])
        for method, own in methods.items():
            if is_core(method, one.default):
                cells = [_scored(each["configurations"].get(own["name"])) for each in tasks]
                rows.append([method_name(method) + (" (default)" if method == one.default else ""), *cells])
    head = [f"{TASKS[task]}, n {result['items']}" for task, result in one.tasks.items()]
    return table(["% right, points", *head], rows) if tasks else "Not measured yet."


def _share(own: Configuration | None) -> str:
    return "" if own is None else f"{100 * own['accuracy']:.1f}"


def _scored(own: Configuration | None) -> str:
    if own is None:
        return ""
    paired = own["against_best_single"]
    return _share(own) + ("" if paired is None else f", {points_cell(paired)}")


def accuracy_details(one: Machine) -> str:
    """A folded table for each task: intervals, tests, how many texts had an answer."""
    return "\n\n".join(_task(one, task, result) for task, result in one.tasks.items())


def _task(one: Machine, task: str, result: Result) -> str:
    head = [
        "",
        "n",
        "% right (95 %)",
        "points (95 %)",
        "against",
        "won, lost",
        "McNemar p",
        "changed",
        "no answer",
    ]
    rows = []
    found = result["configurations"]
    for letter, own in singles(found).items():
        rows.append(
            [f"{MODELS[letter]} alone", *_score(own), "", "", "", "", "", _percent(own["unanswered_share"])]
        )
    for ensemble, methods in by_ensemble(found, one.default).items():
        rows += [
            [
                f"{ensemble_name(ensemble)}, {method_name(method)}",
                *_score(own),
                *_paired(own["against_best_single"]),
                _percent(own["changed_share"]),
                _percent(own["unanswered_share"]),
            ]
            for method, own in methods.items()
        ]
    whole = "all" if result["items"] == result["items_in_split"] else "spread evenly over the"
    title = f"{TASKS[task]}: {result['items']} items, {whole} {result['items_in_split']} of the test file"
    return folded(title, table(head, rows))


def _score(own: Configuration) -> list[str]:
    low, high = own["interval"]
    return [str(own["n"]), f"{100 * own['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"]


def _paired(paired: Configuration | None) -> list[str]:
    if paired is None:
        return [""] * 4
    low, high = (signed(100 * bound, 1) for bound in paired["interval"])
    shown = marked(f"{signed(100 * paired['difference'], 1)} ({low} to {high})", accuracy_verdict(paired))
    won = f"{paired['gained']}, {paired['lost']}"
    return [shown, MODELS[paired["configuration"]], won, f"{paired['p_value']:.2g}"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def settings(one: Machine) -> str:
    """What the default method is, and what the others share with it."""
    default = one.settings["defaults"]
    weights = "weights from the prompt" if default["weights"] == "prompt" else "equal weights"
    rule = "the boundary rule" if default["boundary_aware"] else "no boundary rule"
    return (
        f"The default method is `{one.default}`. Where a method's name says nothing else: {weights}, {rule}, "
        f"{default['candidates']} candidates, and for every recipe of deepen η {default['learning_rate']:g} "
        f"and {default['steps']} steps of search."
    )


def counts(one: Machine) -> str:
    """How many differences there are, and how many chance alone would show."""
    return "\n".join(f"- {line}" for line in _counts(one))


def _counts(one: Machine) -> Iterator[str]:
    if one.likelihood is not None:
        kinds = [kind for kind in one.kinds() if kind != "all"]
        for title, method in (("the default", one.default), ("the paper's recipe", "deepen:paper")):
            verdicts = {
                ensemble: [bits_verdict(own[method]["kinds"][kind]["against_best_single"]) for kind in kinds]
                for ensemble, own in by_ensemble(one.likelihood["configurations"], one.default).items()
                if method in own
            }
            each = [
                f"{ensemble_name(ensemble)} {own.count('gain')} better, {own.count('harm')} worse"
                for ensemble, own in verdicts.items()
            ]
            if each:
                yield f"Likelihood, {title} (`{method}`), of {len(kinds)} kinds of text: {'; '.join(each)}."
    tests = {
        (method, f"{TASKS[task]} with {ensemble_name(ensemble)}, {method_name(method)}"): own[
            "against_best_single"
        ]
        for task, result in one.tasks.items()
        for ensemble, methods in by_ensemble(result["configurations"], one.default).items()
        for method, own in methods.items()
        if own["against_best_single"] is not None and is_core(method, one.default)
    }
    for title, chosen in (
        ("the default", {key: own for key, own in tests.items() if key[0] == one.default}),
        ("all methods", tests),
    ):
        if not chosen:
            continue
        verdicts_of = [accuracy_verdict(own) for own in chosen.values()]
        remain = holm({name: own["p_value"] for (_, name), own in chosen.items()})
        better = [name for (_, name), own in chosen.items() if name in remain and own["difference"] > 0]
        named = f": better {'; '.join(better)}" if better and title == "the default" else ""
        yield (
            f"Accuracy, {title}: {len(chosen)} comparisons; {verdicts_of.count('gain')} better and "
            f"{verdicts_of.count('harm')} worse at p < 0.05, where chance alone gives up to "
            f"{0.05 * len(chosen):.1f}. After Holm's correction {len(better)} better and "
            f"{len(remain) - len(better)} worse remain{named}."
        )


def time_table(one: Machine) -> str:
    """Milliseconds a token, and against the sum of the members alone."""
    if one.time is None:
        return "Not measured yet."
    found = one.time["configurations"]
    groups = by_ensemble(found, one.default)
    methods = list(dict.fromkeys(method for own in groups.values() for method in own))
    rows = [
        [ensemble_name(ensemble), *(_clock(own.get(method)) for method in methods)]
        for ensemble, own in groups.items()
    ]
    alone = "; ".join(f"{MODELS[key]} {own['ms_per_token']:.1f}" for key, own in singles(found).items())
    run = one.time["settings"]
    return (
        table(["ms a token (× members' sum)", *map(method_name, methods)], rows)
        + f"\n\nThe members alone on the same loop, ms a token: {alone}. Medians over {run['prompts']} "
        f"prompts of {run['tokens']} new tokens, one at a time, with relative rows computed before."
    )


def _clock(own: Configuration | None) -> str:
    return "" if own is None else f"{own['ms_per_token']:.1f} ({own['of_members_sum']:.2f})"


def hardware(one: Machine) -> str:
    """What it ran on, and at which commits."""
    latest = max(one.environments, key=lambda found: found["date"])
    machine, versions = latest["machine"], latest["versions"]
    commits = sorted({(e["date"][:10], e["commit"][:10], e["dirty"]) for e in one.environments})
    shown = ", ".join(
        f"{c} of {day}" + (" with uncommitted changes" if dirty else "") for day, c, dirty in commits
    )
    return (
        f"**{machine['cpu']}, {machine['cores']} cores** ({machine['isa']}), {machine['ram_gb']} GB; Python "
        f"{versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{versions['compiler']}; float32. Written at commit {shown}."
    )
