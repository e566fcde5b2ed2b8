"""Bits a byte on kinds of text, under teacher forcing: every way of fusing beside the members alone.

A text is some 500 characters of context, read and not scored (weights from the prompt are found there), and
some 1,500 that are scored. Errors are standard errors of ratios, over blocks of 128 bytes and over texts;
differences are paired by block, or by text. None of the texts is from a dev split.

Each text's results go to `--work` as lines of JSON, where a run that was ended goes on and further ensembles,
methods and texts add up; bench/results/likelihood/<machine>.json is made of all of them. What that file has
of earlier folders stays, but for weights from the prompt with another sharpness.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boundary import MODULES
from common import ROOT, environment, machine_name, write_json
from compare_setup import (
    Deadline,
    add_options,
    alike,
    check_default,
    configurations,
    letters_of,
    load,
    say,
    settings_used,
)

from deepen_ext import Ensemble, InputError
from deepen_ext.decoding.prompt_weights import PromptScore, prompt_weights, read_prompts
from deepen_ext.fusers import FusionSettings
from deepen_ext.measure.evaluation.headers import configuration_header
from deepen_ext.measure.likelihood.text_reading import TextReading, TokenLikelihoods
from deepen_ext.measure.tuning.configurations import paired_difference
from deepen_ext.members.member import Member

RESULTS = ROOT / "bench" / "results" / "likelihood"
CONTEXT, SCORED, BLOCK = 500, 1500, 128
KINDS = ("gsm8k", "code", "prose", "triviaqa")


@dataclass(frozen=True)
class Text:
    """One text of a kind."""

    kind: str
    context: str
    scored: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([self.context, self.scored]).encode()).hexdigest()[:16]


def texts(data: Path, kind: str, count: int) -> list[Text]:
    """The first texts of a kind; a larger count has the smaller one's texts first."""
    found = []
    for whole in _code() if kind == "code" else _questions(data, kind):
        whole = whole[: CONTEXT + SCORED]
        # Before the last space that a word follows: no tokenizer has a token across it.
        cut = [one.start() for one in re.finditer(r"(?<=\S) (?=\w)", whole[:CONTEXT])][-1]
        found.append(Text(kind, whole[:cut], whole[cut:]))
        if len(found) == count:
            break
    return found


def _code() -> Iterator[str]:
    """Passages of Python's library: the middles of modules first, then their later parts."""
    sources = [inspect.getsource(importlib.import_module(module)) for module in MODULES]
    for share in (1 / 3, 2 / 3):
        for source in sources:
            start = source.index("\n", int(len(source) * share)) + 1
            if len(source) - start >= CONTEXT + SCORED:
                yield source[start:]


def _questions(data: Path, kind: str) -> Iterator[str]:
    """Test items one after the other; texts have no item in common."""

    def line(one: Mapping[str, Any]) -> str:
        if kind == "gsm8k":
            return f"Question: {one['question']}\nLet's think step by step\nAnswer:{one['answer']}\n"
        if kind == "triviaqa":
            return f"Question:{one['question']}\nAnswer:{one['answer'][0]}\n"
        return f"{one['question']} {one[one['answer']]}\n"

    folder = data / ("piqa" if kind == "prose" else kind)
    text = ""
    for row in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines():
        text += line(json.loads(row))
        if len(text) >= CONTEXT + SCORED:
            yield text
            text = ""


def weights_of(ensemble: Ensemble, scores: Mapping[int, PromptScore]) -> list[float]:
    """The weights that the loop would have after the context."""
    if not ensemble.weighs_prompts:
        return ensemble.weights
    return prompt_weights(
        [scores[id(member)] for member in ensemble.members], ensemble.weights, ensemble.team.sharpness
    )


def prompt_scores(members: Sequence[Member], context: str) -> dict[int, PromptScore]:
    """How well each member reads the context, as the loop finds it; by the member's id."""
    scores = {}
    for member in members:
        ids = member.vocabulary.prefix_ids + member.vocabulary.encode(context)
        session = member.backend.open()
        scores[id(member)] = read_prompts(session, member, {0: ids})[0]
        session.close()
    return scores


