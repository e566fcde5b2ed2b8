"""What drafts are worth: an ensemble with and without them, beside its members alone.

    python bench/drafts.py                    everything: some 20 minutes on two cores
    python bench/drafts.py --part pair        one part; the file keeps the others of this commit

Parts: `pair` and `trio` (one text, beside transformers' `generate` and the main model alone; where a token's
time goes), `batches` (1, 4, 16 texts, sampled too), `latency` (first piece of text, times between pieces),
all in transformers, float32; `native` (these batches in llama.cpp, but for 16 texts of 1,024 tokens);
`larger` (a main model in transformers that is larger than its assistants in llama.cpp, with each of them
drafting).

All kinds of run of a case take turns within a repetition, each repetition from another one on; before any
figure is made, float32 members must have written the same token ids with every draft. Each ensemble first
writes a text that is not timed, with drafts: what its runs observe of the members' speed is there then. Times
a token leave out the step that reads the prompt. The machine has to be idle: threads that wait by spinning
make the times of a busy one worthless.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from common import ROOT, check_data, environment, speed_file, write_json
from decode_parts import say
from drafts_figures import figures
from drafts_parts import PARTS
from drafts_runs import QUICK, Bench, Size


def identity(result: dict[str, Any]) -> tuple[Any, ...]:
    """What has to be the same where parts of several runs stand in one file."""
    machine = result["machine"]
    own = (result["commit"], result["quick"], result["threads"])
    return *own, *(machine[one] for one in ("cpu", "cores", "isa")), result["versions"]


def kept(target: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What the file has of earlier parts of this commit, by as many threads."""
    if not target.is_file():
        return {}
    old = json.loads(target.read_text(encoding="utf-8"))
    if identity(old) != identity(found):
        say(f"{target}: its figures go; it is of {identity(old)}, this run of {identity(found)}")
        return {}
    found["dirty"] = found["dirty"] or old["dirty"]
    return dict(old["raw"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", help="default: all of them")
    parser.add_argument("--tokens", type=int, default=Size.tokens, help="new ones of a text")
    parser.add_argument("--repetitions", type=int, default=Size.repetitions)
    parser.add_argument("--quick", action="store_true", help="a few tokens, once; for a try")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the benchmarks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a forward pass")
    parser.add_argument("--json", type=Path, help="file; default: bench/results/<machine>-drafts.json")
    options = parser.parse_args()
    if options.quick and options.json is None:
        parser.error("--quick needs --json: its figures are no results")
    check_data(parser, options.data)

    from deepen_ext.members.llama_cpp.library import load_library

    found = environment()
    found["versions"]["llama.cpp"] = load_library().name
    found |= {"kind": "drafts", "quick": options.quick, "threads": options.threads}
    if found["machine"]["load_average"] > 0.5:
        say("other programs are running: these times are worthless where they go on")
    if options.threads < (os.cpu_count() or 1):
        say(f"{options.threads} of {os.cpu_count()} processors are used; see OMP_NUM_THREADS and --threads")
    target = options.json or ROOT / "bench" / "results" / f"{Path(speed_file(found)).stem}-drafts.json"
    raw = kept(target, found)
    size = QUICK if options.quick else Size(tokens=options.tokens, repetitions=options.repetitions)
    bench = Bench(size, options.data, options.threads)
    for part in options.part or PARTS:
        cases: list[dict[str, Any]] = []
        for case in PARTS[part](bench):
            cases.append(case)
            raw = {name: cases if name == part else raw[name] for name in PARTS if name in {*raw, part}}
            write_json(target, {**found, "figures": figures(raw), "raw": raw})
    for part, made in figures(raw).items():
        print(part)
        for one in made:
            ratio = f"{one['ratio']:8.2f} x" if "ratio" in one else ""
            verdict = {None: "", True: "met", False: "missed"}[one.get("met")]
            print(f"  {one['name']:76} {one['value']:9.2f} {one['unit']:12} {ratio} {verdict}")
    say(f"wrote {target}")


if __name__ == "__main__":
    main()
