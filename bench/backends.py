"""How far a quantised member in llama.cpp is from its float32 weights, and from itself.

Differences: each embedded model reads three kinds of text twice, in llama.cpp from its quantised file, and in
transformers from the same file's weights, dequantised to float32. Of every scored position: the divergence
KL(float32 || quantised) in nats, whether both have the same most probable token, and the bits of the text's
own next token.

Repeatability: the demo pair in llama.cpp continues prompts of the six benchmarks greedily, each alone, and
then in other ways that would change nothing in exact arithmetic: in a batch, with the certified skip, with
its prompt read in other chunks. The same way once more is the control.

Nothing here is timed, but it takes far longer beside other work: llama.cpp's threads wait by spinning.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT, check_data, environment, percentile, speed_file, write_json
from compare_likelihood import Text, texts
from decode_parts import say

from deepen_ext.members.loading import load_member, load_members

MODELS = ("smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct")
KINDS = ("gsm8k", "code", "prose")
PAIR = MODELS[:2]
PROMPT = 96  # the last so many tokens of a prompt are read
NEW_TOKENS = 32
BATCH = 8
CHUNK = 32  # tokens of a forward, where prompts are read in other chunks
CONTROL = 5  # every so manieth prompt is continued the same way twice


def differences(data: Path, count: int, scored: int) -> dict[str, Any]:
    """By model and kind of text; so many texts of each kind, so many characters of each scored."""
    found: dict[str, Any] = {}
    for name in MODELS:
        quantised = load_member(f"demo:{name}", backend="llama.cpp")
        dense = load_member(f"demo:{name}", backend="transformers")
        of_kinds = {}
        for kind in KINDS:
            say(f"{quantised.name}, {kind}")
            positions = [
                one
                for text in texts(data, kind, count)
                for one in _compare(dense, quantised, Text(kind, text.context, text.scored[:scored]))
            ]
            nbytes = sum(len(text.scored[:scored].encode()) for text in texts(data, kind, count))
            of_kinds[kind] = _summary(positions, nbytes)
        found[quantised.name] = {"file": quantised.backend.describe().dtype, "kinds": of_kinds}
    return found


def _compare(dense: Any, quantised: Any, text: Text) -> Iterator[dict[str, float]]:
    """Each scored token: divergence, agreement, and both likelihoods in bits."""
    vocabulary = quantised.vocabulary
    before = vocabulary.prefix_ids + vocabulary.encode(text.context)
    ids = vocabulary.prefix_ids + vocabulary.encode(text.context + text.scored)
    if (
        ids[: len(before)] != before
        or dense.vocabulary.encode(text.context) != before[len(vocabulary.prefix_ids) :]
    ):
        raise RuntimeError(f"{quantised.name}: a token goes across the end of a context")
    start = len(before) - 1
    rows = zip(ids[start + 1 :], _rows(dense, ids, start), _rows(quantised, ids, start), strict=False)
    for token, exact, rounded in rows:
        p, q = (torch.log_softmax(one.double(), dim=0) for one in (exact, rounded))
        yield {
            "divergence": float((p.exp() * (p - q)).sum()),
            "same": float(p.argmax() == q.argmax()),
            "float32": -float(p[token]) / math.log(2),
            "quantised": -float(q[token]) / math.log(2),
        }


def _rows(member: Any, ids: Sequence[int], start: int) -> Iterator[torch.Tensor]:
    """The logits [V] after each position from `start` on."""
    session = member.backend.open(1, len(ids))
    try:
        for block in session.read(0, ids, start, 1):
            yield from block.scores()
    finally:
        session.close()


def _summary(positions: Sequence[dict[str, float]], nbytes: int) -> dict[str, float]:
    divergences = [one["divergence"] for one in positions]
    return {
        "positions": len(positions),
        "divergence": sum(divergences) / len(positions),
        "divergence_p99": percentile(divergences, 0.99),
        "same": sum(one["same"] for one in positions) / len(positions),
        "bits_per_byte_float32": sum(one["float32"] for one in positions) / nbytes,
        "bits_per_byte_quantised": sum(one["quantised"] for one in positions) / nbytes,
    }


def repeatability(data: Path, count: int) -> dict[str, Any]:
    """Texts of the pair, continued in several ways, beside those that are written alone."""
    from deepen_ext import Ensemble
    from deepen_ext.members.llama_cpp import session

    ensemble = Ensemble(load_members([f"demo:{name}" for name in PAIR], backend="llama.cpp"), fuser="deepen")
    prompts = _prompts(ensemble.members[0], data, count)

    def alone(some: Sequence[str], label: str, **settings: Any) -> list[list[int]]:
        say(f"{len(some)} prompts, {label}")
        return [ensemble.generate(one, max_new_tokens=NEW_TOKENS, **settings).token_ids for one in some]

    reference = alone(prompts, "alone")
    found = {"the same way once more": (reference[::CONTROL], alone(prompts[::CONTROL], "once more"))}
    say(f"{len(prompts)} prompts, in a batch of {BATCH}")
    batch = ensemble.generate(prompts, max_new_tokens=NEW_TOKENS, batch_size=BATCH)
    found[f"in a batch of {BATCH}"] = (reference, [one.token_ids for one in batch])
    found["with the certified skip"] = (reference, alone(prompts, "certified skip", certified_skip=True))
    usual = session.MOST_TOKENS
    session.MOST_TOKENS = CHUNK
    try:
        chunks = alone(prompts, f"chunks of {CHUNK} tokens")
    finally:
        session.MOST_TOKENS = usual
    found[f"prompt read in chunks of {CHUNK} tokens, not {PROMPT}"] = (reference, chunks)
    return {
        "members": ensemble.names,
        "prompts": len(prompts),
        "prompt_tokens": PROMPT,
        "new_tokens": NEW_TOKENS,
        "ways": {name: compare_texts(*pair) for name, pair in found.items()},
    }


def compare_texts(ours: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> dict[str, float]:
    """How many texts and tokens differ.

    Tokens are compared place by place, and a place that only one text has counts as different: so all that
    follows a first difference counts, as a rule. `decisions` are the tokens up to the first difference, that
    one included: what was decided after the same text.
    """
    different = places = decisions = parted = 0
    for one, other in zip(ours, others, strict=True):
        length = max(len(one), len(other))
        unlike = [at for at in range(length) if one[at : at + 1] != other[at : at + 1]]
        places += length
        different += len(unlike)
        parted += bool(unlike)
        decisions += unlike[0] + 1 if unlike else length
    return {
        "texts": len(ours),
        "texts_differ": parted,
        "tokens": places,
        "tokens_differ": different,
        "decisions": decisions,
    }


def _prompts(main: Any, data: Path, count: int) -> list[str]:
    """Ends of the six benchmarks' test prompts, in turns."""
    from deepen_ext.measure.evaluation.tasks import TASKS

    each = -(-count // len(TASKS))
    of_tasks = [task.items(data, "test", each) for task in TASKS.values()]
    prompts = []
    for items in zip(*of_tasks, strict=True):
        for item in items:
            ids = main.vocabulary.encode(item.prompt)[-PROMPT:]
            prompts.append(main.vocabulary.decode(ids, continues=True).decode(errors="ignore"))
    return prompts[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the benchmarks")
    parser.add_argument("--texts", type=int, default=2, help="of each kind")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="short texts and 12 prompts; for a try")
    parser.add_argument("--json", type=Path, help="file; default: bench/results/backends-<machine>.json")
    options = parser.parse_args()
    if options.quick and options.json is None:
        parser.error("--quick needs --json: its figures are no results")
    check_data(parser, options.data)

    from deepen_ext.members.llama_cpp.library import load_library

    found = environment()
    found["versions"]["llama.cpp"] = load_library().name
    target = options.json or ROOT / "bench" / "results" / f"backends-{speed_file(found)}"
    count, scored, prompts = (1, 150, 12) if options.quick else (options.texts, 1500, options.prompts)
    content: dict[str, Any] = {"environment": found}
    content["differences"] = differences(options.data, count, scored)
    write_json(target, content)  # an interruption loses the other part alone
    content["repeatability"] = repeatability(options.data, prompts)
    write_json(target, content)
    say(f"wrote {target}")


if __name__ == "__main__":
    main()
