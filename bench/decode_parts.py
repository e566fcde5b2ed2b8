"""What the decode benchmarks share: texts of a length, transformers' own speed, the search of an ensemble,
where a token's time goes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import LONG_TEXT

from deepen_ext.measure.evaluation.tasks import TASKS

FORWARD = "forward of "


def say(stage: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {stage}", flush=True)


def texts_of(main: Any, context: int, count: int) -> list[str]:
    """Texts of so many tokens of the main model, each from another word on."""
    words = (LONG_TEXT + " ").split(" ") * 8
    texts = []
    for row in range(count):
        ids = main.vocabulary.encode(" ".join(words[5 * row :]))
        texts.append(main.vocabulary.decode(ids[:context]).decode(errors="ignore"))
    return texts


def questions_of(main: Any, data: Path, context: int, count: int) -> list[str]:
    """GSM8K as the paper asks it, the last `context` tokens of examples and question."""
    texts = []
    for item in TASKS["gsm8k"].items(data, "dev")[:count]:
        ids = main.vocabulary.encode(item.prompt)[-context:]
        texts.append(main.vocabulary.decode(ids, continues=True).decode(errors="ignore"))
    return texts


def alone_in_transformers(member: Any, prompt: str, new_tokens: int) -> float:
    """Milliseconds a token of transformers' greedy `generate`, from the first new token to the last."""
    import torch
    from transformers import GenerationConfig

    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    ids = torch.tensor([member.vocabulary.prefix_ids + member.vocabulary.encode(prompt)])
    # Without EOS it never stops early.
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    kept = member.model.generation_config
    member.model.generation_config = settings
    try:
        member.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock
        )
    finally:
        member.model.generation_config = kept
    tokens = clock.times[1:]  # the first call shows the prompt
    if len(tokens) != new_tokens:
        raise RuntimeError(f"{member.name}: {len(tokens)} tokens came instead of {new_tokens}")
    return 1e3 * (tokens[-1] - tokens[0]) / (new_tokens - 1)


def search_of(ensemble: Any) -> Any:
    """The same members by the search with equal weights: what the certified skip is for."""
    return ensemble.variant(fuser="deepen", weights=None)


def split_of(timings: Any) -> dict[str, float]:
    """Milliseconds a token of each text, by stage; of one text, or of a batch without drafts."""
    tokens = timings.later_tokens
    members = {f"{FORWARD}{name}": value / tokens for name, value in timings.members_ms.items()}
    split = {
        **members,
        "fusion": timings.fusion_ms / tokens,
        "hand-off": timings.handoff_ms / tokens,
        "sampling": timings.sampling_ms / tokens,
    }
    total = timings.ms_per_token
    return {**split, "everything else": total - sum(split.values()), "total": total}


def not_asked(runs: Sequence[Mapping[str, Any]]) -> str:
    """For a figure's note, from the splits of its runs: who had no say, so that only its prompt was read."""
    names = [stage.removeprefix(FORWARD) for stage in runs[0] if stage.startswith(FORWARD)]
    silent = [name for name in names if not any(one[FORWARD + name] for one in runs)]
    return f"; no say, so not asked after the prompt: {', '.join(silent)}" if silent else ""
