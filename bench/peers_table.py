"""The table of `bench/peers.py`'s results, as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results_format import KINDS, ensemble_name

from deepen_ext.measure.evaluation.statistics import wilson_interval
from deepen_ext.measure.tuning.configurations import paired_difference

Row = Mapping[str, Any]

PEERS_KINDS = {**KINDS, "arc_challenge": "ARC"}
UPPER = ("byte-sampler", "mix")  # what the others' bits are compared with
NAMES = {
    ("byte-sampler", "mix"): "byte-sampler, mix",
    ("byte-sampler", "mix, after BOS"): "byte-sampler, mix, as it is (BOS first)",
    ("byte-sampler", "product"): "byte-sampler, product",
}


def peers_table(results: Mapping[str, Any]) -> str:
    """A table for each pair, what could not be measured, and what was changed to run the peers.

    Args:
        results: what `bench/peers.py` writes.
    """
    lines = []
    for pair, rows in results["pairs"].items():
        kinds = list(dict.fromkeys(text["kind"] for row in rows for text in row.get("texts", [])))
        upper = next((row for row in rows if (row["system"], row["name"]) == UPPER), None)
        heads = [
            *(f"bits a byte: {PEERS_KINDS[kind]}" for kind in kinds),
            *("all", "less byte-sampler's mix", "next token right", "ARC by choices", "by their bytes"),
            *("ARC by letter", "ms a token", "in a batch", "MB beyond models"),
        ]
        lines += [f"| **{ensemble_name(pair)}** | " + " | ".join(heads) + " |"]
        lines += ["| --- |" + " ---: |" * len(heads)]
        for row in rows:
            if set(row) != {"system", "name", "errors"}:
                cells = [*_bits(row, kinds, upper), *_answers(row), *_costs(row)]
                lines.append(f"| {_name(row)} | " + " | ".join(cells) + " |")
        lines += ["", *_errors(rows), ""]
    sizes = results["settings"]
    lines += [
        f"{sizes['texts']} of each kind of text, {sizes['scored']} characters scored after "
        f"{sizes['context']} that are read only; {sizes['items']} questions of ARC-Challenge's dev split by "
        f"choices, {sizes['letters']} by letter (95 % intervals); {sizes['tokens']} tokens written for a "
        f"prompt, the reading of it included, {sizes['batch']} prompts in a batch. ± is the standard error "
        "over blocks of 128 bytes, paired.",
        "",
    ]
    for name, facts in results["peers"].items():
        changes = "; ".join(facts["changes"])
        lines.append(f"{name} is {facts['repository']} at {facts['commit'][:7]}; {changes}.")
    found = results["environment"]
    versions = ", ".join(f"{one} {found['versions'][one]}" for one in ("torch", "transformers"))
    lines += [
        f"{found['machine']['cpu']}, {found['machine']['cores']} cores, torch threads "
        f"{found['torch_threads']}, {versions}; commit {found['commit'][:7]}, {found['date'][:10]}.",
        "",
        "Made by `python bench/peers.py --data ../shared/data --byte-sampler PATH --unite PATH`.",
    ]
    return "\n".join(lines) + "\n"


def _name(row: Row) -> str:
    system, name = row["system"], row["name"]
    if system == "alone":
        return f"{ensemble_name(name)} alone"
    if system == "byte-sampler" and len(name) == 1:
        return f"byte-sampler, {ensemble_name(name)} alone"
    return NAMES.get((system, name), name if system == "deepen-ext" else f"{system}, {name}")


def _bits(row: Row, kinds: Sequence[str], upper: Row | None) -> list[str]:
    """Bits a byte of each kind and of all, the change against the exact mixture, and the right tokens."""
    texts = row.get("texts", [])
    if not texts:
        return ["–"] * (len(kinds) + 3)
    tokens = sum(text.get("tokens", 0) for text in texts)
    right = f"{sum(text['right_tokens'] for text in texts) / tokens:.0%}" if tokens else "–"
    if "bits" not in texts[0]:
        has = sum(text["tokens_with_probability"] for text in texts)
        return ["∞"] * len(kinds) + [f"∞ ({1 - has / tokens:.1%} of tokens have probability 0)", "–", right]
    cells = []
    for kind in [*kinds, None]:
        own = [text for text in texts if kind in (None, text["kind"])]
        bits = sum(sum(text["bits"]) for text in own) / sum(text["bytes"] for text in own)
        cells.append(f"{bits:.3f}")
    if upper is None or upper is row or not upper.get("texts"):
        return [*cells, "–", right]
    theirs = [bits for text in upper["texts"] for bits in text["bits"]]
    ours = [bits for text in texts for bits in text["bits"]]
    sizes = [size for text in texts for size in _sizes(text)]
    mean, error = paired_difference(ours, theirs, sizes)
    return [*cells, f"{mean:+.3f} ± {error:.3f}".replace("-", "−"), right]


def _sizes(text: Mapping[str, Any]) -> list[int]:
    """Bytes of each block: all but the last are 128."""
    blocks = len(text["bits"])
    return [128] * (blocks - 1) + [text["bytes"] - 128 * (blocks - 1)]


def _answers(row: Row) -> list[str]:
    choices, letters = row.get("choices", {}), row.get("letters", {})
    return [
        _share(choices.get("right")),
        _share(choices.get("right_by_bytes")),
        _share(letters.get("right")),
    ]


def _share(right: Sequence[int] | None) -> str:
    if not right:
        return "–"
    low, high = wilson_interval(sum(right), len(right))
    return f"{sum(right) / len(right):.0%} ({100 * low:.0f}–{100 * high:.0f})"


def _costs(row: Row) -> list[str]:
    speed = row.get("speed", {})
    return [
        f"{speed[key]:,.0f}" if key in speed else "–"
        for key in ("ms_a_token", "ms_a_token_in_a_batch", "beyond_models_mb")
    ]


def _errors(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        for part, error in {**row.get("errors", {}), **row.get("speed", {}).get("errors", {})}.items():
            what = row["system"] if part == "all" else f"{row['system']}, {part}:"
            lines.append(f"- {what} does not run here: `{error}`")
    return lines


if __name__ == "__main__":
    import json

    print(peers_table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
