"""`topk_softmax` on CUDA against its CPU twin."""

from __future__ import annotations

import pytest
import torch
from oracle import random_logits
from test_gpu_step import shared_logits
from test_topk_softmax import DTYPES, MEMBERS

from deepen_ext import InputError, _core
from deepen_ext.ops import topk_softmax, topk_softmax_many

SHAPES = [
    *[(1, 49_152, 128), (3, 5003, 64), (2, 262_144, 128), (1, 20_000, 4096), (32, 151_936, 128)],
    *[(128, 32_000, 128), (1, 262_144, 1), (2, 262_144, 20_000), (5, 262_143, 128), (1, 1_000_003, 1000)],
]
EDGES = [(1, 1), (2, 1), (2, 2), (17, 17), (1023, 5), (1025, 1025), (4099, 4099), (4099, 1), (2049, 2048)]


def assert_like_the_twin(logits: torch.Tensor, k: int, device: str) -> None:
    """Equal ids, since both order the same logits; probabilities to the rounding of the card's `__expf`."""
    want = topk_softmax(logits, k)
    found = topk_softmax(logits.to(device), k)
    assert torch.equal(found.status.cpu(), want.status)
    assert torch.equal(found.ids.cpu(), want.ids)
    torch.testing.assert_close(found.probs.cpu(), want.probs, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.tail.cpu(), want.tail, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "vocab", "k"), SHAPES)
def test_real_vocabularies(device, dtype, batch, vocab, k):
    assert_like_the_twin(shared_logits(batch, vocab, seed=vocab + k).to(dtype), k, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "k"), EDGES)
def test_small_and_whole_vocabularies(device, dtype, vocab, k):
    logits = random_logits(3, vocab, seed=vocab) if vocab > 6 else torch.randn(3, vocab)
    assert_like_the_twin(logits.to(dtype), k, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 127, 9001, 49_153])
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_rows_that_no_vector_load_fits(device, dtype, vocab, offset):
    """A contiguous view may begin at any element, and an odd V moves every row's alignment."""
    buffer = torch.randn(4 * vocab + offset).to(dtype)
    logits = buffer[offset:].view(4, vocab)
    on_device = buffer.to(device)[offset:].view(4, vocab)
    assert on_device.data_ptr() % 16
    want, found = topk_softmax(logits, min(vocab, 50)), topk_softmax(on_device, min(vocab, 50))
    assert torch.equal(found.ids.cpu(), want.ids)
    torch.testing.assert_close(found.probs.cpu(), want.probs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["all equal", "three values", "zeros of both signs", "rising", "falling"])
def test_ties_and_order(device, dtype, kind):
    vocab = 50_001
    logits = {
        "all equal": torch.full((2, vocab), 1.5),
        "three values": torch.randint(0, 3, (2, vocab)).float(),
        "zeros of both signs": torch.zeros(2, vocab).index_fill(1, torch.arange(0, vocab, 2), -0.0),
        "rising": torch.linspace(-8, 8, vocab).repeat(2, 1),
        "falling": torch.linspace(8, -8, vocab).repeat(2, 1),
    }[kind]
    assert_like_the_twin(logits.to(dtype), 300, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 32_768, 140_000])
