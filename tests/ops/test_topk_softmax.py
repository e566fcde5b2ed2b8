"""`topk_softmax` against torch, and at its edges."""

from __future__ import annotations

import pytest
import torch
from oracle import random_logits

from deepen_ext import InputError, _core
from deepen_ext.ops import topk_softmax, topk_softmax_many

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def expected(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, probs and tail in float64; a stable sort gives ties to the lower id."""
    probs = torch.softmax(logits.double(), dim=-1)
    order = torch.sort(logits.double(), dim=-1, descending=True, stable=True).indices[:, :k]
    kept = probs.gather(1, order)
    return order.int(), kept.float(), (1 - kept.sum(dim=1)).clamp(min=0).float()


def assert_topk(logits: torch.Tensor, k: int) -> None:
    ids, probs, tail, _ = topk_softmax(logits, k)
    want_ids, want_probs, want_tail = expected(logits, k)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(probs, want_probs, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(tail, want_tail, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "vocab", "k"), [(1, 49152, 128), (3, 5003, 64), (2, 262_144, 128), (1, 20_000, 4096)]
)
def test_against_torch(dtype, batch, vocab, k):
    logits = random_logits(batch, vocab, seed=vocab + k).to(dtype)
    assert len(logits[0].unique()) > 100, "the input is trivial"
    assert_topk(logits, k)


@pytest.mark.parametrize(
    ("vocab", "k"), [(1, 1), (2, 1), (2, 2), (17, 17), (4099, 4099), (4099, 1), (2049, 2048)]
)
def test_small_and_whole_vocabularies(vocab, k):
    assert_topk(random_logits(2, vocab, seed=vocab) if vocab > 6 else torch.randn(2, vocab), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_id(dtype):
    logits = torch.zeros(2, 9001, dtype=dtype)
    logits[1] = torch.randint(0, 3, (9001,)).to(dtype)
    assert_topk(logits, 300)


def test_zeros_of_both_signs_are_ties():
    logits = torch.zeros(1, 5000)
    logits[0, ::2] = -0.0
    assert topk_softmax(logits, 10).ids.tolist() == [list(range(10))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (5003, 64), (8192, 1)])
def test_logits_that_start_at_any_element(dtype, vocab, k):
    """Vector loads need aligned addresses; logits that are a slice of something have none."""
    for offset in range(1, 8):
        logits = torch.zeros(offset + 3 * vocab, dtype=dtype)[offset:].view(3, vocab)
        logits.copy_(random_logits(3, vocab, seed=vocab) if vocab > 6 else torch.randn(3, vocab))
        assert_topk(logits, k)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_sorted_logits(order):
    # Rising logits pass the running bar every time: the worst case for the candidate list.
    logits = torch.linspace(-8, 8, 50_000)[None]
    assert_topk(logits if order == "rising" else logits.flip(-1).contiguous(), 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 8192, 36_000])
@pytest.mark.parametrize("k", [3, 200, 700])
def test_the_largest_are_side_by_side(dtype, first, k):
    logits = random_logits(2, 45_000, seed=k)
    logits[:, first : first + 8192] += 12
    assert int(logits[0].topk(k).indices.min()) >= first
    assert_topk(logits.to(dtype), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("others", ["alike", "of any size"])
@pytest.mark.parametrize("high", [1, 90, 2000])
def test_logits_far_apart(dtype, others, high):
    """`high` of 1e20 to 1e30 among others near 10, or of 1e-30 to 1."""
    generator = torch.Generator().manual_seed(high)
    logits = 10 + 0.01 * torch.randn(2, 45_000, generator=generator)
    if others == "of any size":
        logits = 10 ** -(30 * torch.rand(2, 45_000, generator=generator))
        logits[:, ::2] *= -1
    logits[:, 5 : 5 + 11 * high : 11] = 10 ** (20 + 10 * torch.rand(2, high, generator=generator))
    assert_topk(logits.to(dtype), 128)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_are_allowed(dtype):
    logits = torch.full((2, 45_000), float("-inf"))
    logits[:, 7::300] = random_logits(2, 150, seed=1)
    assert_topk(logits.to(dtype), 100)
    assert_topk(logits.to(dtype), 200)


def test_minus_infinity_is_probability_zero():
    logits = torch.full((2, 6000), float("-inf"))
    logits[0, 4321] = 3.0
    logits[1, [5, 5999]] = torch.tensor([1.0, 2.0])
    ids, probs, tail, _ = topk_softmax(logits, 4)
    assert ids[0].tolist() == [4321, 0, 1, 2]
    assert probs[0].tolist() == [1, 0, 0, 0]
    assert ids[1].tolist() == [5999, 5, 0, 1]
    torch.testing.assert_close(probs[1, :2], torch.softmax(torch.tensor([2.0, 1.0]), 0))
    assert tail.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "NaN or \\+inf"), (float("inf"), "NaN or \\+inf"), (None, "nothing but -inf")],
)
@pytest.mark.parametrize("position", [0, 2047, 4999, 5000])
def test_rows_without_a_softmax(dtype, value, message, position):
    logits = torch.randn(3, 5001).to(dtype)
    if value is None:
        logits[1] = float("-inf")
    else:
        logits[1, position] = value
    with pytest.raises(InputError, match=f"gemma: row 1 has no softmax.*{message}"):
        topk_softmax(logits, 8, name="gemma")


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[3e38, 2.9e38, -3e38, 0.0], [88.8, 88.7, -1e30, -200.0]])
    assert_topk(logits, 3)


def test_half_precision_values_are_exact():
    # Every finite float16 and bfloat16 there is, subnormals and all.
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[torch.isfinite(every)][None].contiguous()
        assert torch.equal(topk_softmax(every, every.shape[1]).ids, expected(every, every.shape[1])[0])


def test_empty_batch():
    ids, probs, tail, _ = topk_softmax(torch.empty(0, 100), 5)
    assert ids.shape == probs.shape == (0, 5)
    assert tail.shape == (0,)


# (batch, vocab, dtype) of each member.
MEMBERS = {
    "a pair": [(2, 9001, torch.float32), (2, 30_000, torch.float32)],
    "rows, dtypes and no rows": [
        *[
            (1, 20_000, torch.bfloat16),
            (0, 50, torch.float32),
            (5, 7001, torch.float16),
            (2, 17, torch.float32),
        ]
    ],
    "one": [(3, 5003, torch.float32)],
    "more than a launch takes": [(1 + i % 2, 100 + i, DTYPES[i % 3]) for i in range(19)],
    "none": [],
}


@pytest.mark.parametrize("k", [5, 60, 1500])
@pytest.mark.parametrize("members", MEMBERS)
def test_many_give_what_each_gives_alone(members, k):
    given = [random_logits(*one[:2], seed=i).to(one[2]) for i, one in enumerate(MEMBERS[members])]
    found = topk_softmax_many(given, k)
    assert len(found) == len(given)
    for one, logits in zip(found, given, strict=True):
        alone = topk_softmax(logits, min(k, logits.shape[1]))
        assert torch.equal(one.ids, alone.ids)
        assert torch.equal(one.status, alone.status)
        torch.testing.assert_close(one.probs, alone.probs, rtol=1e-6, atol=0)
        torch.testing.assert_close(one.tail, alone.tail, rtol=1e-5, atol=5e-7)


def test_many_name_the_one_that_is_wrong():
    good, bad = torch.zeros(2, 9), torch.full((2, 9), float("nan"))
    with pytest.raises(InputError, match="gemma: row 0 has no softmax"):
        topk_softmax_many([good, bad], 3, names=["llama", "gemma"])
    with pytest.raises(InputError, match="logits 1 is float64"):
        topk_softmax_many([good, good.double()], 3)
    with pytest.raises(InputError, match="k is 0"):
        topk_softmax_many([good], 0)


def test_threads_do_not_change_a_bit():
    logits = random_logits(5, 30_000, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = topk_softmax(logits, 128)
        torch.set_num_threads(3)
        three = topk_softmax(logits, 128)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        (torch.zeros(5), 1, "shape"),
        (torch.zeros(2, 5, dtype=torch.float64), 1, "float64; expected float32 or float16 or bfloat16"),
        (torch.zeros(5, 4).T, 1, "not contiguous"),
        (torch.zeros(2, 5), 0, "k is 0"),
        (torch.zeros(2, 5), 6, "k is 6"),
        (torch.zeros(2, 5, device="meta"), 2, "no meta kernel"),
        ([[0.0]], 1, "torch.Tensor"),
    ],
)
def test_bad_input(logits, k, message):
    with pytest.raises(InputError, match=message):
        topk_softmax(logits, k)


def test_writes_stay_inside_the_outputs(backend):
    """Poison around every buffer that the core writes to."""
    batch, vocab, k, fence = 3, 7001, 33, 16
    logits = random_logits(batch, vocab, seed=7)
    ids = torch.full((batch * k + 2 * fence,), -77, dtype=torch.int32)
    probs = torch.full((batch * k + 2 * fence,), -77.0)
    tail = torch.full((batch + 2 * fence,), -77.0)
    status = torch.full((batch + 2 * fence,), -77, dtype=torch.int32)
    addresses = [one[fence:].data_ptr() for one in (ids, probs, tail, status)]
    members = [(logits.data_ptr(), 0, batch, vocab, k, *addresses)]
    size = _core.topk_softmax_workspace(members, backend.packed)
    workspace = torch.full((size + 2 * 64,), 0xA5, dtype=torch.uint8)
    _core.topk_softmax(members, workspace[64:].data_ptr(), backend.packed)
    for buffer in (ids, probs, tail, status):
        assert (buffer[:fence] == -77).all()
        assert (buffer[-fence:] == -77).all()
    assert (workspace[:64] == 0xA5).all()
    assert (workspace[-64:] == 0xA5).all()
    assert torch.equal(ids[fence:-fence].view(batch, k), expected(logits, k)[0])
