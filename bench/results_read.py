"""What bench/results/ holds for the results page: measures, texts' likelihoods, times, peers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compare_setup import ALIKE, DEFAULT, alike, default_order
from results_format import TASKS, Configuration, Configurations, Result, comparisons

# The defaults before, the last one first.
EARLIER = {"follow:bytes@prompt": "The default before", "deepen:bytes": "The first default"}
BEFORE = next(iter(EARLIER))
# The default's fuser and weights in an order that the default would change: a far larger member is not first.
AS_NAMED = f"{DEFAULT}@named"
CHOICES = ("arc_challenge", "piqa", "mmlu")  # tasks that are scored in two ways


@dataclass(frozen=True)
class Measure:
    """One file of answers by one metric: a column of the tables.

    Attributes:
        title: of the column.
        machine: folder of the file.
        result: the file.
        scores: by configuration; those of acc_norm, too, have everything at the top.
        votes: sampled answers an item, 1 without votes.
    """

    title: str
    machine: str
    result: Result
    scores: Configurations
    votes: int = 1

    @property
    def head(self) -> str:
        return f"{self.title}, n {self.result['items']}"

    @property
    def task(self) -> tuple[str, str | None]:
        """Its name, and how it is scored; None for written answers."""
        return self.result["task"], self.result.get("scoring")

    def has(self, method: str) -> bool:
        """Whether some ensemble was run by this method."""
        return any(one["method"] == method for one in self.scores.values())


@dataclass(frozen=True)
class Results:
    """Everything that was found; what differs by machine is by the machine's name."""

    tests: Sequence[Measure] = ()  # of one answer an item
    votes: Sequence[Measure] = ()
    dev: Sequence[Measure] = ()
    likelihood: dict[str, Result] = field(default_factory=dict)
    time: dict[str, Result] = field(default_factory=dict)
    peers: dict[str, Result] = field(default_factory=dict)

    def main(self) -> list[Measure]:
        """The measures that have the default or the one before; all, while none has."""
        return [one for one in self.tests if one.has(DEFAULT) or one.has(BEFORE)] or list(self.tests)

    def files(self) -> list[tuple[str, Result]]:
        """Files of answers, likelihoods and times, each once, with their machines."""
        measured = [(one.machine, one.result) for one in (*self.tests, *self.votes, *self.dev)]
        found = [*measured, *self.likelihood.items(), *self.time.items()]
        return list({id(result): (machine, result) for machine, result in found}.values())


def read_results(folder: Path) -> Results:
    """All of a results folder.

    Raises:
        SystemExit: the files were made with different settings.
    """
    evaluation = folder / "evaluation"
    files = [(file, _load(file)) for file in sorted(evaluation.glob("**/*.json")) if file.name != "time.json"]
    found = [one for file, result in files for one in _measures(_machine(file, evaluation), result)]
    found = _named_apart(sorted(found, key=lambda one: list(TASKS).index(one.result["task"])))
    results = Results(
        tests=[one for one in found if one.result["split"] == "test" and one.votes == 1],
        votes=[one for one in found if one.result["split"] == "test" and one.votes > 1],
        dev=[one for one in found if one.result["split"] != "test"],
        likelihood={file.stem: _load(file) for file in sorted((folder / "likelihood").glob("*.json"))},
        time={file.parent.name: _load(file) for file in sorted(evaluation.glob("*/time.json"))},
        peers={file.stem: _read(file) for file in sorted((folder / "peers").glob("*.json"))},
    )
    made = {alike(one["settings"]) for _, one in results.files()}
    if len(made) > 1:
        raise SystemExit(f"{folder}: results of different defaults ({', '.join(ALIKE)}); make them all anew")
    return results


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _load(file: Path) -> dict[str, Any]:
    """A file of configurations; those in an order that the default would not have are not the default's."""
    result = _read(file)
    found = {}
    for name, own in result["configurations"].items():
        ensemble, method = own["ensemble"], own["method"]
        if method == DEFAULT and default_order(ensemble) != ensemble:
            name, own = f"{ensemble} {AS_NAMED}", {**own, "method": AS_NAMED}
        found[name] = own
    return {**result, "configurations": found}


def _machine(file: Path, evaluation: Path) -> str:
    return file.relative_to(evaluation).parts[0]


def dtype_of(result: Result) -> str:
    """Of the weights in transformers; the oldest files do not say it."""
    found: str = result.get("dtype", "float32")
    return found


def _measures(machine: str, result: Result) -> Iterator[Measure]:
    """The measures of a file: two for choices, by acc and by acc_norm, unless these never differ."""
    name, scores = TASKS[result["task"]], result["configurations"]
    votes = result.get("votes", {}).get("count", 1)
    if (gpu := result["environment"]["machine"].get("gpu")) is not None:
        name += f" on {gpu['name'].removeprefix('NVIDIA ').partition(' ')[0]}"  # H100
    if dtype_of(result) != "float32":
        name += f" in {dtype_of(result)}"
    if result.get("scoring") != "likelihood":
        title = f"{name}, letter" if result["task"] in CHOICES else name
        yield Measure(title if votes == 1 else f"{title}, {votes} votes", machine, result, scores, votes)
        return
    by_bytes = {key: {**one, **one["norm"]} for key, one in scores.items()}
    differ = any(one["right"] != scores[key]["right"] for key, one in by_bytes.items())
    yield Measure(f"{name}, acc", machine, result, scores)
    if differ:
        yield Measure(f"{name}, acc_norm", machine, result, by_bytes)


def _named_apart(found: Sequence[Measure]) -> list[Measure]:
    """Measures of one title and split on several machines have the machine in their title."""
    keys = [(one.title, one.result["split"]) for one in found]
    return [
        replace(one, title=f"{one.title} ({one.machine})") if keys.count(key) > 1 else one
        for one, key in zip(found, keys, strict=True)
    ]


def pairs_of(measures: Sequence[Measure], method: str) -> list[tuple[str, str, Configuration]]:
    """A method's comparisons with the best single member: measure, ensemble, comparison."""
    return [
        (one.title, ensemble, paired)
        for one in measures
        for ensemble, paired in comparisons(one.scores, method)
    ]
