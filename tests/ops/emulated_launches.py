"""What only the emulator can show of the launches: test_emulation.py adds this file to the emulated run.

Device and stream, results that no order of threads changes, and devices with less shared memory or other
numbers of multiprocessors.
"""

from __future__ import annotations

import pytest
import torch
from library_cases import maps
from oracle import random_embedding, random_logits

from deepen_ext import InputError
from deepen_ext.fusers import DeepenFuser
from deepen_ext.ops import FuseInput, fuse, inverse_search, topk_softmax, topk_softmax_many
from deepen_ext.space.row_sources import SimilarityRows


def run_topk():
    one_part_is_high = random_logits(2, 45_000, seed=3)
    one_part_is_high[:, 8192:16_384] += 12  # more than k of the largest, in two slices
    found = [topk_softmax(random_logits(3, 9001, seed=1), 70), topk_softmax(random_logits(2, 3001, 2), 1500)]
    found += [topk_softmax(one_part_is_high, 128), topk_softmax(one_part_is_high.bfloat16(), 600)]
    return [part for one in found for part in one]


def run_topk_many():
    given = [random_logits(3, 9001, seed=1), random_logits(1, 30_000, seed=2).half(), random_logits(2, 50, 3)]
    return [part for one in topk_softmax_many(given, 70) for part in one]


def run_relative_rows():
    found = []
    embedding, anchors = random_embedding(600, 11, seed=0), torch.arange(0, 600, 3)
    for recipe, entries, count in (("calibrated", 9, 70), ("paper", 31, 5)):
        source = SimilarityRows(embedding, anchors, recipe=recipe, entries=entries)
        found += source.compute(torch.arange(150, 150 + count))
    return found


def run_search(dense: bool):
    relative = maps("cpu", dense=dense)[0]
    ids = torch.arange(relative.vocab_size, dtype=torch.int32)[:60].expand(2, -1).contiguous()
    relative.ensure(ids)
    logits, target = random_logits(2, 60, seed=3), torch.softmax(random_logits(2, relative.anchors, 4), dim=1)
    tail = torch.tensor([float("-inf"), 1.0])
    return [inverse_search(logits, ids, tail, target, relative.rows, learning_rate=0.2)]


def run_fuse(dense: bool):
    inputs = []
    for i, relative in enumerate(maps("cpu", dense=dense)):
        topk = topk_softmax(random_logits(3, relative.vocab_size, seed=i), 40)
        relative.ensure(topk.ids)
        inputs.append(FuseInput(topk, relative.rows))
    logits = random_logits(3, inputs[0].rows.values.shape[0], seed=0)
    weights = torch.full((3, len(inputs)), 1 / len(inputs))
    return [*fuse(logits, inputs, weights, learning_rate=0.2), logits]


OPERATIONS = {
    "topk_softmax": run_topk,
    "topk_softmax_many": run_topk_many,
    "relative_rows": run_relative_rows,
    "inverse_search": lambda: run_search(False),
    "inverse_search_dense": lambda: run_search(True),
    "fuse": lambda: run_fuse(False),
    "fuse_dense": lambda: run_fuse(True),
}


def test_members_share_the_launches_of_one(backend):
    given = [random_logits(batch, vocab, seed=batch) for batch, vocab in ((1, 60_000), (3, 9001), (2, 50))]
    backend.emulator.set_multiprocessors(132)
    backend.emulator.take_launches()
    topk_softmax_many(given, 40)
    kernels = [line.split(" grid ")[0] for line in backend.emulator.take_launches()]
    assert kernels == ["(topk_slices<T>)", "topk_merge"]


def test_a_step_asks_all_members_at_once(backend):
    made = maps("cpu")
    fuser = DeepenFuser(made, learning_rate=0.2)
    logits = [random_logits(2, one.vocab_size, seed=i) for i, one in enumerate(made)]
    backend.emulator.take_launches()
    fuser.step(logits, [0.5, 0.5])
    kernels = [line.split(" grid ")[0] for line in backend.emulator.take_launches()]
    assert sum("topk_slices" in one for one in kernels) == 1
    assert any("fuse_kernel" in one for one in kernels)


@pytest.fixture(params=OPERATIONS)
def operation(request, backend):
    backend.emulates_rows = request.param == "relative_rows"
    return OPERATIONS[request.param]


def test_launches_go_to_the_callers_device_and_stream(operation, backend):
    backend.packed = (1, 1, 4242)
    operation()
    launches = backend.emulator.take_launches()
    assert launches
    assert all(line.endswith(" device 1 stream 4242") for line in launches), launches
    assert backend.emulator.current_device == 0, "the device guard did not restore the device"


def test_attributes_are_asked_for_once(operation, backend):
    operation()
    before = backend.emulator.questions
    operation()
    assert backend.emulator.questions == before
    backend.packed = (1, 1, 0)
    operation()
    assert backend.emulator.questions > before, "the other device was not asked"


def test_a_failed_call_does_not_fail_the_next_one(operation, backend):
    backend.packed = (1, 7, 0)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
        operation()
    backend.packed = (1, 0, 0)
    operation()


def test_no_order_of_threads_changes_a_bit(operation, backend):
    want = operation()
    for seed in range(3, 9):
        backend.emulator.set_seed(seed)
        for one, other in zip(want, operation(), strict=True):
            assert torch.equal(one, other), seed


@pytest.mark.parametrize("count", [1, 2, 132])
def test_any_number_of_multiprocessors(operation, backend, count):
    want = operation()
    backend.emulator.set_multiprocessors(count)
    for one, other in zip(want, operation(), strict=True):
        if operation is run_relative_rows:
            assert torch.equal(one, other), "rows in a map depend on the device"
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "refusable"), [(101_376, False), (65_536, True), (49_152, True)])
def test_less_shared_memory_takes_another_path_or_an_error(operation, backend, size, refusable):
    """Every architecture that we build for has 101,376 bytes or more: every operation runs there."""
    want = operation()
    backend.emulator.set_max_shared_bytes(size)
    try:
        found = operation()
    except InputError as refused:
        if not refusable or "shared memory" not in str(refused):
            raise
        return
    for one, other in zip(want, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "size", "stores"), [(256, 232_448, False), (257, 232_448, True), (180, 49_152, True)]
)
def test_scores_are_stored_only_where_lists_do_not_fit(backend, entries, size, stores):
    backend.emulates_rows = True
    backend.emulator.set_max_shared_bytes(size)
    backend.emulator.take_launches()
    SimilarityRows(random_embedding(400, 5, seed=0), torch.arange(400), entries=entries).compute(
        torch.arange(20)
    )
    kernels = " ".join(backend.emulator.take_launches())
    assert ("merge_strips" in kernels, "topk_slices" in kernels) == (not stores, stores)
