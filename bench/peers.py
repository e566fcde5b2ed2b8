"""Peers measured, not only cited: their own code beside ours, on the same models, texts and questions.

    python bench/peers.py --data ../shared/data --byte-sampler PATH --unite PATH

The paths are checkouts of SewoongLab/byte-sampler and starrYYxuan/UniTE; nothing of them is copied, and what
is not as they have it is in the results (`changes`). byte-sampler needs three more packages; put them where
they touch nothing else: `pip install --no-deps --target DIR ahocorasick-rs pysimdjson pyicu-wheels`, and set
PYTHONPATH=DIR.

On each pair, in one process for each program:

- bits a byte of dev texts (GSM8K, ARC-Challenge, Python code), under teacher forcing;
- questions of ARC-Challenge's dev split, by the likelihood of the choices after "Question: ...\\nAnswer:";
  and, as UniTE asks, by the next token, which has to be the letter;
- milliseconds a token, one prompt at a time and several side by side, the reading of the prompt included;
- the peak of the resident set while writing one prompt, beyond the loaded models. Linux with glibc only.

GSM8K's questions are not here: UniTE reads the whole text again for each token, byte-sampler runs each model
for each byte, and twenty worked solutions would take most of an hour (an estimate).

What does not run is in the results, with the last line of its error. Writes
bench/results/peers/<machine>.json. Run it while nothing else runs; about 12 minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, check_data, environment, error_line, machine_name, write_json

RESULTS = ROOT / "bench" / "results" / "peers"
PAIRS = ("S+Q", "S+G")
SIZES = ("items", "letters", "texts", "tokens", "prompts", "batch")


@dataclass(frozen=True)
class Program:
    """Something that is measured.

    Attributes:
        option: that names its checkout; "" for us.
        module: of this folder, with `measure(job)`.
        repository: where it is from.
        source: a file of each checkout.
    """

    name: str
    option: str
    module: str
    repository: str = ""
    source: str = ""


PROGRAMS = {
    one.name: one
    for one in (
        Program("deepen-ext", "", "peers_ours"),
        Program(
            "byte-sampler",
            "--byte-sampler",
            "peers_byte_sampler",
            "SewoongLab/byte-sampler",
            "src/byte_sampling/byte_conditioning.py",
        ),
        Program("UniTE", "--unite", "peers_unite", "starrYYxuan/UniTE", "unite2.py"),
    )
}


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Path | None]]:
    """The options, and the checkout of each program that is to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the benchmark data (shared/data)")
    for one in PROGRAMS.values():
        if one.option:
            parser.add_argument(one.option, dest=one.name, type=Path, help=f"a checkout of {one.repository}")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, help="main model first; default: %(default)s")
    parser.add_argument("--items", type=int, default=100, help="questions, default: %(default)s")
    parser.add_argument("--letters", type=int, default=50, help="of them by letter, default: %(default)s")
    parser.add_argument("--texts", type=int, default=1, help="of each kind, default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="written for a prompt, default: %(default)s")
    parser.add_argument("--prompts", type=int, default=2, help="one at a time, default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="prompts side by side, default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument("--output", type=Path, help="file; default: bench/results/peers/<machine>.json")
    options = parser.parse_args(arguments)
    check_data(parser, options.data)
    checkouts: dict[str, Path | None] = {"deepen-ext": None}
    for one in PROGRAMS.values():
        path = getattr(options, one.name, None)
        if path is None:
            continue
        if not (path / one.source).is_file():
            parser.error(
                f"{one.option} {path}: no checkout of {one.repository}, it has no {one.source}; "
                f"git clone https://github.com/{one.repository} and give its folder"
            )
        checkouts[one.name] = path.resolve()
    if len(checkouts) == 1:
        parser.error("no peer to measure; give --byte-sampler, --unite or both")
    if options.quick:
        options.items, options.letters, options.texts = 2, 2, 1
        options.tokens, options.prompts, options.batch = 3, 1, 2
    return options, checkouts


def main() -> None:
    options, checkouts = parse()
    found = environment()
    output = options.output or RESULTS / f"{machine_name(found)}.json"
    sizes = {one: getattr(options, one) for one in SIZES}
    sizes |= {"context": 400, "scored": 80 if options.quick else 400}
    pairs: dict[str, list[dict[str, Any]]] = {pair: [] for pair in options.pairs}
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {
        "settings": sizes,
        "peers": {name: _facts(name, path) for name, path in checkouts.items() if path is not None},
        "pairs": pairs,
        "seconds": seconds,
        "environment": found,
    }
    for pair in options.pairs:
        for name, path in checkouts.items():
            began = time.monotonic()
            job = {**sizes, "pair": pair, "data": str(options.data), "checkout": path and str(path)}
            pairs[pair] += _in_a_process(name, job)
            seconds[f"{pair} {name}"] = round(time.monotonic() - began, 1)
            write_json(output, result)  # after each: an interrupted run keeps what it has
            print(f"{pair} {name}: {seconds[f'{pair} {name}']:.0f} s", file=sys.stderr, flush=True)
    print(f"written to {output}", file=sys.stderr)


def _facts(name: str, path: Path) -> dict[str, Any]:
    """What is measured: the commit, and what is not as the checkout has it."""
    commit = ""
    if shutil.which("git") is not None:
        done = subprocess.run(
            ["git", "-C", str(path), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = done.stdout.strip() if done.returncode == 0 else ""
    program = PROGRAMS[name]
    changes = importlib.import_module(program.module).CHANGES
    return {"repository": program.repository, "commit": commit or "unknown", "changes": changes}


def _in_a_process(name: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a program on a pair; if its process fails, one row with the error."""
    with tempfile.TemporaryDirectory(prefix="deepen-ext-peers-") as folder:
        rows = Path(folder, "rows.json")
        command = [sys.executable, str(Path(__file__).resolve()), "--child", name, json.dumps(job), str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if rows.is_file():
            found: list[dict[str, Any]] = json.loads(rows.read_text(encoding="utf-8"))
            return found
        said = done.stderr.strip().splitlines()
        if name == "deepen-ext":  # ours has no business failing
            raise SystemExit(done.stderr)
    why = f"the process ended with code {done.returncode}: {said[-1] if said else 'it said nothing'}"
    return [{"system": name, "name": "", "errors": {"all": why}}]


def _child(name: str, job: dict[str, Any], rows: Path) -> None:
    from peers_setup import Job

    program = PROGRAMS[name]
    paths = {key: value and Path(value) for key, value in job.items() if key in ("data", "checkout")}
    try:
        found = importlib.import_module(program.module).measure(Job(**{**job, **paths}))
    except Exception as error:
        if not program.option:
            raise
        found = [{"system": name, "name": "", "errors": {"all": error_line(error)}}]
    write_json(rows, found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
