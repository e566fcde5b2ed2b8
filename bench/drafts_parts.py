"""What bench/drafts.py times: the cases of each part.

A case is a dict: `name`, `tokens` (new ones of each text), and `ways`: of each kind of run its records, one
for each repetition. All ensembles have the default settings, but for what a case names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from backends import compare_texts
from compare_likelihood import texts
from decode_native import PAIR, load_native
from decode_parts import alone_in_transformers, questions_of, say, split_of, texts_of

THIRD = "qwen2.5-coder-0.5b-instruct"
GENERATE = ", transformers generate"
MAIN = "main model alone, same session"
WITHOUT, AUTO = "draft 0", "draft auto"
SAMPLED = {"do_sample": True, "temperature": 1.0, "seed": 0}
ITEMS_APART = 40  # of PIQA, between the beginnings of two texts

Record = dict[str, Any]
Ways = Mapping[str, Callable[[], Record]]
Cases = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    tokens: int = 48  # new tokens of a text
    fewer: int = 24  # of the texts of a batch, of the trio, of the larger main model
    fewest: int = 16  # of the longest batch, whose prompts take a minute
    repetitions: int = 3
    warm_up: int = 24
    questions: int = 4  # of GSM8K
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
        "tokens_a_cycle": (timings.tokens_a_text - 1) / max(timings.steps - 1, 1),
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


def pair(bench: Bench) -> Cases:
    from deepen_ext import Ensemble

    size, members = bench.size, bench.members(*PAIR)
    ensemble = bench.warm(Ensemble(members))
    context, lengths = size.contexts[0], (0, "auto")
    prompt = bench.prose(members[0])
    say("the pair, prose")
    ways = {
        **drafted(ensemble, prompt, size.tokens, (*lengths, 1, 3, 8)),
        **main_alone(ensemble, prompt, size.tokens),
        **generates(members, prompt, size.tokens),
    }
    found = in_turns(ways, size.repetitions, exact=True)
    yield {"name": f"the pair, prose, context {context}", "tokens": size.tokens, "ways": found}
    together: dict[str, list[Record]] = {}
    ensemble = bench.warm(ensemble.variant(), certified_skip=True)
    for number, question in enumerate(questions_of(members[0], bench.data, context, size.questions)):
        say(f"the pair, GSM8K {number + 1}")
        ways = {
            **drafted(ensemble, question, size.tokens, lengths, certified_skip=True),
            **main_alone(ensemble, question, size.tokens),
            **generates(members, question, size.tokens),
        }
        for name, records in in_turns(ways, 1, exact=True).items():
            together.setdefault(name, []).extend(records)
    name = f"the pair, GSM8K, context {context}, certified skip"
    yield {"name": name, "tokens": size.tokens, "ways": together}


def trio(bench: Bench) -> Cases:
    from deepen_ext import Ensemble

    size, members = bench.size, bench.members(*PAIR, THIRD)
    ensemble = bench.warm(Ensemble(members))
    prompt = bench.prose(members[0])
    say("the trio")
    ways = {
        **drafted(ensemble, prompt, size.fewer, (0, "auto")),
        **main_alone(ensemble, prompt, size.fewer),
        **generates(members, prompt, size.fewer),
    }
    found = in_turns(ways, size.repetitions, exact=True)
    yield {"name": f"the trio, prose, context {size.contexts[0]}", "tokens": size.fewer, "ways": found}


def batches(bench: Bench) -> Cases:
    yield from _batches(bench, bench.members(*PAIR), exact=True)


def native(bench: Bench) -> Cases:
    yield from _batches(bench, bench.native(), exact=False)


def _batches(bench: Bench, members: Sequence[Any], *, exact: bool) -> Cases:
    """The pair by batch and context, and sampled at the smaller context."""
    from deepen_ext import Ensemble

    size, ensemble = bench.size, Ensemble(members)
    small, large = size.contexts
    for context, sampling in ((small, False), (small, True), (large, False)):
        settings = SAMPLED if sampling else {}
        for batch in size.batches:
            if context == small:
                bench.warm(ensemble, batch, **settings)
            name = f"batch {batch}, context {context}" + (", temperature 1" if sampling else "")
            say(f"{members[0].backend.name}: {name}" if exact else f"llama.cpp: {name}")
            tokens = size.fewest if (context, batch) == (large, size.batches[-1]) else size.fewer
            prompts = bench.different_texts(members[0], context, batch)
            ways = drafted(ensemble, prompts, tokens, (0, "auto"), **settings)
            found = in_turns(ways, size.repetitions_of(batch, context), exact=exact)
            yield {"name": name, "tokens": tokens, "ways": found}


def larger(bench: Bench) -> Cases:
    """A main model that is larger than its assistants, and everyone who may draft for it."""
    from deepen_ext import Ensemble

    size, main = bench.size, bench.members(THIRD)[0]
    ensemble = Ensemble([main, *bench.native()])
    context = size.contexts[0]
    # Of runs with draft="auto" each has a history of its own: none draws on what another one found out.
    who = ("auto", "main", *ensemble.names[1:], "lookup")
    own = {one: bench.warm(ensemble.variant(), drafter=one) for one in who}
    for kind, prompt in _kinds(bench, main, context).items():
        say(f"{main.name}, {kind}")
        ways: dict[str, Callable[[], Record]] = dict(drafted(ensemble, prompt, size.fewer, (0,)))
        for drafter in who:
            lengths = ("auto",) if drafter == "auto" else ("auto", 2, 4)
            for name, way in drafted(own[drafter], prompt, size.fewer, lengths, drafter=drafter).items():
                ways[f"{name}, drafter {drafter}"] = way
        ways |= main_alone(ensemble, prompt, size.fewer) | generates([main], prompt, size.fewer)
        name = f"{kind}, context {context}"
        yield {"name": name, "tokens": size.fewer, "ways": in_turns(ways, 1, exact=False)}


def _kinds(bench: Bench, main: Any, context: int) -> dict[str, str]:
    """A text of each kind, of `context` tokens."""
    code = texts(bench.data, "code", 1)[0]
    ids = main.vocabulary.encode(code.context + code.scored)[:context]
    return {
        "prose": bench.prose(main),
        "GSM8K": questions_of(main, bench.data, context, 1)[0],
        "Python code": main.vocabulary.decode(ids).decode(errors="ignore"),
    }


def latency(bench: Bench) -> Cases:
    """When a reader gets the text: the first piece, and the times between pieces."""
    from deepen_ext import Ensemble

    size, members = bench.size, bench.members(*PAIR)
    ensemble = bench.warm(Ensemble(members))
    prompt = bench.prose(members[0])

    def way(length: Any) -> Callable[[], Record]:
        return lambda: _heard(ensemble, prompt, size.tokens, length)

    say("latency")
    found = in_turns({WITHOUT: way(0), AUTO: way("auto")}, size.repetitions, exact=True)
    yield {"name": f"the pair, prose, context {size.contexts[0]}", "tokens": size.tokens, "ways": found}


def _heard(ensemble: Any, prompt: str, tokens: int, length: Any) -> Record:
    """Milliseconds to the first piece of text, and between each two that follow each other."""
    times = [time.perf_counter()]
    done = ensemble.generate(
        prompt, max_new_tokens=tokens, draft=length, on_text=lambda _: times.append(time.perf_counter())
    )
    first, *gaps = (1e3 * (after - before) for before, after in pairwise(times))
    return {"first": first, "gaps": gaps, "ids": [done.token_ids]}


PARTS: Mapping[str, Callable[[Bench], Cases]] = {
    "pair": pair,
    "trio": trio,
    "batches": batches,
    "latency": latency,
    "native": native,
    "larger": larger,
}
