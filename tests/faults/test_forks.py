"""A process that is forked after an ensemble was used: the child writes the same text, on one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import write_tiny_model
from kills import TESTS

from deepen_ext.errors import MemberLost
from deepen_ext.members.http.served_model import ServedModel
from deepen_ext.members.llama_cpp.threads import Threads

SECONDS = 120
# Everything that starts threads: torch's own operations, our core over a large vocabulary, tokenizers over
# several texts, and llama.cpp. In the child all of it again; one that waits for ever is ended.
PROGRAM = """
import faulthandler, multiprocessing, os, sys
from pathlib import Path
import torch
from deepen_ext import Ensemble, load_members
from deepen_ext.members.gguf.facts import read_facts
from deepen_ext.members.llama_cpp.backend import LlamaBackend
from deepen_ext.members.llama_cpp.library import load_library
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.members.llama_cpp.threads import Threads
from deepen_ext.ops import topk_softmax

main, assistant, gguf = sys.argv[1:]
torch.set_num_threads(2)
logits = torch.randn(8, 262144, generator=torch.Generator().manual_seed(0))
ensemble = Ensemble(load_members([main, assistant]), cache=False)
path = Path(gguf)
model = LlamaModel(load_library(), path, "tiny", torch.device("cpu"))
llama = LlamaBackend("tiny", model, path, read_facts(path), threads=Threads(2, fixed=True))

def everything():
    heavy = torch.randn(600, 600, generator=torch.Generator().manual_seed(1))
    numbers = [float((heavy @ heavy).softmax(1).std()), topk_softmax(logits, 50).ids.sum().item()]
    texts = [one.text for one in ensemble.generate(["Once upon", "The first of"], max_new_tokens=6)]
    ensemble.members[0].tokenizer(["some texts", "more of them"] * 50)
    with llama.open() as session:
        numbers.append(session.ask({0: [5, 6, 7, 8] * 40}, 5).wait().topk.ids.tolist())
    return repr((numbers, texts))

first = everything()
threads = len(os.listdir("/proc/self/task"))
assert threads > 1, "no thread was started, so a fork loses none"
print("threads", threads)

def again():
    faulthandler.dump_traceback_later(60, exit=True)
    found = everything()
    assert found == first, (found, first)
    assert torch.get_num_threads() == 1

child = os.fork()
if not child:
    try:
        again()
    except BaseException:
        import traceback; traceback.print_exc(); os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the forked child"
process = multiprocessing.get_context("fork").Process(target=again)
process.start(); process.join()
assert process.exitcode == 0, f"multiprocessing's child: {process.exitcode}"
assert everything() == first and torch.get_num_threads() == 2, "the first process"
print("the same")
"""


@pytest.mark.slow
def test_a_child_writes_the_same_text(one_byte_folders: list[Path], tmp_path: Path) -> None:
    gguf = write_tiny_model(tmp_path / "tiny.gguf", "llama", vocab_size=300, context_length=256)
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, (*one_byte_folders, gguf))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the same\n")


def _in_child(work: object) -> int:
    """The exit code of a forked process: 0 where this gives True."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if work() else 1  # type: ignore[operator]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_servers_member_says_that_it_must_be_loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads are the first process's, and so are its connections."""
    served = object.__new__(ServedModel)
    served.name = "served"
    served._process = os.getpid()
    served._check_process()

    def refused() -> bool:
        with pytest.raises(MemberLost, match="served: was loaded before this process was forked; load the"):
            served.start(None)  # type: ignore[arg-type]
        return True

    assert _in_child(refused) == 0


def test_llama_cpp_takes_one_thread_where_threads_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    for fixed in (False, True):
        threads = Threads(4, fixed=fixed)
        with threads.forward() as count:
            assert count == 4
        with monkeypatch.context() as patch:
            patch.setattr("deepen_ext.ground.forks._lost_threads", True)
            with threads.forward() as count:
                assert count == 1
