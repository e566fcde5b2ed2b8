"""The parts of the results page about likelihood, time, peers and machines, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from compare_setup import DEFAULT, settings_used
from peers_table import peers_table
from results_format import (
    KINDS,
    MODELS,
    Configuration,
    Result,
    bits_cell,
    bits_verdict,
    by_ensemble,
    ensemble_name,
    folded,
    method_name,
    singles,
    table,
)
from results_read import EARLIER, Results

from deepen_ext.fusers.settings import SHARPNESS


def kinds_of(likelihood: Result) -> list[str]:
    return [*likelihood["kinds"], "all"]


def of_each(found: Mapping[str, Result], part: Callable[[Result], str]) -> str:
    """A part of each machine's results, under its name where there are several machines."""
    made = [(name, part(result)) for name, result in found.items()]
    if len(made) > 1:
        made = [(name, f"*On {name}:*\n\n{content}") for name, content in made if content]
    return "\n\n".join(content for _, content in made) or "Not measured yet."


def likelihood_counts(results: Results) -> str:
    """On how many kinds of text the default is better and worse."""
    return of_each(results.likelihood, lambda one: f"- {_counted(one, DEFAULT, 'The default')}")


def earlier_likelihood_counts(results: Results) -> str:
    """The same counts of the defaults before, and of the paper's recipe."""
    return of_each(results.likelihood, _earlier_counts)


def _earlier_counts(likelihood: Result) -> str:
    titles = {**EARLIER, "deepen:paper": "The paper's recipe"}
    return "\n".join(f"- {_counted(likelihood, method, title)}" for method, title in titles.items())


def _counted(likelihood: Result, method: str, title: str) -> str:
    kinds = list(likelihood["kinds"])
    found = {
        ensemble: [bits_verdict(own[method]["kinds"][kind]["against_best_single"]) for kind in kinds]
        for ensemble, own in by_ensemble(likelihood["configurations"], DEFAULT).items()
        if method in own
    }
    if not found:
        return f"{title}, `{method}`, was not run on real text."
    each = [f"{ensemble_name(key)} {own.count('gain')}, {own.count('harm')}" for key, own in found.items()]
    whole = [verdict for own in found.values() for verdict in own]
    return (
        f"{title}, `{method}`, on real text: {len(whole)} comparisons (ensembles by kinds of text). Outside "
        f"two standard errors it makes the text less probable on {whole.count('harm')}, and more probable on "
        f"{whole.count('gain')} (more, less: {'; '.join(each)})."
    )


def likelihood_texts(results: Results) -> str:
    """How much text there is of each kind."""
    return of_each(results.likelihood, _sizes)


def _sizes(likelihood: Result) -> str:
    kinds = likelihood["kinds"].items()
    sizes = "; ".join(f"{KINDS[k]}: {v['texts']} texts, {v['bytes']:,} bytes" for k, v in kinds)
    sharpness = likelihood["settings"].get("sharpness", SHARPNESS)
    earlier = f" Prompt weights are of an earlier form here (sharpness {sharpness:g})."
    return f"{sizes}.{'' if sharpness == SHARPNESS else earlier}"


def likelihood_tables(results: Results) -> str:
    """Against the best single member, and against the main model."""
    titles = {
        "against_best_single": "Bits a byte, and the change against the best single member",
        "against_main": "The same against the main model alone",
    }
    return "\n\n".join(
        folded(title, of_each(results.likelihood, lambda one, key=against: _likelihood(one, key)))  # type: ignore[misc]
        for against, title in titles.items()
    )


