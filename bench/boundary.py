"""What the boundary rule gains: the change in negative log-likelihood by fusing, with the rule and without.

Real text is read token by token in the main model's own tokens (teacher forcing). At every token the
assistant has read the text so far as the loop would have it, and the two are fused as in `Ensemble`. The
figure is the negative log-likelihood of the text's next token under the fused distribution less that under
the main model alone: below 0 is a gain. Positions fall into two classes by what comes later, which the rule
does not see: the text so far ends `between` two tokens of the assistant's tokenisation of the whole text, or
`inside` one of them. Errors are standard errors of the mean over positions.

The texts are not those that the threshold was chosen on (the development questions of GSM8K and ARC, other
modules of Python's library). At most `INSIDE_A_TEXT` positions inside tokens are taken from a text, since
each costs a forward pass; shares count all, and the mean over both classes is weighted with them.

`--leading` takes assistants that are larger than the main model, with the default's fuser and the weights it
starts from, which are by size: such an assistant keeps a part of its weight.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT, TIMED, check_data, environment, machine_name, percentile, write_json
from transformers import DynamicCache

from deepen_ext import Ensemble, ops
from deepen_ext.decoding.boundary import CANDIDATES, THRESHOLD, BoundaryRule
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.text.characters import Utf8Stream, whole_characters
from deepen_ext.text.growing_text import GrowingText

SMOLLM2, GEMMA, QWEN = "smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct"
PAIRS = ((SMOLLM2, GEMMA), (GEMMA, SMOLLM2), (QWEN, GEMMA))
LEADING = ((GEMMA, QWEN), (SMOLLM2, QWEN))
SHORT = {SMOLLM2: "SmolLM2", GEMMA: "Gemma", QWEN: "Qwen"}
MODULES = (
    *(
        "json.decoder",
        "sched",
        "copy",
        "glob",
        "tokenize",
        "difflib",
        "ast",
        "random",
        "html.parser",
        "zipfile",
    ),
    *("smtplib", "gettext", "pprint", "ftplib", "tempfile", "mailbox", "imaplib", "wave"),
)
INSIDE_A_TEXT = 24
CLASSES = ("between", "inside", "all")
FIRST = 8  # tokens of the main model before the first position
ALTERNATIVES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def texts(data: Path) -> Iterator[tuple[str, str]]:
    """Kind and text, the kinds in turn."""

    def items(name: str) -> list[dict[str, Any]]:
        with (data / name / "test.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    gsm8k, triviaqa = items("gsm8k"), items("triviaqa")
    for i, module in enumerate(MODULES):
        pair = gsm8k[2 * i : 2 * i + 2]
        yield (
            "GSM8K",
            "".join(
                f"Question: {q['question']}\nLet's think step by step\nAnswer:{q['answer']}\n" for q in pair
            ),
        )
        source = inspect.getsource(importlib.import_module(module))
        start = source.index("\n", len(source) // 3) + 1
        yield "code", source[start : start + 900]
        lines = [f"Question:{q['question']}\nAnswer:{q['answer'][0]}\n" for q in triviaqa[9 * i : 9 * i + 9]]
        yield "TriviaQA", "Answer this questions:\n" + "".join(lines)


@dataclass
class Position:
    """One next token of one text."""

    kind: str
    inside: bool
    weight: float  # how many positions of its text and class it stands for
    change: float  # by fusing, without the rule
    scaled: float  # with the assistant's weight scaled by the probability that its token stands
    alone_right: bool  # the main model alone has the next token on top
    right: bool  # fused it is on top, without the rule
    mass: float  # probability of the candidates that change the assistant's last token
    top: bool  # whether the most probable candidate does
    acts: bool  # the rule, by which the assistant sits out, or keeps a part of its weight
    heeded: float  # change by fusing, with the rule
    heeded_right: bool  # fused the token is on top, with the rule
    microseconds: float  # of the rule


class Reading:
    """A member that has read a whole text: logits after each of its tokens, and after other endings."""

    def __init__(self, member: Member, text: str) -> None:
        self.member = member
        self.ids = member.vocabulary.prefix_ids + member.vocabulary.encode(text)
        self._cache = self._whole = DynamicCache(config=member.model.config)
        self.logits = self._forward(self.ids, 0)
        self.rewind()

    def rewind(self) -> None:
        """Go back to the whole text."""
        self._cache, self._cached = copy.deepcopy(self._whole), list(self.ids)

    def after(self, ids: list[int]) -> torch.Tensor:
        """Logits [1, V] after these ids. With the longest first, each call only rolls back what was read."""
        if ids == self.ids[: len(ids)]:
            return self.logits[len(ids) - 1 : len(ids)]
        shorter = min(len(ids) - 1, len(self._cached))
        keep = next((i for i in range(shorter) if ids[i] != self._cached[i]), shorter)
        self._cache.crop(keep - len(self._cached))
        self._cached = list(ids)
        return self._forward(ids[keep:], 1)

    @torch.inference_mode()
    def _forward(self, ids: list[int], logits_to_keep: int) -> torch.Tensor:
        output = self.member.model(
            input_ids=torch.tensor([ids]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        return output.logits[0].float()


def measure(ensemble: Ensemble, main: Reading, assistant: Reading, kind: str, text: str) -> list[Position]:
    """All positions of a text between the assistant's tokens, and some of those inside them."""
    vocabulary = main.member.vocabulary
    rule, share = BoundaryRule(vocabulary), ensemble.weights[1]
    characters = Utf8Stream()
    start = len(vocabulary.prefix_ids) + FIRST
    growing = GrowingText(assistant.member.vocabulary, characters.feed(vocabulary.decode(main.ids[:start])))
    found: list[tuple[int, list[int], bool, float, bool, float, float]] = []
    top = ops.topk_softmax(main.logits, CANDIDATES)
    for place in range(start, len(main.ids)):
        if not characters.pending:
            candidates = list(zip(top.ids[place - 1].tolist(), top.probs[place - 1].tolist(), strict=True))
            began = time.thread_time()
            keeps = rule.share(growing, candidates, *ensemble.weights)
            taken = (time.thread_time() - began) * 1e6
            changes = [
                not growing.keeps_ids(whole_characters(vocabulary.bytes_of(token))) for token, _ in candidates
            ]
            mass = sum(one[1] for one, change in zip(candidates, changes, strict=True) if change)
            inside = growing.ids != assistant.ids[: len(growing.ids)]
            found.append((place, list(growing.ids), inside, mass, changes[0], keeps, taken))
        growing.append(characters.feed(vocabulary.bytes_of(main.ids[place])))
    inside_all = [one for one in found if one[2]]
    step = max(1, math.ceil(len(inside_all) / INSIDE_A_TEXT))
    taken_inside = inside_all[::step]
    weight = len(inside_all) / len(taken_inside) if taken_inside else 1.0
    chosen = [one for one in found if not one[2]] + taken_inside
    positions = []
    assistant.rewind()
    _compute_rows(ensemble, [main, assistant])
    for place, ids, inside, mass, top_changes, keeps, taken in sorted(chosen, key=lambda one: -one[0]):
        theirs = assistant.after(ids)
        ours = main.logits[place - 1 : place]
        token = main.ids[place]
        alone_right = int(ours.argmax()) == token
        change, right = _fuse(ensemble, ours, theirs, token, share)
        left = share * max(1 - mass, 0.0)
        scaled = change if mass < 1e-3 else _fuse(ensemble, ours, theirs, token, left)[0]
        heeded, heeded_right = (0.0, alone_right) if not keeps else (change, right)
        if 0 < keeps < 1:
            heeded, heeded_right = _fuse(ensemble, ours, theirs, token, share * keeps)
        positions.append(
            Position(
                kind=kind,
                inside=inside,
                weight=weight if inside else 1.0,
                change=change,
                scaled=scaled,
                alone_right=alone_right,
                right=right,
                mass=mass,
                top=top_changes,
                acts=keeps < 1,
                heeded=heeded,
                heeded_right=heeded_right,
                microseconds=taken,
            )
        )
    return positions


