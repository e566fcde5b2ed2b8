"""Sessions against fresh forwards of the same models: one row, ragged batches, rollbacks, failures."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from sessions import changed, open_session, sync
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError, ModelError
from deepen_ext.members import memory
from deepen_ext.members.hf import attention, feed_plan, fixed_steps, rooms
from deepen_ext.members.hf import forwards as forwards_module
from deepen_ext.members.hf import session as module
from deepen_ext.members.hf.bytes_needed import estimate_bytes
from deepen_ext.members.hf.kv_cache import LaneCache, cache_bytes
from deepen_ext.members.hf.load import member_of
from deepen_ext.members.member import Member

TEXT = Path(__file__).read_text()
POSITIONS = (490, 511, 600)  # below, at and past Gemma's window of 512
DEPTHS = (1, 3, 40)

# Other families in a few thousand weights: what matters is how their code takes masks, windows and positions.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen2 with a window": {"sliding_window": 16, "use_sliding_window": True, "layer_types": MIXED},
    "qwen3": {},
    "gemma2": {"sliding_window": 16, "layer_types": MIXED},  # softcap: its attention is eager
    "gemma3_text": {"sliding_window": 16, "layer_types": MIXED},
    "phi3": {"sliding_window": 16, "pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "num_key_value_heads": None},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1, "num_key_value_heads": None},
}


@pytest.fixture(params=["smollm2", "gemma"])
def real(request: pytest.FixtureRequest) -> Member:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["tiny_smollm2", "windowed"])
def member(request: pytest.FixtureRequest) -> Member:
    return request.getfixturevalue(request.param)


@pytest.fixture
def tiny(tiny_smollm2: Member):
    """Makes a member of another family, with random weights."""

    def make(family: str, **settings: object) -> Member:
        config = AutoConfig.for_model(
            family.split()[0],
            vocab_size=tiny_smollm2.vocab_size,
            **(TINY | FAMILIES.get(family, {}) | settings),
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(6)  # from the usual initialisation no token would depend on another
        return changed(tiny_smollm2, model=model, name=family, context_length=256)

    return make


def ids_of(member: Member, count: int) -> list[int]:
    ids = member.vocabulary.prefix_ids + member.vocabulary.encode(TEXT)
    assert len(ids) > count
    return ids[:count]


def fresh_logits(member: Member, ids: list[int], lengths: list[int]) -> torch.Tensor:
    """Logits after the first n ids, for each n of lengths, from one forward without a cache."""
    at = torch.tensor([n - 1 for n in lengths])
    with torch.inference_mode():
        output = member.model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=at)
    return output.logits[0]


def assert_fresh(member: Member, targets: dict[int, list[int]], logits: torch.Tensor) -> None:
    """Each row's logits are those of its ids alone."""
    assert len(logits) == len(targets)
    for ids, got in zip(targets.values(), logits, strict=True):
        expected = fresh_logits(member, ids, [len(ids)])[0]
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
        assert int(got.argmax()) == int(expected.argmax())


@contextmanager
def forwards(member: Member) -> Iterator[list[tuple[int, int]]]:
    """Shapes of all inputs that go through the model's embedding meanwhile."""
    seen: list[tuple[int, int]] = []
    hook = member.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape))
    )
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def failing(layer: torch.nn.Module, error: BaseException) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise error

    hook = layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