def _likelihood(likelihood: Result, against: str) -> str:
    found, kinds = likelihood["configurations"], kinds_of(likelihood)
    rows = [
        [f"{MODELS[letter]} alone", *(f"{single['kinds'][kind]['bits_per_byte']:.3f}" for kind in kinds)]
        for letter, single in singles(found).items()
    ]
    for ensemble, methods in by_ensemble(found, DEFAULT).items():
        rows.append([f"**{ensemble_name(ensemble)}**", *[""] * len(kinds)])
        for name, own in methods.items():
            cells = [own["kinds"][kind] for kind in kinds]
            rows.append(
                [
                    method_name(name) + (" (default)" if name == DEFAULT else ""),
                    *(f"{cell['bits_per_byte']:.3f}, {bits_cell(cell[against])}" for cell in cells),
                ]
            )
    return table(["bits a byte", *(KINDS[kind] for kind in kinds)], rows)


def time_table(results: Results) -> str:
    """Milliseconds a token, and against the sum of the members alone."""
    return of_each(results.time, _times)


def _times(times: Result) -> str:
    found = times["configurations"]
    groups = by_ensemble(found, DEFAULT)
    methods = list(dict.fromkeys(method for own in groups.values() for method in own))
    rows = [
        [method_name(one), *(cell for own in groups.values() for cell in _clock(own.get(one)))]
        for one in methods
    ]
    alone = "; ".join(
        f"{MODELS[key]} {own['ms_per_token']:.1f}, first {own['first_token_ms']:.0f}"
        for key, own in singles(found).items()
    )
    run = times["settings"]
    heads = [head for one in groups for head in (ensemble_name(one), "first")]
    return (
        table(["ms a token (× members' sum)", *heads], rows)
        + f"\n\nThe members alone on the same loop, ms a token: {alone}. Medians over {run['prompts']} "
        f"prompts of {run['tokens']} new tokens, one at a time, with relative rows computed before. *First*: "
        f"ms to the first token of a prompt of {run['long_prompt_bytes']:,} bytes."
    )


def _clock(own: Configuration | None) -> tuple[str, str]:
    """Of a token, and of the first one after a long prompt."""
    if own is None:
        return "", ""
    first = f"{own['first_token_ms']:.0f}" if "first_token_ms" in own else ""
    return f"{own['ms_per_token']:.1f} ({own['of_members_sum']:.2f})", first


def peers(results: Results) -> str:
    """Peers' own code beside ours."""
    if not results.peers:
        return "Not measured yet."
    return folded(
        "Peers on the same models, texts and questions", of_each(results.peers, peers_table).rstrip()
    )


def settings(results: Results) -> str:
    """What the default method is, and what the others share with it."""
    default = settings_used()["defaults"]
    rule = "the boundary rule" if default["boundary_aware"] else "no boundary rule"
    return (
        f"The default method is `{DEFAULT}`. Where a method's name says nothing else: equal weights, {rule}, "
        f"{default['candidates']} candidates, and for every recipe of deepen η {default['learning_rate']:g} "
        f"and {default['steps']} steps of search. *Prompt weights*: members count by how well they read the "
        "prompt; *size and prompt weights*: by their sizes too."
    )


def hardware(results: Results) -> str:
    """What it ran on, and at which commits."""
    machines: dict[tuple[str, str, bool], list[Result]] = {}
    for name, result in results.files():
        for one in (*result.get("earlier_environments", []), result["environment"]):
            where = name, one["machine"]["cpu"], "gpu" in one["machine"]
            machines.setdefault(where, []).append(one)
    return "\n\n".join(_hardware(found) for found in machines.values())


def _hardware(environments: list[Result]) -> str:
    latest = max(environments, key=lambda found: found["date"])
    machine, versions = latest["machine"], latest["versions"]
    commits = sorted({(e["date"][:10], e["commit"][:10], e["dirty"]) for e in environments})
    shown = ", ".join(
        f"{c} of {day}" + (" with uncommitted changes" if dirty else "") for day, c, dirty in commits
    )
    card = f"{machine['gpu']['name']}; " if "gpu" in machine else ""
    cpu = f"{machine['cpu']}, {machine['cores']} cores"
    sets = " and ".join(sorted({one["machine"]["isa"] for one in environments}))
    return (
        f"**{card}{cpu}** ({sets}), {machine['ram_gb']} GB; Python "
        f"{versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{versions['compiler']}. Written at commit {shown}."
    )
