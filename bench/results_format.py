"""How the results page names things and writes numbers, and when it calls a difference one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MODELS = {"S": "SmolLM2", "G": "Gemma", "Q": "Qwen"}
ENSEMBLES = ("S+G", "G+S", "Q+G", "Q+S", "Q+G+S")
METHODS = ("deepen:calibrated", "deepen:bytes", "deepen:paper", "average", "union-topk", "union-vocab")
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


class Machine:
    """All results of one machine."""

    def __init__(
        self, name: str, tasks: Mapping[str, Result], time: Result | None, likelihood: Result | None
    ):
        """`tasks` by name; what was not measured is missing, or None."""
        self.name = name
        self.tasks = {task: tasks[task] for task in TASKS if task in tasks}
        self.time = time
        self.likelihood = likelihood
        anything: list[Result] = [*self.tasks.values(), *filter(None, (time, likelihood))]
        self.environments = [one["environment"] for one in anything]
        self.settings: Result = anything[0]["settings"]
        self.default: str = self.settings["default_method"]
        if any(each["settings"]["defaults"] != self.settings["defaults"] for each in anything):
            raise SystemExit(f"{name}: its results were made with different defaults; make all of them anew")

    def kinds(self) -> list[str]:
        return [] if self.likelihood is None else [*self.likelihood["kinds"], "all"]


def ensemble_name(letters: str) -> str:
    return " + ".join(MODELS.get(one, one) for one in letters.split("+"))


def method_name(method: str) -> str:
    """As the tables have it: what follows @ in words."""
    name, *changes = method.split("@")
    words = {"prompt": "prompt weights", "skip": "certified skip"}
    shown = [
        words.get(one, one.replace("eta=", "η ").replace("tau=", "τ ").replace("=", " ")) for one in changes
    ]
    return ", ".join([name, *shown])


def is_core(method: str, default: str) -> bool:
    """Whether a method stands in the main tables and plots: a fuser as it is, or with prompts' weights."""
    return "@" not in method or method == default or method.partition("@")[2] == "prompt"


def by_ensemble(configurations: Configurations, default: str) -> dict[str, dict[str, Configuration]]:
    """Fused configurations by ensemble and method: the default method first, then as in `METHODS`."""
    letters = {one["ensemble"] for one in configurations.values() if one["method"] != "single"}
    return {
        ensemble: {
            one["method"]: one
            for one in sorted(
                (one for one in configurations.values() if one["ensemble"] == ensemble),
                key=lambda one: (one["method"] != default, _place(one["method"], METHODS)),
            )
        }
        for ensemble in sorted(letters, key=lambda one: _place(one, ENSEMBLES))
    }


def of_all_tasks(tasks: Iterable[Mapping[str, Any]]) -> dict[str, Configuration]:
    """Every configuration that some task has, by name."""
    return {
        name: {"name": name, "ensemble": own["ensemble"], "method": own["method"]}
        for result in tasks
        for name, own in result["configurations"].items()
    }


def singles(configurations: Configurations) -> dict[str, Configuration]:
    """The members alone, by letter."""
    return {one: configurations[one] for one in MODELS if one in configurations}


def _place(name: str, known: Sequence[str]) -> tuple[int, str]:
    base = name.partition("@")[0]
    return (known.index(base) if base in known else len(known), name)


def signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


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


def marked(text: str, verdict: str) -> str:
    """Bold for a gain, a dagger for a harm."""
    return {"gain": f"**{text}**", "harm": f"{text} †"}.get(verdict, text)


def bits_cell(difference: Configuration) -> str:
    shown = f"{signed(difference['bits_per_byte'], 3)} ± {error_of(difference):.3f}"
    return marked(shown, bits_verdict(difference))


def points_cell(paired: Configuration) -> str:
    return marked(signed(100 * paired["difference"], 1), accuracy_verdict(paired))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def folded(title: str, content: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"


def holm(p_values: Mapping[str, float], level: float = 0.05) -> list[str]:
    """Which tests remain when so many are made (Holm 1979): one of them is false with probability `level`."""
    kept = []
    for place, name in enumerate(sorted(p_values, key=lambda one: p_values[one])):
        if p_values[name] > level / (len(p_values) - place):
            break
        kept.append(name)
    return kept
