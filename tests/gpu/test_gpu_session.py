"""Sessions on CUDA: steps captured as graphs against eager forwards of the same random weights."""

from __future__ import annotations

import gc
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sessions import open_session, sync
from transformers import AutoConfig, AutoModelForCausalLM

from deepen_ext.members.hf import fixed_steps
from deepen_ext.members.hf import rooms as idle_rooms
from deepen_ext.members.hf.backend import HFBackend
from deepen_ext.members.hf.bytes_needed import estimate_bytes
from deepen_ext.members.member import Member
from deepen_ext.members.memory import available_bytes

VOCAB = 32_000
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "vocab_size": VOCAB,
}
MIXED = ["sliding_attention", "full_attention"] * 2
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 32},
    "gemma2": {"sliding_window": 32, "layer_types": MIXED},
    "gemma3_text": {"sliding_window": 32, "layer_types": MIXED},
}


def random_member(family: str, device: str, dtype: torch.dtype = torch.float32) -> Member:
    config = AutoConfig.for_model(family, **(SHAPE | FAMILIES[family]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)  # from the usual initialisation no token would depend on another
    model = model.to(device=device, dtype=dtype)
    vocabulary = SimpleNamespace(vocab_size=VOCAB)
    backend = HFBackend(family, model, VOCAB, 2048, torch.device(device), dtype)
    return Member(family, backend, None, vocabulary, ())  # type: ignore[arg-type]


def fresh(member: Member, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        output = member.model(torch.tensor([ids], device=member.device), use_cache=False, logits_to_keep=1)
    return output.logits[0, -1]


def steps(rows: int, count: int, longest: int, seed: int):
    """Targets of a ragged history: rows grow by one to several tokens, and roll back."""
    rng = random.Random(seed)
    held = {row: [rng.randrange(5, VOCAB) for _ in range(rng.randint(1, longest))] for row in range(rows)}
    yield dict(held)
    for _ in range(count):
        for row in held:
            kept = held[row][: max(len(held[row]) - rng.choice([0, 0, 0, 1, 3]), 0)]
            held[row] = kept + [rng.randrange(5, VOCAB) for _ in range(rng.choice([1, 1, 2, 4]))]
        yield {row: list(held[row]) for row in sorted(rng.sample(range(rows), rng.randint(1, rows)))}


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 without TF32, so that graph and eager forwards may be compared tightly."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    idle_rooms._idle.clear()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 5])
def test_replayed_steps_equal_fresh_forwards(device: str, family: str, rows: int) -> None:
    """Over several widths and spans, rollbacks and rows that sit out."""
    member = random_member(family, device)
    session = open_session(member, rows, capacity=600)
    for targets in steps(rows, 60, 400, seed=1):
        logits = sync(session, targets)
        for ids, got in zip(targets.values(), logits, strict=True):
            torch.testing.assert_close(got, fresh(member, ids), atol=2e-3, rtol=1e-3)
    captured = session._room.steps.captured
    assert len(captured) >= 3
    assert {width for width, _ in captured} <= set(fixed_steps.WIDTHS)


def test_graphs_equal_eager_to_the_bit(device: str) -> None:
    """The first step of a shape runs as it is, later ones are replayed: the same tokens, the same bits."""
    member = random_member("llama", device, torch.bfloat16)
    session = open_session(member, 3, capacity=100)
    prompt = {row: list(range(5 + row, 40 + row)) for row in range(3)}
    sync(session, prompt)
    eager = sync(session, {row: [*ids, 7] for row, ids in prompt.items()}).clone()
    assert session._room.steps.captured == []
    for _ in range(3):
        sync(session, {row: [*ids, 8] for row, ids in prompt.items()})
        replayed = sync(session, {row: [*ids, 7] for row, ids in prompt.items()})
        assert torch.equal(eager, replayed)
    assert session._room.steps.captured == [(1, 256)]


def test_earlier_logits_outlive_later_steps(device: str) -> None:
    """A graph writes its output in the same place each time; what sync returned stays."""
    member = random_member("llama", device)
    session = open_session(member, 2, capacity=100)
    ids = {0: [5, 6, 7], 1: [8, 9]}
    kept = []
    for i in range(6):
        ids = {row: [*one, 20 + i] for row, one in ids.items()}
        kept.append((sync(session, ids), ids))
    for logits, ids in kept:
        for row in ids:
            torch.testing.assert_close(logits[row], fresh(member, ids[row]), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_is_written_without_the_host(device: str, no_waiting, family: str) -> None:
    """Several lanes, past the window: first as it is, then captured, then replayed; nothing waits."""
    member = random_member(family, device)
    session = open_session(member, 3, capacity=200)
    held = {row: [*range(5 + row, 40 + 3 * row)] for row in range(3)}

    def second(logits: torch.Tensor, n: int) -> torch.Tensor:
        return logits.topk(2).indices[:, n % 2]

    for turn in range(5):
        named = [2, 0] if turn == 3 else [0, 1, 2]
        targets = {row: [*held[row][: len(held[row]) - turn % 2], 7 + turn] for row in named}
        sync(session, targets)  # a prompt goes another way
        with no_waiting() if turn > 2 else nullcontext():
            tokens, said = session.write(targets, 1, 3, second)
        for row, ids, logits in zip(
            named, tokens.tolist(), said.scores().view(len(named), 4, -1), strict=True
        ):
            held[row] = targets[row] + ids
            for n in range(4):
                expected = fresh(member, targets[row] + ids[:n])
                torch.testing.assert_close(logits[n], expected, atol=2e-3, rtol=1e-3)
    assert (1, 256) in session._room.steps.captured
    for row in range(3):
        assert session.ids(row) == held[row]


def test_members_side_by_side(device: str) -> None:
    """Two members on one card, each on its own stream: the caller's stream sees both done."""
    members = [random_member(family, device) for family in ("llama", "qwen2")]
    sessions = [open_session(member, 4, capacity=500) for member in members]
    assert sessions[0]._room.stream != sessions[1]._room.stream
    for targets in steps(4, 40, 100, seed=2):
        found = [sync(session, targets) for session in sessions]
        sums = [logits.float().sum(dim=1) for logits in found]  # on the caller's stream, at once
        for member, logits, total in zip(members, found, sums, strict=True):
            expected = torch.stack([fresh(member, ids) for ids in targets.values()])
            torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
            torch.testing.assert_close(total, logits.sum(dim=1), atol=1e-1, rtol=1e-3)


def test_a_step_never_waits(device: str, no_waiting) -> None:
    member = random_member("gemma3_text", device, torch.bfloat16)
    session = open_session(member, 4, capacity=100)
    ids = {row: list(range(5, 20 + row)) for row in range(4)}
    for i in range(3):  # once as it is, once captured, once replayed
        ids = {row: [*one, 30 + i] for row, one in ids.items()}
        sync(session, ids)
    ids = {row: [*one, 40] for row, one in ids.items()}
    with no_waiting():
        sync(session, ids)


@pytest.mark.parametrize("full", [False, True])
def test_a_capture_empties_the_cache_only_where_memory_is_short(device: str, monkeypatch, full: bool) -> None:
    member = random_member("llama", device)
    session = open_session(member, 2, capacity=100)
    ids = {0: [5, 6, 7], 1: [8, 9]}
    called = []
    for module, name in ((gc, "collect"), (torch.cuda, "synchronize"), (torch.cuda, "empty_cache")):
        monkeypatch.setattr(module, name, lambda name=name: called.append(name))
    if full:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 1))
    sync(session, ids)
    for i in range(2):
        ids = {row: [*one, 30 + i] for row, one in ids.items()}
        logits = sync(session, ids)
    assert session._room.steps.captured
    assert called == (["empty_cache"] if full else [])
    monkeypatch.undo()
    for row in ids:
        torch.testing.assert_close(logits[row], fresh(member, ids[row]), atol=2e-3, rtol=1e-3)


def test_the_next_session_replays_the_same_graphs(device: str) -> None:
    member = random_member("llama", device)
    with open_session(member, 2, capacity=300) as first:
        for targets in steps(2, 20, 50, seed=3):
            sync(first, targets)
        room, captured = first._room, first._room.steps.captured
        assert captured
        for row in range(2):  # as a generation ends
            first.release(row)
    assert idle_rooms.idle_bytes(member.backend) == room.cache.nbytes
    second = open_session(member, 2, capacity=200)
    assert second._room is room
    for targets in steps(2, 20, 50, seed=4):
        logits = sync(second, targets)
        for ids, got in zip(targets.values(), logits, strict=True):
            torch.testing.assert_close(got, fresh(member, ids), atol=2e-3, rtol=1e-3)
    assert set(captured) <= set(second._room.steps.captured)
    second.close()
    third = open_session(member, 3)  # another room, on the same stream: cuBLAS keeps a workspace for each
    assert third._room is not room
    assert third._room.stream is room.stream


def test_room_that_grows_drops_its_graphs(device: str) -> None:
    """More tokens than were announced: the buffers move, and no graph over the old ones is replayed."""
    member = random_member("llama", device)
    session = open_session(member, 2, capacity=10)
    ids = {0: list(range(5, 245)), 1: list(range(5, 250))}
    for i in range(30):
        ids = {row: [*one, 30 + i] for row, one in ids.items()}
        logits = sync(session, ids)
        for row in ids:
            torch.testing.assert_close(logits[row], fresh(member, ids[row]), atol=2e-3, rtol=1e-3)


def test_a_failure_frees_the_buffers(device: str) -> None:
    member = random_member("llama", device)
    session = open_session(member, 8, capacity=1500)
    sync(session, {row: [5, 6, 7] for row in range(8)})
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated(device)

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    hook = member.model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        sync(session, {0: [5, 6, 7, 8]})
    hook.remove()
    buffers = session._cache.nbytes
    session.close()
    assert idle_rooms.idle_bytes(member.backend) == 0
    assert torch.cuda.memory_allocated(device) <= held - buffers + (1 << 20)
    with open_session(member, 8) as again:
        logits = sync(again, {3: [5, 6, 7, 8]})
    torch.testing.assert_close(logits[0], fresh(member, [5, 6, 7, 8]), atol=2e-3, rtol=1e-3)


def test_a_model_that_cannot_be_captured_says_so(device: str) -> None:
    """A forward that looks at a value on the host: reported once, then run without graphs."""
    member = random_member("llama", device)

    def look(_: object, inputs: tuple[torch.Tensor]) -> None:
        inputs[0].sum().item()

    hook = member.model.model.layers[1].register_forward_pre_hook(look)
    session = open_session(member, 2, capacity=100)
    ids = {0: [5, 6], 1: [7, 8, 9]}

    def grow() -> torch.Tensor:
        for row in ids:
            ids[row] = [*ids[row], 30 + len(ids[row])]
        return sync(session, ids)

    try:
        sync(session, ids)
        grow()
        with pytest.warns(UserWarning, match="llama: its steps cannot be captured as CUDA graphs"):
            grow()
        logits = grow()
        for row in ids:
            torch.testing.assert_close(logits[row], fresh(member, ids[row]), atol=2e-3, rtol=1e-3)
    finally:
        hook.remove()
    other = open_session(random_member("qwen2", device), 2, capacity=100)
    for i in range(3):  # the failure left nothing open that another member's capture would meet
        sync(other, {0: [*range(5, 9 + i)], 1: [*range(6, 12 + i)]})
    assert other._room.steps.captured


def test_prefixes_that_rows_share_are_copied_and_graphs_go_on(device: str) -> None:
    member = random_member("gemma3_text", device)
    rng = random.Random(3)
    common = [rng.randrange(5, VOCAB) for _ in range(90)]
    rows = {row: common + [rng.randrange(5, VOCAB) for _ in range(4 + row)] for row in range(5)}
    with open_session(member, 5, capacity=200) as session:
        sync(session, rows)
        assert session.tokens_fed < 90 + sum(map(len, rows.values())) - 5 * 90 + 50  # the prefix went in once
        for _ in range(4):  # the steps are captured on the way
            rows = {row: [*ids, rng.randrange(5, VOCAB)] for row, ids in rows.items()}
            logits = sync(session, rows)
            for found, ids in zip(logits, rows.values(), strict=True):
                torch.testing.assert_close(found, fresh(member, ids), atol=2e-3, rtol=2e-3)
        assert session._room.steps.captured


def test_the_estimate_covers_what_is_taken(device: str) -> None:
    member = random_member("llama", device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free = available_bytes(member.device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    session = open_session(member, 8, capacity=1500)
    sync(session, {row: list(range(5 + row, 1400 + 2 * row)) for row in range(8)})  # none begins like another
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated(device) - before
    estimate = estimate_bytes(member.backend, 8, 1500)[member.backend.device]
    assert session._cache.nbytes < taken < 1.2 * estimate
    assert estimate < 4 * taken
    assert available_bytes(member.device) < free