class TestOneRow:
    def test_the_head_gets_rows_without_gaps(self, real: Member) -> None:
        """Of a view with gaps torch copies the head's weights in bfloat16: a second for each prompt."""
        seen: list[torch.Tensor] = []
        hook = real.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        ids, session = ids_of(real, 90), open_session(real)
        try:
            session.ask({0: ids[:40]}, 4).wait()
            session.ask({0: ids}, 4, positions=3).wait()
        finally:
            hook.remove()
        assert [one.shape[1] for one in seen] == [1, 3]
        for rows in seen:  # `is_contiguous` says nothing of the stride of a dimension of size 1
            assert rows.stride() == torch.empty_like(rows, memory_format=torch.contiguous_format).stride()

    def test_rollback_equals_a_fresh_forward(self, real: Member) -> None:
        """Wrong tokens are fed, rolled back and replaced, on both sides of the window and across it."""
        ids = ids_of(real, POSITIONS[-1] + 2)
        junk = ids_of(real, 200)[::-1]
        expected = dict(zip(POSITIONS, fresh_logits(real, ids, [p + 2 for p in POSITIONS]), strict=True))
        session = open_session(real)
        for position in POSITIONS:
            for depth in DEPTHS:
                wrong = sync(session, {0: ids[:position] + junk[:depth]}).clone()
                right = sync(session, {0: ids[: position + 2]})
                torch.testing.assert_close(right[0], expected[position], atol=1e-3, rtol=0)
                assert (wrong - right).abs().max() > 1  # the rollback had something to undo

    def test_rollbacks_in_a_row_reach_any_depth(self, member: Member) -> None:
        """Each sync is a strict prefix of the one before, down through the window, nothing fed in between."""
        lengths = [640, 639, 600, 511, 90, 1]
        ids = ids_of(member, lengths[0])
        session = open_session(member)
        for length, expected in zip(lengths, fresh_logits(member, ids, lengths), strict=True):
            torch.testing.assert_close(sync(session, {0: ids[:length]})[0], expected, atol=1e-3, rtol=0)
            assert session.ids(0) == ids[:length]

    def test_nothing_is_computed_twice(self, tiny_smollm2: Member) -> None:
        ids = ids_of(tiny_smollm2, 60)
        session = open_session(tiny_smollm2)
        with forwards(tiny_smollm2) as seen:
            sync(session, {0: ids[:50]})
            first = sync(session, {0: ids[:51]})
            assert sync(session, {0: ids[:51]}).data_ptr() == first.data_ptr()
            sync(session, {0: [*ids[:48], 7, 8]})
            sync(session, {0: ids[:60]})
            sync(session, {0: ids[:58]})
        assert seen == [(1, 50), (1, 1), (1, 2), (1, 12), (1, 1)]
        assert session.tokens_fed == 50 + 1 + 2 + 12 + 1

    def test_logits_keep_shape_and_dtype(self, member: Member) -> None:
        logits = sync(open_session(member), {0: ids_of(member, 5)})
        assert logits.shape == (1, member.vocab_size)
        assert logits.dtype == member.backend.dtype == torch.float32

    def test_a_long_prompt_goes_in_chunks(self, windowed: Member, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forwards_module, "CHUNK", 256)
        ids = ids_of(windowed, 600)
        session = open_session(windowed)
        with forwards(windowed) as seen:
            logits = sync(session, {0: ids})
        assert seen == [(1, 256), (1, 256), (1, 88)]
        assert_fresh(windowed, {0: ids}, logits)

    def test_sessions_of_one_member_do_not_meet(self, tiny_smollm2: Member) -> None:
        ids = ids_of(tiny_smollm2, 40)
        one, two = open_session(tiny_smollm2), open_session(tiny_smollm2)
        sync(one, {0: ids[:30]})
        sync(two, {0: ids[::-1]})
        assert_fresh(tiny_smollm2, {0: ids}, sync(one, {0: ids}))