def _compute_rows(ensemble: Ensemble, readings: list[Reading]) -> None:
    """The relative rows that a text will need, in one product for each member."""
    for relative, reading in zip(ensemble.maps, readings, strict=True):
        top = ops.topk_softmax(reading.logits, ensemble.fuser.candidates)
        relative.ensure(top.ids[top.probs >= ensemble.fuser.min_probability].unique())


def _fuse(
    ensemble: Ensemble, ours: torch.Tensor, theirs: torch.Tensor, token: int, weight: float
) -> tuple[float, bool]:
    """The change in the token's negative log-likelihood, and whether it comes out on top."""
    step = ensemble.fuser.step([ours.contiguous(), theirs.contiguous()], [1 - weight, weight])
    before, after = (one[0, token] - one[0].logsumexp(-1) for one in (ours, step.logits))
    return float(before - after), int(step.chosen) == token


def summarise(positions: list[Position]) -> dict[str, Any]:
    """Means by class, without the rule, with it, and with what else could have been done."""

    def figures(
        fires: list[bool], otherwise: list[float], on_top: list[bool] | None = None
    ) -> dict[str, Any]:
        fired = zip(positions, fires, strict=True)
        right = on_top or [p.alone_right if one else p.right for p, one in fired]

        def one_class(which: list[int]) -> dict[str, Any]:
            weights = [positions[i].weight for i in which]
            return {
                **_mean([after[i] for i in which], weights),
                "fires": _share([fires[i] for i in which], weights),
                "spoilt": _share([positions[i].alone_right and not right[i] for i in which], weights),
                "repaired": _share([right[i] and not positions[i].alone_right for i in which], weights),
            }

        after = [
            other if fired else p.change for p, fired, other in zip(positions, fires, otherwise, strict=True)
        ]
        found: dict[str, Any] = {}
        for name in CLASSES:
            which = [
                i for i, p in enumerate(positions) if name in ("all", "inside" if p.inside else "between")
            ]
            found[name] = one_class(which)
        return found

    zero = [0.0] * len(positions)
    mass = [p.mass for p in positions]
    never = [False] * len(positions)
    lost = [p.change - p.heeded for p in positions if p.acts and not p.inside]
    microseconds = [p.microseconds for p in positions]
    return {
        "positions": {
            "between": sum(not p.inside for p in positions),
            "inside": sum(p.inside for p in positions),
        },
        "share_inside": _share([p.inside for p in positions], [p.weight for p in positions]),
        "without": figures(never, zero),
        "with": figures(
            [p.acts for p in positions],
            [p.heeded for p in positions],
            [p.heeded_right for p in positions],
        ),
        "false_alarms": {"positions": len(lost), "change_lost": _mean(lost, [1.0] * len(lost))},
        "alternatives": {
            **{f"threshold {t:g}": figures([m >= t for m in mass], zero) for t in ALTERNATIVES},
            "most probable candidate only": figures([p.top for p in positions], zero),
            "weight x (1 - probability)": figures([m >= 1e-3 for m in mass], [p.scaled for p in positions]),
        },
        "microseconds": {
            "mean": sum(microseconds) / len(microseconds),
            "p50": percentile(microseconds, 0.5),
            "p99": percentile(microseconds, 0.99),
        },
    }


