"""Decoding by two members of random weights in the shapes of 7B models, on one card.

Beside the members' own steps, as CUDA graphs, one after the other. A step of the ensemble is both forward
passes, side by side, the fusion, and the tokens' copy to the host; random weights have no text, so the
assistant reads the same token, and there is no hand-off.

Then the loop itself, with drafts and without, against the main model alone, which is timed before. The
members have a tokenizer of single bytes and write printable ASCII: two random models, and one model as both
members. On an H100 nearly every draft stood, of the two as well: few of the candidates may be written, and
the search seldom moved one past another. So both are upper lines: of a real pair fewer drafts stand.

`--results FOLDER` writes FOLDER/<gpu>-decode.json after each figure. `--device cpu --tiny` runs all of it on
a machine without a card, as a check: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from common import Figure, percentile, spread
from gpu_clock import Bench, bandwidth, file_stem, gpu_environment, line
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from deepen_ext import Ensemble, RelativeMap
from deepen_ext.fusers import DeepenFuser
from deepen_ext.members.hf.backend import HFBackend
from deepen_ext.members.hf.load import member_of
from deepen_ext.members.member import Member

CONTEXT, STEPS, WARM_UP = 256, 64, 8
TOLERATED = 1.10
OF_MAIN = 1.25  # a token by drafts, against a step of the main model alone
DRAFTS: tuple[int | Literal["auto"], ...] = (0, 3, "auto")


def shapes(tiny: bool) -> dict[str, Any]:
    """Llama 2 7B and Qwen2.5 7B, or something that any machine runs."""
    if tiny:
        small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        return {
            "tiny Llama": LlamaConfig(vocab_size=3000, **small),
            "tiny Qwen": Qwen2Config(vocab_size=4000, num_key_value_heads=2, **small),
        }
    llama = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    qwen = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    return {
        "Llama 2 7B": LlamaConfig(vocab_size=32000, num_attention_heads=32, **llama),
        "Qwen2.5 7B": Qwen2Config(vocab_size=152064, num_attention_heads=28, num_key_value_heads=4, **qwen),
    }


def _model(config: Any, device: torch.device) -> Any:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def _member(name: str, config: Any, device: torch.device) -> Member:
    model = _model(config, device)
    size: Any = SimpleNamespace(vocab_size=config.vocab_size)
    backend = HFBackend(name, model, config.vocab_size, None, device, model.dtype)
    return Member(name, backend, None, size, ())  # type: ignore[arg-type]  # no text, no tokenizer


def _times(step: Callable[[list[int]], int], length: int) -> list[float]:
    """Milliseconds of each step, graphs captured beforehand; `step` gives the token after these ids."""
    ids = [5 + i % 1000 for i in range(length)]
    taken = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        ids.append(step(ids))
        taken.append((time.perf_counter() - start) * 1e3)
    return taken[WARM_UP:]


def _alone(member: Member, capacity: int, smallest: int | None = None) -> list[float]:
    """A member's own steps; its tokens are below `smallest`."""
    with member.backend.open(1, capacity) as session:

        def step(ids: list[int]) -> int:
            return int(session.ask({0: ids}, 1).wait().scores().argmax()) % (smallest or member.vocab_size)

        return _times(step, CONTEXT)