class TestBatch:
    def test_ragged_rows_equal_rows_alone(self, real: Member) -> None:
        """Prompts, then steps of one to several tokens, each row rolled back by its own number."""
        ids = ids_of(real, 400)
        session = open_session(real, lanes=5)
        targets = {row: ids[10 * row : 10 * row + n] for row, n in enumerate((7, 130, 64, 1, 33))}
        assert_fresh(real, targets, sync(session, targets))
        for step, (drop, add) in enumerate([(0, 1), (1, 2), (3, 1), (0, 4)]):
            for row in targets:
                depth = min(drop * (row % 3), len(targets[row]) - 1)
                kept = targets[row][: len(targets[row]) - depth]
                targets[row] = kept + ids[100 + row + step :][: add + row % 2]
            with forwards(real) as seen:
                logits = sync(session, targets)
            assert max(rows for rows, _ in seen) > 1  # together, not one by one
            assert_fresh(real, targets, logits)
            assert [session.ids(row) for row in range(5)] == list(targets.values())

    def test_past_the_window(self, windowed: Member) -> None:
        """Rows below, at and far past Gemma's window roll back by different depths in one forward."""
        ids = ids_of(windowed, 700)
        junk = ids_of(windowed, 90)[::-1]
        lengths, depths = (505, 512, 690), (40, 1, 3)
        session = open_session(windowed, lanes=3)
        sync(session, {row: ids[:n] for row, n in enumerate(lengths)})
        sync(session, {row: ids[: lengths[row]] + junk[: depths[row]] for row in range(3)})
        targets = {row: ids[: n + 2] for row, n in enumerate(lengths)}
        with forwards(windowed) as seen:
            logits = sync(session, targets)
        assert seen == [(3, 2)]
        assert_fresh(windowed, targets, logits)
        targets = {row: target[:-5] + junk[:1] for row, target in targets.items()}
        assert_fresh(windowed, targets, sync(session, targets))

    def test_rows_sit_out(self, tiny_smollm2: Member) -> None:
        """Any rows may take part in a step, in any order; what the others hold and know stays."""
        ids = ids_of(tiny_smollm2, 60)
        session = open_session(tiny_smollm2, lanes=8)
        targets = {row: ids[row : 20 + 2 * row] for row in range(8)}
        sync(session, targets)
        for chosen in [(0, 7), (6, 1), (3,), (5, 2, 4, 1), (0, 1, 2, 4, 5, 6, 7)]:
            step = {row: [*targets[row], 50 + row] for row in chosen}
            targets |= step
            assert_fresh(tiny_smollm2, step, sync(session, step))
        fed = session.tokens_fed
        assert_fresh(tiny_smollm2, targets, sync(session, targets))
        assert session.tokens_fed == fed

    def test_positions_by_row_feed_no_more_than_they_need(self, tiny_smollm2: Member) -> None:
        """A draft of each row's own length: one forward, and of a row that has none its one new token."""
        ids = ids_of(tiny_smollm2, 60)
        session = open_session(tiny_smollm2, lanes=3)
        held = {row: ids[row : 20 + 2 * row] for row in range(3)}
        sync(session, held)
        fed = session.tokens_fed
        with forwards(tiny_smollm2) as seen:
            counts = {0: 1, 1: 5, 2: 3}
            drafts = {row: [*held[row], *ids[40 : 40 + count]] for row, count in counts.items()}
            said = session.ask(drafts, 1, counts).wait().scores()
            assert seen == [(3, 5)]
            assert session.tokens_fed == fed + 1 + 5 + 3
            expected = [
                fresh_logits(tiny_smollm2, ids, [len(ids) - left for left in reversed(range(counts[row]))])
                for row, ids in drafts.items()
            ]
            torch.testing.assert_close(said, torch.cat(expected), atol=1e-3, rtol=0)
            seen.clear()
            # Row 1 knows its five, row 2 only the three it was fed; row 0 is asked for what it has.
            session.ask(drafts, 1, {0: 1, 1: 5, 2: 4})
            assert session.tokens_fed == fed + 1 + 5 + 3 + 4

    def test_no_copy_of_one_row_or_of_a_whole_forward(self, tiny_smollm2: Member) -> None:
        ids = ids_of(tiny_smollm2, 60)
        session = open_session(tiny_smollm2, lanes=2)
        targets = {0: ids[:20], 1: ids[5:25]}

        def asked(targets: dict[int, list[int]], positions: int | dict[int, int]) -> torch.Tensor:
            return session.ask(targets, 1, positions).wait().scores()

        whole = asked(targets, 3)
        row = whole.stride(0) * whole.element_size()
        assert asked(targets, {1: 3, 0: 3}).data_ptr() == whole.data_ptr()
        for lane, ids in targets.items():
            for positions in (1, 2, 3):
                one = asked({lane: ids}, positions)
                assert one.data_ptr() == whole.data_ptr() + row * (3 * lane + 3 - positions)
                assert one.shape == (positions, tiny_smollm2.vocab_size)
                assert one.is_contiguous()

    def test_released_rows(self, tiny_smollm2: Member) -> None:
        ids = ids_of(tiny_smollm2, 80)
        session = open_session(tiny_smollm2, lanes=4)
        targets = {row: ids[row : 30 + 5 * row] for row in range(4)}
        sync(session, targets)
        for row in (1, 0):
            session.release(row)
            del targets[row]
            targets = {row: [*target[:-2], 11, 12, 13] for row, target in targets.items()}
            with forwards(tiny_smollm2) as seen:
                logits = sync(session, targets)
            assert seen == [(len(targets), 3)]
            assert_fresh(tiny_smollm2, targets, logits)
        with pytest.raises(InputError, match=r"lane 1 was released"):
            sync(session, {1: ids})
        with pytest.raises(InputError, match=r"lane 4 is not one of 0\.\.3"):
            sync(session, {4: ids})

    def test_a_closed_session_holds_nothing(self, tiny_smollm2: Member) -> None:
        with open_session(tiny_smollm2, lanes=2) as session:
            sync(session, {0: [1, 2], 1: [3]})
            assert session._cache.nbytes > 0
        assert session._cache.nbytes == 0
        session.close()
        with pytest.raises(InputError, match="released"):
            sync(session, {0: [1, 2]})

    @pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
    def test_a_failed_forward_leaves_the_session_usable(self, windowed: Member, error: BaseException) -> None:
        """Half the layers hold the new states of all rows when the forward ends."""
        ids = ids_of(windowed, 80)
        session = open_session(windowed, lanes=3)
        before = {row: ids[: 40 + row] for row in range(3)}
        sync(session, before)
        with failing(windowed.model.model.layers[1], error), pytest.raises(type(error)):
            sync(session, {row: [*before[row][:-row], 5, 6, 7] for row in (1, 2)})
        assert [session.ids(row) for row in range(3)] == [ids[:40]] * 3
        targets = {row: ids[: 50 + row] for row in range(3)}
        assert_fresh(windowed, targets, sync(session, targets))

    def test_a_failure_while_prompts_are_read(self, tiny_smollm2: Member) -> None:
        """The first forward of all fails half way: nothing is held, the next call works."""
        ids = ids_of(tiny_smollm2, 300)
        session = open_session(tiny_smollm2, lanes=2)
        with failing(tiny_smollm2.model.model.layers[1], RuntimeError("x")), pytest.raises(RuntimeError):
            sync(session, {0: ids[:30], 1: ids[:35]})
        targets = {0: ids[5:300], 1: ids[:40]}  # more than there was room for
        assert_fresh(tiny_smollm2, targets, sync(session, targets))

    def test_rows_set_aside(self, member: Member) -> None:
        """Their lanes make place for those in use; they know what they held, and come back."""
        ids = ids_of(member, 80)
        session = open_session(member, lanes=6)
        targets = {row: ids[row : 30 + 5 * row] for row in range(6)}
        sync(session, targets)
        for gone, rest in [(0, 5), (5, 4), (2, 3), (1, 2)]:
            session.set_aside(gone)
            session.set_aside(gone)  # no harm
            targets = {row: [*one, 50 + row] for row, one in targets.items()}
            step = {row: targets[row] for row in range(6) if row not in session._lanes._aside}
            with forwards(member) as seen:
                logits = sync(session, step)
            assert seen == [(rest, 1)]  # none is run for nothing
            assert_fresh(member, step, logits)
            targets |= {row: session.ids(row) for row in session._lanes._aside}
        assert [len(session.ids(row)) for row in range(6)] == [30, 34 + 3, 38 + 2, 42 + 4, 46 + 4, 50 + 1]
        session.release(3)
        del targets[3]
        assert_fresh(member, targets, sync(session, targets))
        assert not session._lanes._aside
        targets = {row: [*one[:-3], 60 + row] for row, one in targets.items()}
        assert_fresh(member, targets, sync(session, targets))
        for row in targets:
            session.set_aside(row)
        assert_fresh(member, targets, sync(session, targets))

    def test_an_interrupted_exchange(self, tiny_smollm2: Member, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = ids_of(tiny_smollm2, 60)
        session = open_session(tiny_smollm2, lanes=3)
        targets = {row: ids[row : 20 + 5 * row] for row in range(3)}
        sync(session, targets)
        exchange = LaneCache.exchange

        def half(cache: LaneCache, one: int, other: int, end: int) -> None:
            exchange(cache, one, other, end // 2)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(LaneCache, "exchange", half)
            with pytest.raises(KeyboardInterrupt):
                session.set_aside(0)
        assert session.ids(1) == targets[1]
        assert_fresh(tiny_smollm2, targets, sync(session, targets))

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("alike", [0, 45])
    def test_other_families(self, tiny, monkeypatch: pytest.MonkeyPatch, family: str, alike: int) -> None:
        """Random histories: rows that grow, roll back, sit out, in batches of any size; some begin alike."""
        monkeypatch.setattr(attention, "_FEWEST_SPARED", 1)
        member = tiny(family)
        rng = random.Random(family)
        session = open_session(member, lanes=5)
        prefix = [rng.randrange(5, 999) for _ in range(alike)]
        held = {row: prefix + [rng.randrange(5, 999) for _ in range(rng.randint(1, 40))] for row in range(5)}
        assert_fresh(member, held, sync(session, held))
        for _ in range(12):
            for row in rng.sample(range(5), rng.randint(1, 5)):
                keep = len(held[row]) - rng.choice([0, 0, 1, 3, 25])
                new = [rng.randrange(5, 999) for _ in range(rng.randint(1, 4))]
                held[row] = held[row][: max(keep, 0)] + new
            part = {row: held[row] for row in rng.sample(range(5), rng.randint(2, 5))}
            session.set_aside(rng.randrange(5))
            assert_fresh(member, part, sync(session, part))
        first, second = fresh_logits(member, list(range(5, 10)) * 9, [5, 9 * 5])
        assert (first - second).abs().max() > 0.1  # the model does look back


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pieces go over fixed buffers, as on CUDA; here nothing is captured."""
    monkeypatch.setattr(module, "_on_fixed_buffers", lambda member, cache: True)


@pytest.mark.usefixtures("fixed")
class TestFixedBuffers:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_same_as_fresh_forwards(self, tiny, family: str) -> None:
        """Growing rows, rollbacks, rows that sit out or are released: each step over all lanes."""
        member = tiny(family)
        rng = random.Random(family)
        session = open_session(member, lanes=4, capacity=20)
        held = {row: [rng.randrange(5, 999) for _ in range(rng.randint(1, 20))] for row in range(4)}
        assert_fresh(member, held, sync(session, held))
        steps = 0
        for step in range(16):
            if step == 12:
                session.release(1)
                del held[1]
            for row in held:
                keep = max(len(held[row]) - rng.choice([0, 0, 1, 3]), 0)
                held[row] = held[row][:keep] + [rng.randrange(5, 999) for _ in range(rng.randint(1, 5))]
            part = {row: held[row] for row in rng.sample(sorted(held), rng.randint(1, len(held)))}
            with forwards(member) as seen:
                logits = sync(session, part)
            allowed = {(4, width) for width in fixed_steps.WIDTHS}
            assert all(shape in allowed for shape in seen if shape[1] <= 8)
            steps += sum(shape[1] <= 8 for shape in seen)
            assert_fresh(member, part, logits)
        assert steps > 10

    def test_few_shapes_for_any_positions(self, tiny) -> None:
        """A captured step's number of positions is one of a few; each row takes what it asked for."""
        member = tiny("gemma3_text")
        rng = random.Random(3)
        session = open_session(member, lanes=3, capacity=100)
        held = {row: [rng.randrange(5, 999) for _ in range(12 + row)] for row in range(3)}
        sync(session, held)
        asked = set()
        for _ in range(25):
            counts = {row: rng.randint(1, 8) for row in held}
            held = {row: [*ids[:20], *(rng.randrange(5, 999) for _ in range(8))] for row, ids in held.items()}
            held = {row: ids[: len(ids) - 8 + counts[row]] for row, ids in held.items()}
            said = session.ask(held, 1, counts).wait().scores()
            expected = [
                fresh_logits(member, ids, [len(ids) - left for left in reversed(range(counts[row]))])
                for row, ids in held.items()
            ]
            torch.testing.assert_close(said, torch.cat(expected), atol=1e-3, rtol=0)
            asked.add(max(counts.values()))
        assert len(asked) >= 4
        steps = {(width, positions) for width, _, positions in session._room.steps._steps}
        assert all(positions in fixed_steps.WIDTHS and positions <= width for width, positions in steps)
        assert len({positions for _, positions in steps}) >= 2

    @pytest.mark.parametrize("family", ["llama", "gemma3_text"])
    def test_writing_past_the_first_span(self, tiny, family: str) -> None:
        """Into buffers that have to grow: they do so before the first token, and stay where they are."""
        member = changed(tiny(family), context_length=400)
        rng = random.Random(5)
        session = open_session(member, lanes=3, capacity=100)
        held = {row: [rng.randrange(5, 999) for _ in range(250 + row)] for row in (0, 2)}
        sync(session, {row: ids[:200] for row, ids in held.items()})
        assert session._cache.slots == 256
        places = set()

        def choose(logits: torch.Tensor, n: int) -> torch.Tensor:
            places.update(buffer.data_ptr() for buffer in session._cache._buffers())
            return logits.topk(2).indices[:, n % 2]

        tokens, said = session.write(held, 1, 9, choose)
        assert session._cache.slots == 512
        assert len(places) == len(list(session._cache._buffers()))
        for (row, ids), written, logits in zip(
            held.items(), tokens.tolist(), said.scores().view(2, 10, -1), strict=True
        ):
            whole = ids + written
            assert session.ids(row) == whole
            expected = fresh_logits(member, whole, list(range(len(ids), len(whole) + 1)))
            # Of logits up to 20, after 250 tokens: an AMD EPYC differs by 0.0013 in 18 of 491,520.
            torch.testing.assert_close(logits, expected, atol=3e-3, rtol=0)

    def test_past_the_window_and_past_the_first_span(self, windowed: Member) -> None:
        ids = ids_of(windowed, 700)
        session = open_session(windowed, lanes=2)
        targets = {0: ids[:600], 1: ids[:254]}
        sync(session, targets)
        for n in (2, 8):
            targets = {row: [*target[:-1], *ids[n : 2 * n]] for row, target in targets.items()}
            assert_fresh(windowed, targets, sync(session, targets))

    def test_the_next_session_takes_the_buffers_over(self, tiny_smollm2: Member) -> None:
        """Also where the last one left states that are not finite."""
        ids = ids_of(tiny_smollm2, 60)
        with open_session(tiny_smollm2, lanes=2, capacity=100) as first:
            sync(first, {0: ids[:20], 1: ids[:30]})
            with torch.inference_mode():
                for layer in first._cache._own:
                    layer.keys.fill_(float("nan"))
                    layer.values.fill_(float("nan"))
            kept = first._cache
            for row in range(2):  # as a generation ends
                first.release(row)
        assert rooms.idle_bytes(tiny_smollm2.backend) == kept.nbytes > 0
        second = open_session(tiny_smollm2, lanes=2, capacity=200)
        assert second._cache is kept
        assert rooms.idle_bytes(tiny_smollm2.backend) == 0
        targets = {0: ids[:5], 1: ids[:7]}
        assert_fresh(tiny_smollm2, targets, sync(second, targets))
        second.close()
        second.close()
        third = open_session(tiny_smollm2, lanes=2, capacity=300)  # more than there is room for
        assert third._cache is not kept
        assert rooms.idle_bytes(tiny_smollm2.backend) == 0

    def test_a_first_step_that_fails_is_no_step(self, tiny) -> None:
        """What is captured next must find every layer's buffers made."""
        member = tiny("llama")
        session = open_session(member, lanes=2)
        with failing(member.model.model.layers[1], RuntimeError("x")), pytest.raises(RuntimeError):
            sync(session, {0: [5, 6], 1: [7]})
        assert session._room.steps._steps == {}
        targets = {0: [5, 6], 1: [7]}
        assert_fresh(member, targets, sync(session, targets))

    def test_changed_weights_take_no_room_over(self, tiny) -> None:
        member = tiny("llama")
        with open_session(member, lanes=2) as first:
            sync(first, {0: [5, 6], 1: [7]})
            kept = first._cache
        head = member.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
        assert open_session(member, lanes=2)._cache is not kept

    def test_a_failure_frees_the_buffers(self, tiny_smollm2: Member) -> None:
        session = open_session(tiny_smollm2, lanes=2)
        sync(session, {0: [1, 2], 1: [3]})
        with failing(tiny_smollm2.model.model.layers[1], RuntimeError("x")), pytest.raises(RuntimeError):
            sync(session, {0: [1, 2, 3]})
        session.close()
        assert session._cache.nbytes == rooms.idle_bytes(tiny_smollm2.backend) == 0


class TestAttention:
    @pytest.mark.parametrize(("queries", "mask_heads"), [(1, 1), (3, 1), (65, 1), (3, 4)])
    @pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
    def test_shared_heads_equal_repeated_ones(
        self, queries: int, mask_heads: int, mask_dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        query, key = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 70, 8)
        mask = torch.rand(2, mask_heads, queries, 70) < 0.5
        mask[..., 0] = True
        if mask_dtype != torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
        owner = SimpleNamespace(num_key_value_groups=2, is_causal=True)
        ours, _ = attention._attention(owner, query, key, key + 1, mask, scaling=0.3)
        theirs, _ = sdpa_attention_forward(owner, query, key, key + 1, mask, scaling=0.3)
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("heads", [2, 4])
    @pytest.mark.parametrize(("first", "window"), [(0, None), (0, 70), (30, 40), (45, 9)])
    @pytest.mark.parametrize("queries", [1, 3, 65])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_states_in_common_are_read_once(
        self,
        monkeypatch: pytest.MonkeyPatch,
        heads: int,
        first: int,
        window: int | None,
        queries: int,
        dtype: torch.dtype,
    ) -> None:
        """Of 200 slots all rows have the first 40; a window begins with the prefix, within it or after it."""
        torch.manual_seed(0)
        query, states = torch.randn(3, heads, queries, 8).to(dtype), torch.randn(2, 3, 2, 200, 8).to(dtype)
        states[:, 1:, :, :40] = states[:, :1, :, :40]
        lengths = torch.tensor([44, 80, 110])
        positions = lengths[:, None] + torch.arange(queries)
        slots = torch.arange(200)
        hidden = slots > positions[:, :, None]
        if window is not None:
            hidden |= slots <= positions[:, :, None] - window
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
        owner = SimpleNamespace(num_key_value_groups=heads // 2, is_causal=True)
        inputs = owner, query, *states[..., first:, :], mask[..., first:]
        whole, _ = sdpa_attention_forward(*inputs, scaling=0.3)
        calls = []
        parts = attention._in_two_parts
        monkeypatch.setattr(attention, "_in_two_parts", lambda *a: (calls.append(a), parts(*a))[1])
        monkeypatch.setattr(attention, "_FEWEST_SPARED", 2)
        with attention.states_in_common(40, 200):
            ours, _ = attention._attention(*inputs, scaling=0.3)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, whole, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
        assert len(calls) == (first < 40)
        attention._attention(*inputs, scaling=0.3)
        assert len(calls) == (first < 40)  # outside nothing is in common

    def test_a_session_turns_it_on(self, tiny_smollm2: Member, tiny) -> None:
        open_session(tiny_smollm2)
        assert tiny_smollm2.model.config._attn_implementation == attention.NAME
        eager = tiny("gemma2", attn_implementation="eager")
        open_session(eager)
        assert eager.model.config._attn_implementation == "eager"


class TestGroups:
    def test_padding_is_worth_its_forward(self) -> None:
        """Decode steps go together, a long prompt does not pad short ones."""
        assert feed_plan.groups({0: 1, 3: 1, 5: 1}, "cpu") == [[0, 3, 5]]
        assert feed_plan.groups({0: 1, 1: 3, 2: 1}, "cpu") == [[0, 1, 2]]
        assert feed_plan.groups({0: 300, 1: 2, 2: 200, 3: 1}, "cpu") == [[1, 3], [2], [0]]
        assert feed_plan.groups({}, "cpu") == []

    def test_the_cheapest_cut(self) -> None:
        rng = random.Random(1)
        fixed = feed_plan._FORWARD_COST["cpu"]
        for _ in range(50):
            new = {row: rng.choice([1, 2, 3, 20, 400, 3000]) for row in range(rng.randint(1, 6))}
            groups = feed_plan.groups(new, "cpu")
            assert sorted(row for group in groups for row in group) == sorted(new)
            assert all(
                len(group) * max(new[row] for row in group) <= feed_plan.CHUNK
                for group in groups
                if len(group) > 1
            )
            cost = sum(fixed + len(group) * max(new[row] for row in group) for group in groups)
            assert cost <= sum(fixed + n for n in new.values())  # one by one


class TestMemory:
    def test_the_estimate_holds_the_cache(self, real: Member) -> None:
        """The cache's part of it is what is really allocated; of real models the rest is little."""
        session = open_session(real, lanes=3)
        sync(session, {row: ids_of(real, 290) for row in range(3)})
        allocated = session._cache.nbytes
        cpu = torch.device("cpu")
        assert cache_bytes(real.backend, 3, 290) == {cpu: allocated}
        logits = 3 * real.vocab_size * 4
        assert allocated + logits < estimate_bytes(real.backend, 3, 290)[cpu] < 2 * allocated + 4 * logits
        assert estimate_bytes(real.backend, 6, 290)[cpu] > 1.9 * allocated

    @pytest.mark.parametrize(
        ("capability", "config", "workspace"),
        [
            ((8, 9), None, 8_519_680),  # :4096:2:16:8
            ((9, 0), None, 33_554_432),
            ((9, 0), ":16:8", 131_072),
            ((8, 0), ":4096:2:16:8", 8_519_680),
            ((9, 0), "none", 33_554_432),
        ],
    )
    def test_the_estimate_on_cuda_has_cublas_s_workspace(
        self, member: Member, monkeypatch: pytest.MonkeyPatch, capability, config, workspace: int
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        if config is not None:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
        on_cuda = replace(member.backend, device=torch.device("cuda:0"))
        (more,), (less,) = (estimate_bytes(one, 3, 290).values() for one in (on_cuda, member.backend))
        assert more - less == workspace

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_estimate_of_other_families(self, tiny, family: str) -> None:
        member = tiny(family)
        session = open_session(member, lanes=2)
        sync(session, {0: [5, 6], 1: [7]})
        assert session._cache.nbytes == sum(cache_bytes(member.backend, 2, 2).values())

    def test_available_bytes_are_the_kernel_s(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Of the real machine no more than the order is sure: other tests take and free memory meanwhile.
        assert 0 < memory.available_bytes(torch.device("cpu")) < psutil.virtual_memory().total
        monkeypatch.setattr(memory, "_CGROUP_FILES", ())
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
        (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemFree: 10 kB\nMemAvailable:      70 kB\n")
        # The weights that this process has mapped are not to be had, though the kernel would give them away.
        (tmp_path / "status").write_text("RssAnon:\t      40 kB\nRssFile:\t      20 kB\n")
        assert memory.available_bytes(torch.device("cpu")) == 50 * 1024
        (tmp_path / "status").write_text("RssFile:\t      80 kB\n")
        assert memory.available_bytes(torch.device("cpu")) == 0

    def test_weights_that_were_read_are_not_available(self, tiny_smollm2: Member) -> None:
        """They are mapped from their file, which the kernel counts as available."""
        sync(open_session(tiny_smollm2), {0: [1, 2]})
        weights = sum(one.nbytes for one in tiny_smollm2.model.parameters())
        assert memory._kernel_bytes(memory._STATUS, "RssFile") > weights

    def test_a_control_group_sets_the_bound(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
        (tmp_path / "meminfo").write_text("MemAvailable: 70 kB\n")
        (tmp_path / "status").write_text("RssFile: 0 kB\n")
        limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
        monkeypatch.setattr(memory, "_CGROUP_FILES", ((limit, used),))
        used.write_text("9000\n")
        (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 3000\n")
        limit.write_text("10000\n")
        assert memory.available_bytes(torch.device("cpu")) == 4000
        limit.write_text("max\n")
        assert memory.available_bytes(torch.device("cpu")) == 70 * 1024


LONG, SHORT = [1.0, 2.0, 4.0, 8.0], [1.0] * 4
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": LONG, "short_factor": SHORT}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CHANGING = {  # rotary positions that have other frequencies in texts of more than 16 tokens
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": None},
    "llama": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
}


@pytest.mark.parametrize("family", CHANGING)
class TestChangingRotaryPositions:
    """Up to the limit they are those of any shorter text, and no text may go on beyond."""

    @pytest.fixture
    def member(self, tiny, tiny_smollm2: Member, family: str) -> Member:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = tiny(family, **CHANGING[family]).model
            made = member_of(model, tiny_smollm2.tokenizer, family)
        assert made.context_length == 16
        lowered = [str(one.message) for one in said if "its config says" in str(one.message)]
        assert len(lowered) == (family == "phi3")  # llama's config says 16 itself
        return made

    def test_the_text_is_that_of_transformers_up_to_the_limit(self, member: Member) -> None:
        session, ids = open_session(member), ids_of(member, 6)
        expected = member.model.generate(
            torch.tensor([ids]), max_length=16, min_length=16, do_sample=False, pad_token_id=0
        )[0].tolist()
        while len(ids) < 16:
            logits = sync(session, {0: ids})
            assert_fresh(member, {0: ids}, logits)
            ids = [*ids, int(logits[0].argmax())]
        assert ids == expected
        assert_fresh(member, {0: ids}, sync(session, {0: ids}))

    def test_several_texts_and_rollbacks(self, member: Member) -> None:
        session, ids = open_session(member, lanes=3), ids_of(member, 30)
        for targets in ({0: ids[:16], 1: ids[5:9], 2: ids[2:17]}, {0: ids[:7], 1: ids[5:21], 2: ids[2:18]}):
            assert_fresh(member, targets, sync(session, targets))

    def test_beyond_the_limit_is_an_error(self, member: Member) -> None:
        ids = ids_of(member, 18)
        with torch.inference_mode():
            begun = member.model(torch.tensor([ids[:14]]), use_cache=True).past_key_values
            on = member.model(torch.tensor([ids[14:]]), past_key_values=begun).logits[0, -1]
        apart = (on - fresh_logits(member, ids, [18])[0]).abs().max()
        assert apart > 0.05  # what a text in pieces would get
        with pytest.raises(InputError, match="18 tokens exceed its context of 16"):
            sync(open_session(member), {0: ids})
        for longer in (17, None):
            with pytest.raises(ModelError, match=f"^{member.name}: its rotary .* with context_length=16"):
                open_session(changed(member, context_length=longer))


class TestBadInput:
    def test_bad_ids(self, tiny_smollm2: Member) -> None:
        short = changed(tiny_smollm2, context_length=10)
        session = open_session(short)
        with pytest.raises(InputError, match=rf"^{short.name}: 11 tokens exceed its context of 10"):
            sync(session, {0: ids_of(short, 11)})
        assert sync(session, {0: ids_of(short, 10)}).shape == (1, short.vocab_size)
        with pytest.raises(InputError, match="nothing to feed"):
            sync(session, {0: []})
        with pytest.raises(InputError, match=r"0\.\.49151"):
            sync(session, {0: [49152]})
        with pytest.raises(InputError, match="number of lanes is 0; choose 1 or more"):
            open_session(short, lanes=0)

    def test_the_row_is_named_and_the_others_untouched(self, tiny_smollm2: Member) -> None:
        session = open_session(tiny_smollm2, lanes=3)
        sync(session, {0: [1, 2], 1: [3], 2: [4]})
        with pytest.raises(InputError, match=rf"{tiny_smollm2.name}, lane 2: nothing to feed"):
            sync(session, {0: [1, 2, 3], 2: []})
        assert session.ids(0) == [1, 2]
        assert sync(session, {}).shape == (0, tiny_smollm2.vocab_size)

    def test_a_model_that_cannot_roll_back_is_refused(self, tiny) -> None:
        with pytest.raises(ModelError, match=r"mamba: .*cannot be rolled back"):
            open_session(tiny("mamba", state_size=4))

    def test_and_is_refused_by_an_ensemble_at_once(self, tiny, tiny_smollm2: Member) -> None:
        with pytest.raises(ModelError, match=r"mamba: .*cannot be rolled back"):
            Ensemble([tiny_smollm2, tiny("mamba", state_size=4)])

    @pytest.mark.parametrize(
        ("family", "settings", "reason"),
        [
            ("bloom", {"n_layer": 1, "n_head": 4}, "takes no position_ids"),
            ("llama4_text", {"attention_chunk_size": 16, "num_local_experts": 2}, "has chunked attention"),
            ("llama", {"attn_implementation": "flex_attention"}, "has attention 'flex_attention'; load it"),
        ],
    )
    def test_a_model_that_runs_no_ragged_rows(self, tiny, family: str, settings: dict, reason: str) -> None:
        member = tiny(family, **settings)
        with pytest.raises(ModelError, match=f"^{family}: this model .*{reason}"):
            open_session(member, lanes=2)
        ids = list(range(5, 30))
        # flex_attention compiles itself for half a minute, and what it gives is the same without.
        with torch.compiler.set_stance("force_eager"):
            assert_fresh(member, {0: ids}, sync(open_session(member), {0: ids}))

    def test_different_windows_and_one_mask(self, windowed: Member, monkeypatch: pytest.MonkeyPatch) -> None:
        """A model whose code would not take one mask for each layer type."""
        monkeypatch.setattr(type(windowed.model.model), "forward", lambda self, input_ids: None)
        with pytest.raises(ModelError, match="layers with different windows but takes one mask for all"):
            open_session(windowed, lanes=2)
