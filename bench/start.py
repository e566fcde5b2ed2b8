"""How long `make demo` takes to its first token, and its memory, in llama.cpp and in transformers.

Three questions, each answered in fresh processes, the backends in turns:

- the command that `make demo` runs: seconds until standard output has the first text, and the peak of its
  resident set (mapped files included), as the system counts it;
- where these seconds go: imports, loading, first token;
- the very first start: once for each backend, with nothing in the cache but the GGUF files, so that
  tokenizers are read from them, and for transformers the weights are converted.

The files are in the system's page cache, as after a first start.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, environment, resident, speed_file, write_json

BACKENDS = ("llama.cpp", "transformers")
PROMPT, NEW_TOKENS = "The three primary colours are", 32  # the Makefile's
COMMAND = "from deepen_ext.commands.cli import main; main()"


def command(backend: str, assets: Path | None = None) -> dict[str, float]:
    """Seconds to the first text and to the end, and megabytes at the peak, of the demo's command."""
    arguments = ["generate", "--demo", "--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS)]
    environ = dict(os.environ) if assets is None else {**os.environ, "HF_ASSETS_CACHE": str(assets)}
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments, "--backend", backend],
            stdout=subprocess.PIPE,
            stderr=said,
            cwd=ROOT,
            env=environ,
            bufsize=0,
        )
        assert child.stdout is not None
        first = child.stdout.read(1)
        seconds = time.perf_counter() - start
        rest = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        whole = time.perf_counter() - start
        if child.returncode != 0 or not (first + rest).strip():
            said.seek(0)
            raise RuntimeError(f"the demo failed in {backend}: {said.read().decode(errors='replace')}")
    return {"first_token": seconds, "end": whole, "peak": usage.ru_maxrss * 1024 / 1e6}


def stages(backend: str) -> dict[str, float]:
    """`measure_stages` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--stages", backend, "--since", str(time.time())],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        check=True,
    )
    return dict(json.loads(done.stdout))


def measure_stages(backend: str, since: float) -> dict[str, float]:
    """Seconds of each stage on the way to the first token, and megabytes at the peak up to there."""
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.members.from_text import DEMO_PAIR
    from deepen_ext.members.registry import backend_module

    backend_module(backend)
    imported = time.time()
    ensemble = Ensemble.from_pretrained(DEMO_PAIR, backend=backend)
    loaded = time.time()
    shown: list[float] = []
    ensemble.generate(PROMPT, max_new_tokens=NEW_TOKENS, on_text=lambda _: shown.append(time.time()))
    return {
        "imports": imported - since,
        "loading": loaded - imported,
        "first token": shown[0] - loaded,
        "peak": resident("VmHWM"),
    }


def very_first(backend: str) -> dict[str, float]:
    """The command with a cache that has the demo's GGUF files alone."""
    from deepen_ext.members.embedded import gguf_file

    with tempfile.TemporaryDirectory(prefix="deepen-ext-start-") as folder:
        kept = Path(folder) / "deepen_ext"
        kept.mkdir()
        (kept / "gguf").symlink_to(gguf_file("smollm2-135m-instruct").parent.parent)
        return command(backend, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--without-first", action="store_true", help="leave out the very first start")
    parser.add_argument("--json", type=Path, help="file; default: bench/results/start-<machine>.json")
    parser.add_argument("--stages", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stages is not None:
        print(json.dumps(measure_stages(options.stages, options.since)))
        return
    from deepen_ext.members.llama_cpp.library import load_library

    found = environment()
    found["versions"]["llama.cpp"] = load_library().name
    target = options.json or ROOT / "bench" / "results" / f"start-{speed_file(found)}"
    raw: dict[str, Any] = {backend: {"command": [], "stages": []} for backend in BACKENDS}
    for backend in BACKENDS:
        command(backend)  # files into the page cache, and what the cache folder may lack
    for _ in range(options.runs):
        for backend in BACKENDS:
            raw[backend]["command"].append(command(backend))
            raw[backend]["stages"].append(stages(backend))
            write_json(target, {"start": raw, "environment": found})
    for backend in BACKENDS:
        if not options.without_first:
            raw[backend]["very first"] = very_first(backend)
        for what in ("command", "stages"):
            runs = raw[backend][what]
            medians = {key: round(statistics.median(one[key] for one in runs), 2) for key in runs[0]}
            print(f"{backend}, {what}: {medians}")
    write_json(target, {"start": raw, "environment": found})
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