def _mean(values: list[float], weights: list[float]) -> dict[str, float | None]:
    total = sum(weights)
    if len(values) < 2:
        return {"mean": None, "error": None}
    mean = sum(w * v for v, w in zip(values, weights, strict=True)) / total
    squares = sum((w * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return {"mean": mean, "error": math.sqrt(squares) / total}


def _share(flags: list[bool], weights: list[float]) -> float:
    return sum(w for flag, w in zip(flags, weights, strict=True) if flag) / max(sum(weights), 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the benchmark data (shared/data)")
    parser.add_argument("--positions", type=int, default=4000, help="of each pair, about")
    parser.add_argument("--leading", action="store_true", help="larger assistants; see above")
    parser.add_argument("--output", type=Path, help="default: under bench/results/boundary")
    options = parser.parse_args()
    check_data(parser, options.data)

    found = environment()
    pairs, settings = (LEADING, {}) if options.leading else (PAIRS, TIMED)
    name = f"{'leading-' if options.leading else ''}{machine_name(found)}.json"
    output = options.output or ROOT / "bench" / "results" / "boundary" / name
    members = {
        name: load_member(f"demo:{name}", backend="transformers")
        for name in {name for pair in pairs for name in pair}
    }
    ensembles = {pair: Ensemble([members[name] for name in pair], **settings) for pair in pairs}
    positions: dict[tuple[str, str], list[Position]] = {pair: [] for pair in pairs}
    for read, (kind, text) in enumerate(texts(options.data), 1):
        whole = {name: Reading(member, text) for name, member in members.items()}
        for pair in pairs:
            positions[pair] += measure(ensembles[pair], whole[pair[0]], whole[pair[1]], kind, text)
            ensembles[pair].save_rows()
        result = {"environment": found, "texts": read, **report(positions)}
        write_json(output, result)  # after every text: an interrupted run keeps what it has
        print(f"{read} texts, {[len(p) for p in positions.values()]} positions", flush=True)
        if min(map(len, positions.values())) >= options.positions:
            break
    print(table(result))


def report(positions: dict[tuple[str, str], list[Position]]) -> dict[str, Any]:
    """The figures of all pairs, and of each kind of text."""
    kinds = sorted({p.kind for own in positions.values() for p in own})
    return {
        "threshold": THRESHOLD,
        "candidates": CANDIDATES,
        "pairs": [
            {
                "main": pair[0],
                "assistant": pair[1],
                **summarise(own),
                "kinds": {kind: summarise([p for p in own if p.kind == kind]) for kind in kinds},
            }
            for pair, own in positions.items()
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    names = [f"{SHORT[pair['main']]} + {SHORT[pair['assistant']]}" for pair in result["pairs"]]
    lines = [
        "| main + assistant | class | share | positions | without the rule | with it | acts | "
        "spoilt, repaired without | with |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, pair in zip(names, result["pairs"], strict=True):
        inside = pair["share_inside"]
        shares = {"between": 1 - inside, "inside": inside, "all": 1.0}
        counts = pair["positions"] | {"all": sum(pair["positions"].values())}
        for name in CLASSES:
            before, after = pair["without"][name], pair["with"][name]
            lines.append(
                f"| {title} | {name} | {shares[name]:.1%} | {counts[name]:,} | "
                f"{_figure(before)} | {_figure(after)} | {after['fires']:.1%} | "
                f"{before['spoilt']:.1%}, {before['repaired']:.1%} | "
                f"{after['spoilt']:.1%}, {after['repaired']:.1%} |"
            )
    lines += ["", "| change between, inside, all | " + " | ".join(names) + " |"]
    lines.append("| --- |" + " --- |" * len(names))
    for name in result["pairs"][0]["alternatives"]:
        found = [pair["alternatives"][name] for pair in result["pairs"]]
        cells = [", ".join(_signed(one[part]["mean"]) for part in CLASSES) for one in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    costs = [pair["microseconds"] for pair in result["pairs"]]
    lines += [
        "",
        "Microseconds a step (median, mean, 99th percentile): "
        + "; ".join(
            f"{title}: {cost['p50']:.0f}, {cost['mean']:.0f}, {cost['p99']:.0f}"
            for title, cost in zip(names, costs, strict=True)
        ),
    ]
    return "\n".join(lines)


def _figure(found: dict[str, float | None]) -> str:
    error = "" if found["error"] is None else f" ± {found['error']:.3f}"
    return _signed(found["mean"]) + error


def _signed(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:+.3f}".replace("-", "−")


if __name__ == "__main__":
    main()
