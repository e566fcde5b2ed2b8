"""Members of few bits beside float32: text, likelihood, milliseconds a token, memory.

Each model is loaded in every way by a process of its own, so that its memory is its own. A step is one token
after the same 256 tokens; the likelihood is that of the doctor's text, which no model has read before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from common import (
    LONG_TEXT,
    ROOT,
    environment,
    resident,
    speed_file,
    spread,
    start_of_peak,
    write_json,
)

MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
WAYS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8 in bfloat16": {"quantization": "int8", "dtype": "bfloat16"},
    "int4": {"quantization": "int4"},
}
PROMPT = "The capital of France is"
WRITTEN = 16
CONTEXT = 256


def measure(model: str, way: str, steps: int) -> dict[str, Any]:
    """The figures of one model, loaded one way."""
    from deepen_ext.measure.doctor.sample_text import SAMPLE_TEXT
    from deepen_ext.measure.likelihood.text_reading import TextReading
    from deepen_ext.members.hf.gguf_conversion import convert_embedded
    from deepen_ext.members.loading import load_member

    folder = convert_embedded(model)
    before = start_of_peak()
    began = time.perf_counter()
    member = load_member(folder, **WAYS[way])
    loaded = time.perf_counter() - began
    peak_of_loading = resident("VmHWM") - before
    vocabulary = member.vocabulary
    start_of_peak()

    prompt = vocabulary.prefix_ids + vocabulary.encode(PROMPT)
    ids = list(prompt)
    session = member.backend.open(1, CONTEXT)
    for _ in range(WRITTEN):
        ids.append(int(session.ask({0: ids}, 1).wait().scores()[0].argmax()))
    text = member.tokenizer.decode(ids[len(prompt) :])

    reading = TextReading([member], "", SAMPLE_TEXT)
    bits = reading.member(member).bits_per_byte
    reading.close()

    context = (vocabulary.prefix_ids + vocabulary.encode(LONG_TEXT))[:CONTEXT]
    times, processor = [], []
    for step in range(steps + 2):
        session.ask({0: context}, 1).wait().scores()
        start, used = time.perf_counter(), time.process_time()
        session.ask({0: [*context, ids[-1]]}, 1).wait().scores()
        if step >= 2:
            times.append(1e3 * (time.perf_counter() - start))
            processor.append(1e3 * (time.process_time() - used))
    found = member.backend.describe()
    return {
        "model": member.name,
        "way": way,
        "text": text,
        "bits_per_byte": round(bits, 4),
        "ms_per_token": round(statistics.median(times), 1),
        "cpu_ms_per_token": round(statistics.median(processor), 1),  # of all cores, whatever else runs
        "spread": [round(one, 1) for one in spread(times)],
        "steps": len(times),
        "weights_mb": round((found.weights_bytes or 0) / 1e6, 1),
        "load_seconds": round(loaded, 2),
        "peak_mb_of_loading": round(peak_of_loading, 1),
        "peak_mb_of_running": round(resident("VmHWM") - before, 1),
        "repeatable": member.backend.capabilities.repeatable,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "quantised_members")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.steps)))
        return
    found = environment()
    target = options.results / speed_file(found)
    figures = []
    for model in MODELS:
        for way in WAYS:
            command = [sys.executable, __file__, "--steps", str(options.steps), "--one", model, way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(figures[-1], ensure_ascii=False), flush=True)
            write_json(target, {**found, "prompt": PROMPT, "context": CONTEXT, "figures": figures})
    print(f"wrote {target}")


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    main()
