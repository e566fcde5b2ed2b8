"""starrYYxuan/UniTE beside us, by its own functions: see `bench/peers.py`.

Its script `unite2.py` decodes by `ensemble_decoding`, which reads models, tokenizers and data from the
script's globals; here they are set from outside. See `CHANGES` for what is not as the script has it.

Its distribution is one over some twenty tokens. Any other token has probability 0, and a text with such a
token has no likelihood: what is measured on given texts is the share of tokens that have a probability.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from boundary import Reading
from common import PROMPTS
from compare_setup import letters_of, load
from peers_setup import Job, Memory, Row, attempt, questions, speed, texts
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from deepen_ext.members.hf.gguf_conversion import convert_embedded

SYSTEM = "UniTE"
CHANGES = [
    "seaborn and matplotlib, which the script imports and does not use, are empty modules",
    "models are float32 with torch's own attention (the script: float16 with flash_attention_2, CUDA)",
    "Gemma is named llama2 to update_vocab, its branch for SentencePiece (the script names models by hand)",
]
TOP = 10  # the script's


@torch.inference_mode()
def measure(job: Job) -> list[Row]:
    """One row."""
    assert job.checkout is not None
    sys.path.insert(0, str(job.checkout))
    for name in ("seaborn", "matplotlib", "matplotlib.pyplot"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["matplotlib"].pyplot = sys.modules["matplotlib.pyplot"]  # type: ignore[attr-defined]
    import unite2
    from accelerate import Accelerator

    row: Row = {"system": SYSTEM, "name": "union of top 10"}
    unite2.accelerator = Accelerator()
    for number, name in enumerate(job.models, 1):
        folder = convert_embedded(name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model(**tokenizer(PROMPTS[0], return_tensors="pt"))
        for what, value in {
            "tokenizer": tokenizer,
            "model": model,
            "device": model.device,
            "generation_config": _generation(tokenizer),
        }.items():
            setattr(unite2, f"{what}{number}", value)
    named = ["llama2" if letter == "G" else "" for letter in letters_of(job.pair)]
    theirs = unite2.update_vocab

    def update_vocab(tops: Any, union: Any, tokenizer: Any, logits: Any, name: str) -> Any:
        own = named[0 if tokenizer is unite2.tokenizer1 else 1]
        return theirs(tops, union, tokenizer, logits, own or name)

    unite2.update_vocab = update_vocab
    memory = Memory()

    def write(prompts: list[str]) -> float:
        decode(unite2, [(prompts, [""] * len(prompts))], job.tokens)
        return job.tokens

    attempt(row, "speed", lambda: speed(job, write, memory))
    attempt(row, "letters", lambda: _letters(job, unite2))
    attempt(row, "texts", lambda: _texts(job, unite2))
    return [row]


def _generation(tokenizer: Any) -> GenerationConfig:
    """As the script has it."""
    return GenerationConfig(
        num_beams=1,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        max_new_tokens=1,
        output_hidden_states=True,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=True,
    )


def decode(unite2: Any, batches: Sequence[tuple[list[str], list[str]]], tokens: int) -> list[dict[str, str]]:
    """What its loop writes for batches of (prompts, right answers): a record for each prompt."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "written.jsonl")
        unite2.args = SimpleNamespace(output_file=str(output), max_new_tokens=tokens)
        unite2.ds_loader = batches
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            unite2.ensemble_decoding("arc")
        return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]


def _letters(job: Job, unite2: Any) -> dict[str, list[int]]:
    """Its own way of asking ARC-Challenge: one token, which has to be the letter."""
    asked = questions(job)[: job.letters]
    batches = [unite2.arc_collate_fn([one.fields]) for one in asked]
    prompts = [prompt for batch, _ in batches for prompt in batch]
    assert prompts == [one.letters_prompt for one in asked], "UniTE's prompt is another one than ours"
    found = decode(unite2, batches, tokens=1)
    pairs = zip(found, asked, strict=True)
    return {"right": [int(one["pred"].strip() == "ABCD"[question.gold]) for one, question in pairs]}


def _texts(job: Job, unite2: Any) -> list[dict[str, Any]]:
    """Of given texts: how many tokens its distribution has, and how many of them on top."""
    members = load([job.pair])
    main, assistant = (members[letter] for letter in letters_of(job.pair))
    found = []
    for text in texts(job):
        whole = text.context + text.scored
        first, second = Reading(main, whole), Reading(assistant, whole)
        begin = len(main.vocabulary.prefix_ids + main.vocabulary.encode(text.context))
        tokens = range(begin, len(first.ids))
        has = top = 0
        for place in reversed(tokens):  # the longest first, as `Reading.after` wants them
            so_far = main.vocabulary.decode(first.ids[:place]).decode(errors="replace")
            ids = assistant.vocabulary.prefix_ids + assistant.vocabulary.encode(so_far)
            share, best = _step(unite2, first.logits[place - 1 : place], second.after(ids), first.ids[place])
            has += share > 0
            top += best == first.ids[place]
        found.append(
            {
                "kind": text.kind,
                "bytes": len(text.scored.encode()),
                "tokens": len(tokens),
                "tokens_with_probability": has,
                "right_tokens": top,
            }
        )
    return found


def _step(unite2: Any, one: torch.Tensor, other: torch.Tensor, token: int) -> tuple[float, int]:
    """One step of its loop on logits [1, V] of both: a main token's probability, and the token it chooses."""
    tops = []
    for logits, tokenizer in ((one, unite2.tokenizer1), (other, unite2.tokenizer2)):
        tops.append(unite2.get_top_k_tokens(SimpleNamespace(logits=[logits]), tokenizer, TOP))
    union = unite2.get_union_vocab(*tops)
    ours = unite2.update_vocab(tops[0], union, unite2.tokenizer1, one, "qwen2")
    theirs = unite2.update_vocab(tops[1], union, unite2.tokenizer2, other, "llama3")
    _, average, chosen, _ = unite2.average_and_sample(ours, theirs, 0.5, unite2.tokenizer1)
    share = sum(float(probability) for probability, number in average[0].values() if number == token)
    return share, chosen[0]
