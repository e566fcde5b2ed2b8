"""Memory that the ensemble adds to its loaded models, as resident set.

One process: load the demo pair with transformers alone (model and tokenizer), let each generate once so that
weights are resident and threads and allocators warm, give free heap back (malloc_trim), note the resident
set. Then make the members (vocabularies included) and the ensemble of those very models, generate 64 tokens,
and note the same again, and the peak since the first note (VmHWM, reset through /proc/self/clear_refs).
Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
from pathlib import Path
from typing import Any

from common import LONG_TEXT, Figure, again_with_an_empty_cache, resident, start_of_peak, write_json

BUDGET_MB = 150


def _give_back_free_memory() -> None:
    """So that what the loading of the models left free cannot hide what the ensemble takes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(folders: list[str], new_tokens: int) -> dict[str, Any]:
    """Resident set after each stage, in MB."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import deepen_ext  # the package's own imports belong to the base as torch's and transformers' do
    from deepen_ext.members.hf.load import member_of

    stages: dict[str, float] = {}
    models = []
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        ids = tokenizer(LONG_TEXT, return_tensors="pt").input_ids[:, :256]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        models.append((Path(folder).name, tokenizer, model))
    _give_back_free_memory()
    base = start_of_peak()

    members = [member_of(model, tokenizer, name) for name, tokenizer, model in models]
    stages["after the vocabularies"] = resident() - base
    ensemble = deepen_ext.Ensemble(members)
    stages["after the ensemble was made"] = resident() - base
    ids = members[0].vocabulary.encode(LONG_TEXT)[:256]
    generation = ensemble.generate(members[0].vocabulary.decode(ids).decode(), max_new_tokens=new_tokens)
    stages["after generating, free memory kept"] = resident() - base
    _give_back_free_memory()
    stages["after generating"] = resident() - base
    stages["peak"] = resident("VmHWM") - base
    return {
        "base": base,
        "stages": stages,
        "new_tokens": generation.timings.tokens,
    }


def figures(found: dict[str, Any]) -> list[Figure]:
    """The raw measurements as figures."""
    made = []
    for stage in ("after generating", "peak"):
        value = found["stages"][stage]
        made.append(
            Figure(
                name="memory beyond the loaded models, "
                + ("peak" if stage == "peak" else "after a generation"),
                value=value,
                unit="MB",
                spread=(value, value),
                repetitions=1,
                baseline="resident set with both models loaded and warm",
                baseline_value=found["base"],
                budget=f"at most {BUDGET_MB} MB",
                met=value <= BUDGET_MB,
                note=f"resident set, empty cache folder; {found['new_tokens']} tokens after a prompt of 256",
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--members", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.members is None:
        from deepen_ext.members.hf.gguf_conversion import convert_embedded

        names = ("smollm2-135m-instruct", "gemma-3-270m")
        again_with_an_empty_cache([convert_embedded(name, print) for name in names])
    found = measure(options.members, options.new_tokens)
    print(f"resident set with both models loaded and warm: {found['base']:.0f} MB; beyond it, in MB:")
    for stage, value in found["stages"].items():
        print(f"  {stage:40} {value:8.1f}")
    if options.json is not None:
        write_json(options.json, {"figures": [figure.as_dict() for figure in figures(found)], "raw": found})


if __name__ == "__main__":
    main()