def fingerprint(name: str, ensemble: Ensemble) -> str:
    """Of the settings that a line was made with."""
    header = configuration_header(name, ensemble, certified_skip=False, share_forwards=True)
    header["sharpness"] = ensemble.team.sharpness if ensemble.weighs_prompts else None
    return hashlib.sha256(json.dumps(header).encode()).hexdigest()[:16]


def measure(
    text: Text, ensembles: Mapping[str, Ensemble], prints: Mapping[str, str], commit: str
) -> Iterator[dict[str, Any]]:
    """A line for each configuration."""
    members = list({id(member): member for one in ensembles.values() for member in one.members}.values())
    weighing = {id(m): m for one in ensembles.values() if one.weighs_prompts for m in one.members}
    scores = prompt_scores(list(weighing.values()), text.context)
    with TextReading(members, text.context, text.scored) as reading:
        for name, ensemble in ensembles.items():
            weights = weights_of(ensemble, scores)
            alone = len(ensemble.members) == 1
            found: TokenLikelihoods = (
                reading.member(ensemble.members[0]) if alone else reading.fused(ensemble, weights)
            )
            if not alone:
                ensemble.save_rows()
            yield {
                "configuration": name,
                "fingerprint": prints[name],
                "kind": text.kind,
                "text": text.sha256,
                "bytes": found.nbytes,
                "bits": [round(-one / math.log(2), 4) for one in found.by_blocks(BLOCK)],
                "right": sum(found.greedy),
                "tokens": len(found.greedy),
                "weights": [round(one, 4) for one in weights],
                "learning_rate": getattr(ensemble.fuser, "learning_rate", None),
                "commit": commit,
            }


Lines = dict[tuple[str, str, str], dict[str, Any]]  # by configuration, kind and text


def read(file: Path) -> Lines:
    """The lines of a work folder; of two for the same thing the later one. A torn last line is cut off."""
    found: Lines = {}
    if file.is_file():
        whole, _, torn = file.read_text(encoding="utf-8").rpartition("\n")
        for row in whole.split("\n") if whole else []:
            one = json.loads(row)
            found[one["configuration"], one["kind"], one["text"]] = one
        if torn:
            file.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    return found


def summarise(lines: Lines) -> dict[str, Any]:
    """Kinds and configurations, on the texts that all configurations have."""
    names = sorted({name for name, _, _ in lines}, key=lambda one: (" " in one, one))
    sets: dict[str, list[str]] = {}
    for kind in KINDS:
        there = [text for name, k, text in lines if (name, k) == (names[0], kind)]
        shared = [text for text in there if all((name, kind, text) in lines for name in names)]
        if left := len({text for _, k, text in lines if k == kind}) - len(shared):
            say(f"{kind}: {left} texts are left out, because not all configurations have them")
        if shared:
            sets[kind] = shared
    kinds = list(sets)
    own = {name: {k: [lines[name, k, text] for text in sets[k]] for k in kinds} for name in names}
    for of_kinds in own.values():
        of_kinds["all"] = [one for kind in kinds for one in of_kinds[kind]]
    first = own[names[0]]
    return {
        "kinds": {
            kind: {
                "texts": len(first[kind]),
                "bytes": sum(one["bytes"] for one in first[kind]),
                "sha256": hashlib.sha256("".join(sets[kind]).encode()).hexdigest(),
            }
            for kind in kinds
        },
        "configurations": {
            name: {
                "ensemble": name.partition(" ")[0],
                "method": name.partition(" ")[2] or "single",
                "kinds": {key: _figures(name, key, own) for key in [*kinds, "all"]},
            }
            for name in names
        },
        "commits": sorted({one["commit"] for one in lines.values()}),
    }