def time_decoding(device: torch.device, keep: Callable[[Figure], None], *, tiny: bool = False) -> None:
    """The members' own steps, and the ensemble's beside them; `keep` is given each figure as it is made."""
    members = [_member(name, config, device) for name, config in shapes(tiny).items()]
    smallest = min(member.vocab_size for member in members)
    anchors = torch.arange(smallest // 2, device=device)
    maps = [RelativeMap.from_embedding(member.embedding, anchors) for member in members]
    fuser = DeepenFuser(maps, learning_rate=0.15, min_probability=1e-4)
    capacity = CONTEXT + WARM_UP + STEPS

    own = []
    for member in members:
        times = _alone(member, capacity, smallest)
        own.append(times)
        name = f"a step of {member.name} alone"
        keep(Figure(name, statistics.median(times), "ms", spread(times), len(times)))
    sessions = [member.backend.open(1, capacity) for member in members]
    fusion: list[float] = []

    def together(ids: list[int]) -> int:
        answers = [session.ask({0: ids}, 1) for session in sessions]
        logits = [answer.wait().scores() for answer in answers]
        if device.type == "cuda" and len(fusion) % 2:  # every other step waits here, to see what fusion takes
            torch.cuda.synchronize()
        start = time.perf_counter()
        step = fuser.step(logits, [0.5, 0.5])
        (token,), _ = step.read(step.chosen)
        fusion.append((time.perf_counter() - start) * 1e3)
        return token % smallest

    ours = _times(together, CONTEXT)
    for session in sessions:
        session.close()
    both = [sum(times) for times in zip(*own, strict=True)]
    ratio = statistics.median(ours) / statistics.median(both)
    names = " and ".join(member.name for member in members)
    waited = statistics.median(fusion[WARM_UP + 1 :: 2])
    keep(
        Figure(
            f"greedy decoding, {names}, random weights, batch 1, context {CONTEXT}",
            statistics.median(ours),
            "ms",
            spread(ours),
            len(ours),
            baseline="the members' own steps, as graphs, one after the other",
            baseline_value=statistics.median(both),
            ratio=ratio,
            ratio_of="ours / baseline",
            budget=f"at most {TOLERATED:.2f} times the baseline",
            met=ratio <= TOLERATED,
            p99=percentile(ours, 0.99),
            note=f"fusion and the token's copy {waited:.3f} ms, {waited / statistics.median(ours):.1%} of it",
        )
    )


def _make_sure(model: Any) -> None:
    """Let its logits lie 10 apart, as a rule.

    Members that agree leave the search no gradient but rounding, of which AdamW makes whole steps: the gaps
    between random logits are smaller than these.
    """
    head = model.get_output_embeddings().weight
    head.mul_(10 / (0.02 * math.sqrt(head.shape[1])))


def _bytes() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def time_drafts(device: torch.device, keep: Callable[[Figure], None], *, tiny: bool = False) -> None:
    """The loop against the main model alone: two random models, and one model as both members."""
    (name, config), (other, other_config) = shapes(tiny).items()
    for one in (config, other_config):
        one.eos_token_id = None  # nothing ends a text
    torch.manual_seed(0)  # how many drafts stand depends on the random weights
    main = member_of(_model(config, device), _bytes(), name)
    assistant = member_of(_model(other_config, device), _bytes(), other)
    alone = _alone(main, CONTEXT + WARM_UP + STEPS)
    pairs = {
        f"{name} and {other}, random weights": [main, assistant],
        f"{name} twice, the same weights": [main, main],
    }
    for pair, members in pairs.items():
        agrees = members[0] is members[1]
        if agrees:
            _make_sure(main.model)
        ensemble = Ensemble(members, fuser="deepen")
        for draft in DRAFTS:
            value, times, stood = _tokens(ensemble, draft)
            ratio = value / statistics.median(alone)
            budgeted = agrees and draft != 0
            keep(
                Figure(
                    f"greedy decoding by the loop, draft {draft}, {pair}, batch 1, context {CONTEXT}",
                    value,
                    "ms",
                    spread(times),
                    len(times),
                    baseline="a step of its main model alone",
                    baseline_value=statistics.median(alone),
                    ratio=ratio,
                    ratio_of="ours / baseline",
                    budget=f"at most {OF_MAIN:.2f} times the baseline" if budgeted else "",
                    met=ratio <= OF_MAIN if budgeted else None,
                    note="milliseconds a token over all cycles; in brackets of single cycles"
                    + (f"; {stood:.0%} of the drafted tokens stood" if draft else ""),
                )
            )


def _tokens(ensemble: Ensemble, draft: int | Literal["auto"]) -> tuple[float, list[float], float]:
    """Milliseconds a token, all in all and by cycle, when all is captured; the share of drafts that stood."""
    texts = map(ensemble.members[0].vocabulary.bytes_of, range(256))
    rare = [i for i, text in enumerate(texts) if not (text.isascii() and text >= b" ")]
    # As many tokens beforehand as `draft="auto"` takes to know its times.
    warm_up, prompt = 40 * WARM_UP, ("the lighthouse stood at the end of a spit " * 7)[:CONTEXT]
    most = warm_up + 8 * STEPS
    run = ensemble.start(prompt, max_new_tokens=most, draft=draft, drafter="main", suppress_tokens=rare)
    spent, tokens = [], []
    for written in run:
        if run.timings.tokens >= warm_up:
            spent.append(run.timings.step_ms[-1])
            tokens.append(len(written))
            if len(spent) == STEPS:
                break
    run.close()
    each = [ms / count for ms, count in zip(spent, tokens, strict=True)]
    return sum(spent) / sum(tokens), each, run.timings.acceptance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path, help="folder of the figures' file; without, they are printed")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.results is None:
        for timed in (time_decoding, time_drafts):
            timed(device, lambda figure: print(line(figure), flush=True), tiny=options.tiny)
        return
    if device.type != "cuda" or options.tiny:
        parser.error("figures of the CPU or of --tiny mean nothing: give no --results")
    rate = bandwidth()
    torch.cuda.empty_cache()  # what that took
    file = options.results / f"{file_stem()}-decode.json"
    bench = Bench(file, gpu_environment(rate), rate, torch.empty(0), math.inf, group="decode")
    bench.case("decoding", partial(time_decoding, device, bench.keep))
    torch.cuda.empty_cache()
    bench.case("drafts", partial(time_drafts, device, bench.keep))
    if bench.failed:
        parser.exit(1, "failed: " + "\n".join(bench.failed) + "\n")


if __name__ == "__main__":
    main()
