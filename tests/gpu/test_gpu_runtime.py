"""What is CUDA's own: graphs, streams, devices, errors, torch.compile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from library_cases import CASES, compiled_step
from oracle import random_logits
from test_gpu_step import random_map, shared_logits

from deepen_ext import _core
from deepen_ext.fusers import DeepenFuser
from deepen_ext.ops import topk_softmax

VOCABS = (49_152, 262_144)


@pytest.fixture
def fuser(device):
    maps = [random_map(vocab, 30_001, 32, seed=i).to(device) for i, vocab in enumerate(VOCABS)]
    return DeepenFuser(maps, learning_rate=0.15, min_probability=1e-4)


def given(device, batch, seed):
    return [shared_logits(batch, vocab, seed=seed + i).to(device) for i, vocab in enumerate(VOCABS)]


@pytest.mark.parametrize("batch", [1, 5])
def test_a_graph_of_the_whole_step_replays_on_new_logits(device, fuser, batch):
    static = given(device, batch, seed=0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            fuser.step(static, [0.5, 0.5])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fuser.step(static, [0.5, 0.5])
    earlier = None
    for seed in (10, 20, 30):
        fresh = given(device, batch, seed)
        for place, one in zip(static, fresh, strict=True):
            place.copy_(one)
        graph.replay()
        eager = fuser.step(fresh, [0.5, 0.5])
        assert torch.equal(captured.logits, eager.logits)
        assert torch.equal(captured.chosen, eager.chosen)
        assert torch.equal(captured.main_choice, eager.main_choice)
        captured.check()
        assert earlier is None or not torch.equal(captured.logits, earlier), "the replay changed nothing"
        earlier = captured.logits.clone()


def test_a_graph_outlives_the_weights_of_many_later_steps(device, fuser):
    """It reads the tensor of its weights, which is not dropped with those of steps that only pass by."""
    static = given(device, 1, seed=0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fuser.step(static, [0.25, 0.75])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fuser.step(static, [0.25, 0.75])
    graph.replay()
    first = captured.logits.clone()
    for i in range(600):
        fuser.step(static, [0.5 + i / 2000, 0.5 - i / 2000])
    graph.replay()
    assert torch.equal(captured.logits, first)


def test_two_streams_at_once(device, fuser):
    inputs = [given(device, 4, seed) for seed in (1, 2)]
    alone = [fuser.step(one, [0.5, 0.5]).logits.clone() for one in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    together: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(fuser.step(inputs[i], [0.5, 0.5]).logits)
    torch.cuda.synchronize()
    for want, found in zip(alone, together, strict=True):
        assert all(torch.equal(want, one) for one in found)


def test_work_goes_to_the_current_stream(device):
    """An operation on a side stream sees what was queued there before it, and nothing else waits for it."""
    side = torch.cuda.Stream()
    logits = torch.zeros(1, 262_144, device=device)
    wanted = random_logits(1, 262_144, seed=3).to(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        logits.copy_(wanted)
        found = topk_softmax(logits, 16)
    side.synchronize()
    assert torch.equal(found.ids, topk_softmax(wanted, 16).ids)


def test_the_current_device_is_left_as_it_was(device):
    before = torch.cuda.current_device()
    topk_softmax(torch.randn(2, 5000, device=device), 8)
    assert torch.cuda.current_device() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one CUDA device")
def test_a_second_device():
    maps = [random_map(vocab, 4001, 32, seed=i) for i, vocab in enumerate((5000, 7001))]
    logits = [random_logits(3, vocab, seed=i) for i, vocab in enumerate((5000, 7001))]
    results = []
    for where in ("cuda:0", "cuda:1"):
        fuser = DeepenFuser([one.to(where) for one in maps], learning_rate=0.2)
        results.append(fuser.step([one.to(where) for one in logits], [0.5, 0.5]).logits)
        assert results[-1].device == torch.device(where)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(results[0].cpu(), results[1].cpu(), atol=1e-5, rtol=0)


def test_an_error_has_the_place_and_cudas_own_text(device):
    """A device that is not there: the call fails, says where and why, and the next one works."""
    logits = torch.randn(1, 5000, device=device)
    missing = torch.cuda.device_count() + 7
    buffers = [torch.empty(8, dtype=torch.int32, device=device) for _ in range(4)]
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match=re.compile(r"invalid device ordinal.*csrc/.*:\d+", re.DOTALL)):
        _core.topk_softmax(
            [(logits.data_ptr(), 0, 1, 5000, 8, *(one.data_ptr() for one in buffers))],
            workspace.data_ptr(),
            (1, missing, 0),
        )
    assert int(topk_softmax(logits, 8).ids[0, 0]) == int(logits.argmax())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(device, name):
    operator, arguments = CASES[name](device)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "cudagraphs"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile(device, backend, dense):
    step, logits = compiled_step(device, dense=dense)
    want = [one.clone() for one in step(*logits)]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(3):
        for one, other in zip(want, compiled(*logits), strict=True):
            assert torch.equal(one, other)


def test_memory_of_a_filled_map(device):
    """At most 200 MB beyond the models for a pair of 128k and 152k."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    maps = [random_map(vocab, 100_000, 32, seed=0).to(device) for vocab in (128_256, 151_936)]
    taken = torch.cuda.memory_allocated() - before
    assert len(maps) == 2
    assert taken < 200e6


def test_what_the_emulator_is_held_to_holds_on_the_device(device, tmp_path):
    """tests/emulator/self_test.cu: shuffles, ballots, atomics, shared memory, launch errors by hand."""
    root = Path(__file__).parents[2]
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    sources = [root / "tests" / "emulator" / "self_test.cu", root / "csrc" / "core" / "cuda_device.cu"]
    program = tmp_path / "self_test"
    major, minor = torch.cuda.get_device_capability(device)
    flags = ["-std=c++17", f"-arch=sm_{major}{minor}", f"-I{root / 'csrc'}"]
    subprocess.run([nvcc, *flags, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([str(program), "all"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