def _figures(name: str, key: str, own: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Bits a byte of a configuration on some texts, and beside its members alone."""
    lines = own[name][key]
    found: dict[str, Any] = _difference(lines, None)
    found["right_share"] = round(sum(o["right"] for o in lines) / sum(o["tokens"] for o in lines), 5)
    ensemble, _, method = name.partition(" ")
    if method:
        weights = zip(*(one["weights"] for one in lines), strict=True)
        found["mean_weights"] = [round(sum(one) / len(one), 4) for one in map(list, weights)]
        letters = letters_of(ensemble)
        best = min(letters, key=lambda one: sum(sum(line["bits"]) for line in own[one][key]))
        found["against_best_single"] = {"configuration": best, **_difference(lines, own[best][key])}
        found["against_main"] = {"configuration": letters[0], **_difference(lines, own[letters[0]][key])}
    return found


def _difference(lines: list[dict[str, Any]], others: list[dict[str, Any]] | None) -> dict[str, float | None]:
    """Bits a byte, over those of others on the same texts, with errors over blocks and over texts."""
    other = others or [{"bits": [0.0] * len(one["bits"])} for one in lines]
    blocks = [
        (bits, theirs, min(BLOCK, line["bytes"] - place * BLOCK))
        for line, beside in zip(lines, other, strict=True)
        for place, (bits, theirs) in enumerate(zip(line["bits"], beside["bits"], strict=True))
    ]
    whole = [
        (sum(line["bits"]), sum(beside["bits"]), line["bytes"])
        for line, beside in zip(lines, other, strict=True)
    ]
    mean, error = paired_difference(*map(list, zip(*blocks, strict=True)))
    _, by_text = paired_difference(*map(list, zip(*whole, strict=True)))
    return {
        "bits_per_byte": round(mean, 5),
        "error": round(error, 5),
        "error_by_text": round(by_text, 5) if len(whole) > 1 else None,
    }


def with_kept(file: Path, settings: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """What to write: settings and summary, and what an earlier file has of other configurations.

    Raises:
        InputError: the file is of other texts, or of other defaults.
    """
    if not file.is_file():
        return {"settings": settings, **summary}
    known = json.loads(file.read_text(encoding="utf-8"))
    new = summary["configurations"]
    other_sharpness = known["settings"]["sharpness"] != settings["sharpness"]
    rest = {
        name: one
        for name, one in known["configurations"].items()
        if name not in new and not (other_sharpness and re.search("@(prompt|size)", name))
    }
    alike_now = known["kinds"] == summary["kinds"] and alike(known["settings"]) == alike(settings)
    if rest and not alike_now:
        raise InputError(
            f"{file} has configurations on other texts, or with other defaults ({next(iter(rest))}, ...): "
            "give another --output, or remove the file"
        )
    every = sorted({**rest, **new}.items(), key=lambda one: (" " in one[0], one[0]))
    commits = sorted({*known["commits"], *summary["commits"]})
    return {"settings": settings, **summary, "configurations": dict(every), "commits": commits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the benchmark data (shared/data)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the lines")
    parser.add_argument("--texts", type=int, default=12, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[:3])
    parser.add_argument("--output", type=Path, help="file; default: bench/results/likelihood/<machine>.json")
    add_options(parser)
    options = parser.parse_args()

    found = environment()
    output = options.output or RESULTS / f"{machine_name(found)}.json"
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "likelihood.jsonl"
    lines = read(file)
    deadline = Deadline(options)
    ensembles = configurations(load(options.ensembles), options.ensembles, options.methods)
    prints = {name: fingerprint(name, one) for name, one in ensembles.items()}
    by_kind = [texts(options.data, kind, options.texts) for kind in options.kinds]
    for (name, _, _), one in lines.items():
        if name not in ensembles:  # nobody would measure it again
            check_default(file, name, one["learning_rate"])
    rounds = [of_kind[i] for i in range(options.texts) for of_kind in by_kind if i < len(of_kind)]
    for number, text in enumerate(rounds, 1):
        keys = {name: (name, text.kind, text.sha256) for name in ensembles}
        missing = {
            name: ensembles[name]
            for name, key in keys.items()
            if key not in lines or lines[key]["fingerprint"] != prints[name]
        }
        if not missing:
            continue
        if deadline.passed():
            say("the time is up")
            break
        with file.open("a", encoding="utf-8") as append:
            for one in measure(text, missing, prints, found["commit"]):
                append.write(json.dumps(one) + "\n")
                append.flush()
                lines[keys[one["configuration"]]] = one
        say(f"text {number} of {len(rounds)} ({text.kind}): {len(missing)} configurations")
    settings = {
        **settings_used(),
        "context": CONTEXT,
        "scored": SCORED,
        "block": BLOCK,
        "sharpness": FusionSettings().sharpness,
    }
    write_json(output, {**with_kept(output, settings, summarise(lines)), "environment": found})
    say(f"written to {output}")


if __name__ == "__main__":
    main()
