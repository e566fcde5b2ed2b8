"""A running server beside the same model in this process: what is found at start, distributions, texts.

    python bench/server_agrees.py http://localhost:8000 --model demo:smollm2-135m-instruct

The model is also the server's tokenizer. Compared are the most probable tokens after the last ids of each
prompt, one position and four in a request, the same prompts read through, and the texts of an ensemble in
which the server is the assistant, with drafts and without.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import PROMPTS, environment, write_json

from deepen_ext import Ensemble
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member


def difference(ours: Distribution, theirs: Distribution) -> float:
    """The largest difference of a probability, of the tokens that both name and of the tails."""
    found = float((ours.topk.tail - theirs.topk.tail).abs().max())
    for row in range(len(ours)):
        known = dict(zip(ours.topk.ids[row].tolist(), ours.topk.probs[row].tolist(), strict=True))
        pairs = zip(theirs.topk.ids[row].tolist(), theirs.topk.probs[row].tolist(), strict=True)
        found = max([found, *(abs(known[token] - prob) for token, prob in pairs if token in known)])
    return found


def distributions(served: Member, local: Member, k: int) -> dict[str, float]:
    """The largest differences over all prompts, by how the server was asked."""
    found = {"one position": 0.0, "four positions": 0.0, "read through": 0.0}
    for prompt in PROMPTS:
        ids = local.vocabulary.prefix_ids + local.vocabulary.encode(prompt)
        theirs, ours = served.backend.open(), local.backend.open()
        for name, positions in (("one position", 1), ("four positions", 4)):
            said = [one.ask({0: ids}, k, positions).wait() for one in (ours, theirs)]
            found[name] = max(found[name], difference(said[0], said[1]))
        read = [[row for block in one.read(0, ids, 2, k) for row in rows(block)] for one in (ours, theirs)]
        each = (difference(a, b) for a, b in zip(*read, strict=True))
        found["read through"] = max(found["read through"], *each)
        theirs.close()
        ours.close()
    return found


def rows(block: Distribution) -> list[Distribution]:
    """The positions of a block, each by itself; kept, because a session's next block overwrites it."""
    return [block.at([row]).clone() for row in range(len(block))]


def same_texts(main_model: Member, served: Member, local: Member, tokens: int, draft: int) -> str:
    """How many prompts' texts are the same with the server and without."""
    with_server, without = (Ensemble([main_model, one], fuser="deepen") for one in (served, local))
    options: dict[str, Any] = {"max_new_tokens": tokens, "draft": draft}
    same = sum(
        with_server.generate(one, **options).token_ids == without.generate(one, **options).token_ids
        for one in PROMPTS
    )
    return f"{same} of {len(PROMPTS)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("address", help="http://host:port")
    parser.add_argument("--model", required=True, help="the server's model, as a name to load it here")
    parser.add_argument("--backend", default="transformers", help="of the model here")
    parser.add_argument("--main-model", default="demo:qwen2.5-coder-0.5b-instruct", help="of the ensemble")
    parser.add_argument("--tokens", type=int, default=24, help="new ones of a text")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write it here")
    options = parser.parse_args()
    served = load_member(options.address, tokenizer=options.model)
    local = load_member(options.model, backend=options.backend)
    main_model = load_member(options.main_model, backend="transformers")
    description = served.backend.describe()
    for one in description.findings:
        print(f"{'ok  ' if one.good else 'note'} {one.name}: {one.text}")
    found: dict[str, Any] = {
        "server": description.backend,
        "largest difference of a probability": distributions(served, local, options.k),
        "same texts": {
            f"draft {draft}": same_texts(main_model, served, local, options.tokens, draft) for draft in (0, 4)
        },
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.json is not None:
        write_json(options.json, found | {"environment": environment()})


if __name__ == "__main__":
    main()