@pytest.mark.parametrize("k", [3, 128, 700])
def test_the_largest_are_side_by_side(device, dtype, first, k):
    logits = random_logits(2, 151_936, seed=k)
    logits[:, first : first + 8192] += 12
    assert_like_the_twin(logits.to(dtype), k, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_are_allowed(device, dtype):
    logits = torch.full((2, 151_936), float("-inf"))
    logits[:, 7::1000] = random_logits(2, 152, seed=1)
    assert_like_the_twin(logits.to(dtype), 100, device)
    assert_like_the_twin(logits.to(dtype), 300, device)


@pytest.mark.parametrize("k", [5, 128, 1500])
@pytest.mark.parametrize("members", [*MEMBERS, "large vocabularies"])
def test_many_give_what_each_gives_alone(device, members, k):
    pair = [(3, 49_152, torch.float32), (3, 262_144, torch.bfloat16)]
    shapes = MEMBERS.get(members, pair)
    given = [random_logits(*one[:2], seed=i).to(one[2]).to(device) for i, one in enumerate(shapes)]
    found = topk_softmax_many(given, k)
    assert len(found) == len(given)
    for one, logits in zip(found, given, strict=True):
        alone = topk_softmax(logits, min(k, logits.shape[1]))
        assert torch.equal(one.ids, alone.ids)
        torch.testing.assert_close(one.probs, alone.probs, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(one.tail, alone.tail, rtol=2e-5, atol=1e-6)
    for _ in range(5):
        again = topk_softmax_many(given, k)
        assert all(
            torch.equal(a, b)
            for one, other in zip(found, again, strict=True)
            for a, b in zip(one, other, strict=True)
        )


def test_minus_infinity_and_large_logits(device):
    logits = torch.full((4, 6000), float("-inf"))
    logits[0, 4321] = 3.0
    logits[1, [5, 5999]] = torch.tensor([1.0, 2.0])
    logits[2, :4] = torch.tensor([3e38, 2.9e38, -3e38, 0.0])
    logits[3, :3] = torch.tensor([88.8, 88.7, -1e30])
    assert_like_the_twin(logits, 4, device)


def test_every_half_precision_value(device):
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[torch.isfinite(every)][None].contiguous()
        assert_like_the_twin(every, every.shape[1], device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("value", "code"), [(float("nan"), 1), (float("inf"), 1), (None, 2)])
@pytest.mark.parametrize("position", [0, 2047, 4999, 5000])
def test_rows_without_a_softmax(device, no_waiting, dtype, value, code, position):
    logits = torch.randn(3, 5001).to(dtype)
    if value is None:
        logits[1] = float("-inf")
    else:
        logits[1, position] = value
    there = logits.to(device)
    with no_waiting():
        found = topk_softmax(there, 8, name="gemma")
    assert found.status.tolist() == [0, code, 0]
    with pytest.raises(InputError, match=r"gemma: row 1 has no softmax"):
        found.check("gemma")
    # `fuse` gathers rows by these ids before anyone has looked at the status.
    assert int(found.ids.min()) >= 0
    assert int(found.ids.max()) < 5001
    good = topk_softmax(logits[::2].contiguous(), 8)
    assert torch.equal(found.ids[::2].cpu(), good.ids)


def test_empty_batch(device):
    found = topk_softmax(torch.empty(0, 100, device=device), 5)
    assert found.ids.shape == found.probs.shape == (0, 5)
    assert found.tail.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time_and_in_any_batch(device, dtype):
    logits = shared_logits(64, 151_936, seed=1).to(dtype).to(device)
    first = topk_softmax(logits, 128)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, topk_softmax(logits, 128), strict=True))
    alone = topk_softmax(logits[7:8].contiguous(), 128)
    assert torch.equal(alone.ids, first.ids[7:8])
    torch.testing.assert_close(alone.probs, first.probs[7:8], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("batch", "vocab", "k"), [(3, 7001, 33), (1, 262_144, 128), (2, 9000, 9000)])
def test_writes_stay_inside_the_outputs(device, batch, vocab, k):
    """Poison around every buffer that the core writes to; the workspace begins as garbage."""
    fence = 16
    logits = random_logits(batch, vocab, seed=7)
    there = logits.to(device)
    backend = (1, 0, torch.cuda.current_stream().cuda_stream)
    ids = torch.full((batch * k + 2 * fence,), -77, dtype=torch.int32, device=device)
    probs = torch.full((batch * k + 2 * fence,), -77.0, device=device)
    tail = torch.full((batch + 2 * fence,), -77.0, device=device)
    status = torch.full((batch + 2 * fence,), -77, dtype=torch.int32, device=device)
    addresses = [one[fence:].data_ptr() for one in (ids, probs, tail, status)]
    members = [(there.data_ptr(), 0, batch, vocab, k, *addresses)]
    size = _core.topk_softmax_workspace(members, backend)
    workspace = torch.full((size + 512,), 0xA5, dtype=torch.uint8, device=device)
    _core.topk_softmax(members, workspace[256:].data_ptr(), backend)
    for buffer in (ids, probs, tail, status):
        assert bool((buffer[:fence] == -77).all())
        assert bool((buffer[-fence:] == -77).all())
    assert bool((workspace[:256] == 0xA5).all())
    assert bool((workspace[256 + size :] == 0xA5).all())
    assert torch.equal(ids[fence:-fence].view(batch, k).cpu(), topk_softmax(logits, k).ids)
