"""How the results page names things and writes numbers, and when it calls a difference one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MODELS = {"S": "SmolLM2", "G": "Gemma", "Q": "Qwen", "L": "Qwen 1.5B"}
ENSEMBLES = (
    *("S+G", "G+S", "Q+G", "G+Q", "Q+S", "S+Q", "Q+G+S", "G+S+Q", "S+G+Q"),
    *("L+G", "G+L", "L+S", "S+L", "L+Q", "Q+L", "L+G+S"),
)
METHODS = (
    *("follow:bytes", "deepen:bytes", "deepen:calibrated", "deepen:paper", "average", "union-topk"),
    *("union-vocab", "product", "consistent"),
)
TASKS = {
    "arc_challenge": "ARC-Challenge",
    "piqa": "PIQA",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "triviaqa": "TriviaQA",
    "nq": "NQ",
}
KINDS = {"gsm8k": "GSM8K", "code": "Python code", "prose": "prose", "triviaqa": "TriviaQA", "all": "all"}

Result = Mapping[str, Any]  # what a JSON file holds
Configuration = Mapping[str, Any]
Configurations = Mapping[str, Configuration]  # of a JSON file, by name: "Q" or "Q+G average"


def ensemble_name(letters: str) -> str:
    return " + ".join(MODELS.get(one, one) for one in letters.split("+"))


def method_name(method: str) -> str:
    """As the tables have it: what follows @ in words."""
    name, *changes = method.split("@")
    words = {
        "prompt": "prompt weights",
        "size": "size and prompt weights",
        "named": "the smaller one in front",
        "skip": "certified skip",
    }
    shown = [
        words.get(one, one.replace("eta=", "η ").replace("tau=", "τ ").replace("=", " ")) for one in changes
    ]
    return ", ".join([name, *shown])


def by_ensemble(configurations: Configurations, default: str) -> dict[str, dict[str, Configuration]]:
    """Fused configurations by ensemble and method: the default method first, then as in `METHODS`."""
    letters = {one["ensemble"] for one in configurations.values() if one["method"] != "single"}
    return {
        ensemble: {
            one["method"]: one
            for one in sorted(
                (one for one in configurations.values() if one["ensemble"] == ensemble),
                key=lambda one: method_place(one["method"], default),
            )
        }
        for ensemble in sorted(letters, key=lambda one: _place(one, ENSEMBLES))
    }


def of_all(found: Iterable[Configurations]) -> dict[str, Configuration]:
    """Every configuration that some file has, by name."""
    return {
        name: {"name": name, "ensemble": own["ensemble"], "method": own["method"]}
        for configurations in found
        for name, own in configurations.items()
    }


def singles(configurations: Configurations) -> dict[str, Configuration]:
    """The members alone, by letter."""
    return {one: configurations[one] for one in MODELS if one in configurations}


def method_place(method: str, default: str) -> tuple[bool, int, str]:
    """Sorts methods: the default, then as in `METHODS`."""
    return (method != default, *_place(method, METHODS))


def _place(name: str, known: Sequence[str]) -> tuple[int, str]:
    base = name.partition("@")[0]
    return (known.index(base) if base in known else len(known), name)


def comparisons(scores: Configurations, method: str) -> list[tuple[str, Configuration]]:
    """A method's ensembles, and how each compares with its best single member."""
    found = by_ensemble(scores, method)
    paired = {key: own[method]["against_best_single"] for key, own in found.items() if method in own}
    return [(key, one) for key, one in paired.items() if one is not None]


def signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # + 0.0: no −0.0


def error_of(difference: Configuration) -> float:
    """The larger of the standard errors over blocks and over texts: blocks of a text may be alike."""
    return max(float(difference["error"]), difference["error_by_text"] or 0.0)


def bits_verdict(difference: Configuration) -> str:
    """ "gain" or "harm" outside two standard errors, else "none". Fewer bits a byte are a gain."""
    if abs(difference["bits_per_byte"]) <= 2 * error_of(difference):
        return "none"
    return "gain" if difference["bits_per_byte"] < 0 else "harm"


def accuracy_verdict(paired: Configuration) -> str:
    """ "gain" or "harm" where McNemar's exact test has p < 0.05, else "none"."""
    if paired["p_value"] >= 0.05:
        return "none"
    return "gain" if paired["difference"] > 0 else "harm"


def points_verdict(paired: Configuration) -> str:
    """ "gain" or "harm" outside two standard errors of the paired difference, else "none"."""
    difference, n = paired["gained"] - paired["lost"], paired["n"]
    # Each item adds 1, 0 or -1; that many of them differ.
    error = math.sqrt(paired["gained"] + paired["lost"] - difference**2 / n)
    if abs(difference) <= 2 * error:
        return "none"
    return "gain" if difference > 0 else "harm"


def marked(text: str, verdict: str) -> str:
    """Bold for a gain, a dagger for a harm."""
    return {"gain": f"**{text}**", "harm": f"{text} †"}.get(verdict, text)


def bits_cell(difference: Configuration) -> str:
    shown = f"{signed(difference['bits_per_byte'], 3)} ± {error_of(difference):.3f}"
    return marked(shown, bits_verdict(difference))


def points_cell(paired: Configuration) -> str:
    """Points with their 95 % interval."""
    low, high = (signed(100 * bound, 1) for bound in paired["interval"])
    return marked(f"{signed(100 * paired['difference'], 1)} ({low} to {high})", accuracy_verdict(paired))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def folded(title: str, content: str) -> str:
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{content}\n\n</details>'


def holm(p_values: Mapping[Any, float], level: float = 0.05) -> list[Any]:
    """Which tests remain when so many are made (Holm 1979): one of them is false with probability `level`."""
    kept = []
    for place, name in enumerate(sorted(p_values, key=lambda one: p_values[one])):
        if p_values[name] > level / (len(p_values) - place):
            break
        kept.append(name)
    return kept
