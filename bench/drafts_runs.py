"""The kinds of run that bench/drafts.py compares, each a function that gives a record; and their turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends import compare_texts
from compare_likelihood import texts
from decode_native import PAIR, load_native
from decode_parts import alone_in_transformers, split_of, texts_of

GENERATE = ", transformers generate"
MAIN = "main model alone, same session"
WITHOUT, AUTO = "draft 0", "draft auto"
ITEMS_APART = 40  # of PIQA, between the beginnings of two texts

Record = dict[str, Any]
Ways = Mapping[str, Callable[[], Record]]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    tokens: int = 48  # new tokens of a text
    fewer: int = 24  # of the texts of a batch, of the trio, of the larger main model
    fewest: int = 16  # of the longest batch, whose prompts take a minute
    repetitions: int = 3
    warm_up: int = 24
    questions: int = 3  # of GSM8K
    contexts: tuple[int, int] = (256, 1024)
    batches: tuple[int, ...] = (1, 4, 16)

    def repetitions_of(self, batch: int, context: int) -> int:
        """Of a batch: the more its prompts cost, the fewer."""
        return max(1, self.repetitions - self.batches.index(batch) - self.contexts.index(context))


QUICK = Size(4, 4, 4, 1, 4, 1, (48, 96), (1, 2, 3))


@dataclass
class Bench:
    """Sizes, data, and the members, each loaded when a part first asks for it."""

    size: Size
    data: Path
    threads: int
    _loaded: dict[str, Any] = field(default_factory=dict)

    def members(self, *names: str) -> list[Any]:
        """Embedded models as members in transformers, float32."""
        from deepen_ext.members.loading import load_member

        for name in names:
            if name not in self._loaded:
                one = load_member(f"demo:{name}", backend="transformers", threads=self.threads)
                alone_in_transformers(one, "Once upon a time", 4)  # warm
                self._loaded[name] = one
        return [self._loaded[name] for name in names]

    def native(self) -> list[Any]:
        """The demo pair from its quantised files, in llama.cpp."""
        if "native" not in self._loaded:
            self._loaded["native"] = load_native(PAIR, self.threads)
        return list(self._loaded["native"])

    def warm(self, ensemble: Any, lanes: int = 1, **settings: Any) -> Any:
        """The ensemble, after it has written a first text: what its runs observe of drafts is there then."""
        prompts = texts_of(ensemble.members[0], self.size.contexts[0] // lanes, 8 + lanes)[-lanes:]
        ensemble.generate(prompts, max_new_tokens=self.size.warm_up, **{"draft": "auto", **settings})
        return ensemble

    def prose(self, main: Any) -> str:
        return texts_of(main, self.size.contexts[0], 1)[0]

    def different_texts(self, main: Any, context: int, count: int) -> list[str]:
        """Texts of `context` tokens in which nothing comes twice: prompt lookup would live on that."""
        passages = (one.context + one.scored for one in texts(self.data, "prose", 10**6))
        lines = [line for passage in passages for line in passage.splitlines(keepends=True)]
        found = []
        for row in range(count):
            ids = main.vocabulary.encode("".join(lines[ITEMS_APART * row :][: context // 4]))
            if len(ids) < context:
                raise SystemExit(f"{self.data} has too little text for {count} prompts of {context} tokens")
            found.append(main.vocabulary.decode(ids[:context]).decode(errors="ignore"))
        return found


def run(ensemble: Any, prompts: Any, tokens: int, **settings: Any) -> Record:
    """One generation: milliseconds a token of each text, and what became of its drafts."""
    done = ensemble.generate(prompts, max_new_tokens=tokens, **settings)
    timings = done.timings
    return {
        "ms": 1e3 * timings.rows / timings.tokens_per_second,
        "prompt": timings.prompt_ms,
        "split": split_of(timings),
        "texts": timings.rows,
        "tokens": timings.tokens,
        "cycles": timings.steps,
        "tokens_a_cycle": (timings.tokens - timings.rows) / max(sum(timings.step_texts[1:]), 1),
        "drafted": timings.drafted,
        "stood": timings.stood,
        "skipped": timings.skipped_share,
        "ids": [done.token_ids] if isinstance(prompts, str) else [one.token_ids for one in done],
    }


def generates(members: Sequence[Any], prompt: str, tokens: int) -> Ways:
    """Each member alone by transformers' greedy `generate`, the main model first."""

    def way(member: Any) -> Callable[[], Record]:
        return lambda: {"ms": alone_in_transformers(member, prompt, tokens)}

    return {f"{member.name}{GENERATE}": way(member) for member in members}


def drafted(ensemble: Any, prompts: Any, tokens: int, lengths: Sequence[Any], **settings: Any) -> Ways:
    """The ensemble with drafts of these lengths."""

    def way(length: Any) -> Callable[[], Record]:
        return lambda: run(ensemble, prompts, tokens, draft=length, **settings)

    return {f"draft {length}": way(length) for length in lengths}


def main_alone(ensemble: Any, prompts: Any, tokens: int) -> Ways:
    """The ensemble's main model by the same loop and session."""
    single = ensemble.variant(fuser="single", weights=None)

    def way() -> Record:
        record = run(single, prompts, tokens, draft=0)
        del record["ids"]  # another text
        return record

    return {MAIN: way}


def in_turns(ways: Ways, repetitions: int, *, exact: bool) -> dict[str, list[Record]]:
    """Run all of them in each repetition, each time from another one on.

    With `exact` the texts have to be the same, token for token; else the tokens that differ are counted.
    """
    found: dict[str, list[Record]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(repetitions):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(ways[name]())
        _compare_last(found, exact)
    return found


def _compare_last(found: Mapping[str, list[Record]], exact: bool) -> None:
    written = {name: records[-1].pop("ids") for name, records in found.items() if "ids" in records[-1]}
    reference = next(iter(written.values()), None)
    for name, ids in written.items():
        differ = compare_texts(ids, reference)["tokens_differ"]
        if exact and differ:
            raise RuntimeError(f"{name}: {differ} tokens are not those of {next(iter(written))}")
        found[name][-1]["differ"] = differ
