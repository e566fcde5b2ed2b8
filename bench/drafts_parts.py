"""What bench/drafts.py times: the cases of each part.

A case is a dict: `name`, `tokens` (new ones of each text), and `ways`: of each kind of run its records, one
for each repetition. All ensembles have the default settings, but for what a case names. Three members are
timed by the search, in which every one of them has a say in every text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from compare_likelihood import texts
from decode_native import PAIR
from decode_parts import questions_of, say, search_of
from drafts_runs import AUTO, WITHOUT, Bench, Record, drafted, generates, in_turns, main_alone

THIRD = "qwen2.5-coder-0.5b-instruct"
SAMPLED = {"do_sample": True, "temperature": 1.0, "seed": 0}

Cases = Iterator[dict[str, Any]]


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
    ensemble = bench.warm(search_of(ensemble), certified_skip=True)
    for number, question in enumerate(questions_of(members[0], bench.data, context, size.questions)):
        say(f"the pair, GSM8K {number + 1}")
        ways = {
            **drafted(ensemble, question, size.tokens, lengths, certified_skip=True),
            **main_alone(ensemble, question, size.tokens),
            **generates(members, question, size.tokens),
        }
        for name, records in in_turns(ways, 1, exact=True).items():
            together.setdefault(name, []).extend(records)
    name = f"the pair, GSM8K, context {context}, fuser deepen, certified skip"
    yield {"name": name, "tokens": size.tokens, "ways": together}


def trio(bench: Bench) -> Cases:
    from deepen_ext import Ensemble

    size, members = bench.size, bench.members(*PAIR, THIRD)
    ensemble = bench.warm(search_of(Ensemble(members)))
    prompt = bench.prose(members[0])
    say("the trio")
    ways = {
        **drafted(ensemble, prompt, size.fewer, (0, "auto")),
        **main_alone(ensemble, prompt, size.fewer),
        **generates(members, prompt, size.fewer),
    }
    found = in_turns(ways, size.repetitions, exact=True)
    yield {
        "name": f"the trio, prose, context {size.contexts[0]}, fuser deepen",
        "tokens": size.fewer,
        "ways": found,
    }


def batches(bench: Bench) -> Cases:
    yield from _batches(bench, bench.members(*PAIR), exact=True)


def native(bench: Bench) -> Cases:
    yield from _batches(bench, bench.native(), exact=False)


def _batches(bench: Bench, members: Sequence[Any], *, exact: bool) -> Cases:
    """The pair by batch and context, and sampled at the smaller context; `exact` in transformers."""
    from deepen_ext import Ensemble

    size, ensemble = bench.size, Ensemble(members)
    small, large = size.contexts
    for context, sampling in ((small, False), (small, True), (large, False)):
        settings = SAMPLED if sampling else {}
        for batch in size.batches:
            longest = (context, batch) == (large, size.batches[-1])
            if longest and not exact:
                continue  # in llama.cpp its prompts take three minutes
            if context == small:
                bench.warm(ensemble, batch, **settings)
            name = f"batch {batch}, context {context}" + (", temperature 1" if sampling else "")
            say(f"{ensemble.backends[0]}: {name}")
            tokens = size.fewest if longest else size.fewer
            prompts = bench.different_texts(members[0], context, batch)
            ways = drafted(ensemble, prompts, tokens, (0, "auto"), **settings)
            found = in_turns(ways, size.repetitions_of(batch, context), exact=exact)
            yield {"name": name, "tokens": tokens, "ways": found}


def larger(bench: Bench) -> Cases:
    """A main model that is larger than its assistants, and everyone who may draft for it."""
    from deepen_ext import Ensemble

    size, main = bench.size, bench.members(THIRD)[0]
    ensemble = search_of(Ensemble([main, *bench.native()]))
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
