"""Members in llama.cpp: their texts against plain loops over the library's logits; what sessions keep."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gguf_files import CountingLlama, dequantised, write_tiny_model

from deepen_ext import Ensemble, demo, fuse_logits, load_members
from deepen_ext.decoding.drafts.draft_settings import DraftSettings
from deepen_ext.errors import ModelError
from deepen_ext.measure.likelihood.readings import Reading
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.members.distribution import Distribution, joined
from deepen_ext.members.gguf.facts import read_facts
from deepen_ext.members.llama_cpp.context import Context, Feed
from deepen_ext.members.llama_cpp.library import load_library
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.members.llama_cpp.threads import Threads
from deepen_ext.members.member import Member

PROMPTS = [
    "The three primary colours are",
    "Il était une fois, dans une ville de France, un vieux roi qui",
    "def fib(n):\n    ",
    "Question: A train leaves at 3 and arrives at 5. How long does it take?\nAnswer:",
]


@pytest.fixture(scope="module")
def quantised() -> list[Member]:
    """The demo pair from its own files."""
    return load_members(demo.members(), backend="llama.cpp")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """The demo pair from float32 files."""
    folder = tmp_path_factory.mktemp("float32")
    files = [dequantised(file, folder / file.name) for file in demo.members()]
    return load_members(files, backend="llama.cpp")


class PlainMember:
    """One sequence in a context of its own, read with nothing but `llama_decode`."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.context: Context = member.backend.new_context(1, 512)
        self.held: list[int] = []

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of the token after these ids: [1, V]."""
        same = [a == b for a, b in zip(self.held, ids, strict=False)]
        keep = min(same.index(False) if False in same else len(same), len(ids) - 1)
        assert self.context.remove(0, keep)
        self.held = ids
        return self.context.decode([Feed(0, keep, ids[keep:], 1)]).clone()


def plain_text(ensemble: Ensemble, prompt: str, new_tokens: int) -> list[int]:
    """Greedy decoding written out: no session, no hand-off but encoding the whole text again."""
    main, assistant = members = [PlainMember(one) for one in ensemble.members]
    vocabularies = [one.member.vocabulary for one in members]
    ids = vocabularies[0].prefix_ids + vocabularies[0].encode(prompt)
    text, written = prompt.encode(), []
    for _ in range(new_tokens):
        logits = main.logits([*ids, *written])
        logits[:, main.member.unwritable()] = -torch.inf
        try:
            whole = text.decode()
        except UnicodeDecodeError:
            pass  # the assistant waits until the character is finished
        else:
            theirs = assistant.logits(vocabularies[1].prefix_ids + vocabularies[1].encode(whole))
            rate = ensemble.fuser.learning_rate
            logits = fuse_logits([logits, theirs], ensemble.maps, [0.5, 0.5], learning_rate=rate)
        written.append(int(logits.argmax()))
        if written[-1] in main.member.eos_ids:
            break
        text += vocabularies[0].bytes_of(written[-1])
    return written


def unabridged(members: Sequence[Member]) -> Ensemble:
    """Every assistant speaks at every step, and every candidate has a relative row."""
    return Ensemble(members, fuser="deepen", boundary_aware=False, min_probability=0.0)


@pytest.mark.slow
class TestLikelihood:
    CONTEXT, CHOICES = PROMPTS[3], (" two hours", " 2", " eight", " It does not take any time at all.")

    def test_choices_read_together(self, exact: list[Member]) -> None:
        ensemble = Ensemble(exact, fuser="deepen", cache=False)
        readings = [TextReading(exact, self.CONTEXT, choice) for choice in self.CHOICES]
        TextReading.read_together(readings)
        for reading, choice in zip(readings, self.CHOICES, strict=True):
            alone = TextReading(exact, self.CONTEXT, choice)
            for member in exact:
                want = alone.member(member).logprobs
                assert reading.member(member).logprobs == pytest.approx(want, abs=5e-3)
            want = alone.fused(ensemble).logprobs
            assert reading.fused(ensemble, greedy=False).logprobs == pytest.approx(want, abs=5e-3)

    def test_what_was_said_after_one_ending_outlives_the_next_one(self, exact: list[Member]) -> None:
        member = exact[0]
        encode = member.vocabulary.encode
        reading = Reading(member, self.CONTEXT, self.CHOICES[3])
        endings = [member.vocabulary.prefix_ids + encode(self.CONTEXT + one) for one in (" Twelve", " A day")]
        numbers = reading.numbers_after(endings)
        assert numbers[0] != numbers[1]
        for ids, number in zip(endings, numbers, strict=True):
            want = PlainMember(member).logits(ids)
            torch.testing.assert_close(reading.said.take([number]).logits, want, atol=1e-3, rtol=0)


@pytest.mark.slow
class TestGreedyText:
    def test_as_a_plain_loop_over_the_librarys_logits(self, quantised: list[Member]) -> None:
        """A text by itself goes through the model in the same pieces: quantised weights are the same too."""
        ensemble = unabridged(quantised)
        for prompt in PROMPTS:
            assert ensemble.generate(prompt, max_new_tokens=16).token_ids == plain_text(ensemble, prompt, 16)

    def test_in_a_batch_of_ragged_prompts(self, exact: list[Member]) -> None:
        ensemble = unabridged(exact)
        wanted = [plain_text(ensemble, prompt, 10) for prompt in PROMPTS]
        alone = ensemble.generate(PROMPTS[1], max_new_tokens=10)
        found = ensemble.generate(PROMPTS, max_new_tokens=10)
        few = ensemble.generate(PROMPTS, max_new_tokens=10, batch_size=2)
        assert [one.token_ids for one in found.generations] == wanted
        assert [one.token_ids for one in few.generations] == wanted
        assert alone.token_ids == wanted[1]

    def test_with_and_without_the_skip(self, exact: list[Member]) -> None:
        ensemble = Ensemble(exact, fuser="deepen")
        plain, skipping = (
            ensemble.generate(PROMPTS, max_new_tokens=20, certified_skip=skip) for skip in (False, True)
        )
        assert skipping.timings.settled > len(PROMPTS)
        assert [one.token_ids for one in skipping] == [one.token_ids for one in plain]

    def test_with_and_without_drafts(self, exact: list[Member]) -> None:
        ensemble = Ensemble(exact, fuser="deepen")
        assert DraftSettings.read(ensemble.team, None, "auto").length is None  # on, as far as they pay
        plain = ensemble.generate(PROMPTS[:2], max_new_tokens=12, draft=0)
        assert sum(one.changed_tokens for one in plain) > 0
        for draft, drafter in ((None, "auto"), (3, "main"), (4, ensemble.names[1])):
            found = ensemble.generate(PROMPTS[:2], max_new_tokens=12, draft=draft, drafter=drafter)
            assert [one.token_ids for one in found] == [one.token_ids for one in plain]
            assert found.timings.stood > 0 or draft is None

    def test_quantised_members_draft_only_where_asked_to(self, quantised: list[Member]) -> None:
        """Among their near-ties another token could win."""
        ensemble = Ensemble(quantised, fuser="deepen")
        assert ensemble.generate(PROMPTS[0], max_new_tokens=12).timings.drafted == 0
        assert ensemble.generate(PROMPTS[0], max_new_tokens=12, draft=3).timings.drafted > 3


def tiny(folder: Path, family: str = "llama") -> CountingLlama:
    path = write_tiny_model(folder / f"{family}.gguf", family, vocab_size=120, context_length=2000)
    model = LlamaModel(load_library(), path, family, torch.device("cpu"))
    return CountingLlama(family, model, path, read_facts(path), threads=Threads(1, fixed=True))


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_says(backend: CountingLlama, said: Distribution, texts: Sequence[list[int]]) -> None:
    """What the backend says after these texts, each alone in a session of its own."""
    assert len(said) == len(texts)
    for i, ids in enumerate(texts):
        with backend.open() as session:
            want = session.ask({0: ids}, 5).wait().scores()
        torch.testing.assert_close(said.at([i]).scores(), want, atol=2e-3, rtol=0)


def test_what_pickle_and_copy_are_told(tmp_path: Path) -> None:
    backend = tiny(tmp_path)
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"^llama: a model in llama.cpp cannot be pickled.*each process"):
            attempt(backend)


def test_more_texts_than_it_can_run_at_once(tmp_path: Path) -> None:
    backend = tiny(tmp_path)
    with pytest.raises(ModelError, match=r"^llama: llama.cpp runs at most 256 texts.*257.*batch_size=256"):
        backend.open(257)
    with backend.open(256) as session:
        said = session.ask({255: ids_of(9), 0: ids_of(8)}, 5).wait().clone()
    assert_says(backend, said, [ids_of(9), ids_of(8)])


def test_logits_are_computed_where_they_are_asked_for(tmp_path: Path, monkeypatch) -> None:
    """Each lane's own number of them, in one forward."""
    backend = tiny(tmp_path)
    outputs: list[dict[int, int]] = []
    decode = Context.decode

    def seen(context: Context, feeds: Sequence[Feed]) -> torch.Tensor:
        outputs.append({feed.sequence: feed.outputs for feed in feeds})
        return decode(context, feeds)

    monkeypatch.setattr(Context, "decode", seen)
    with backend.open(3, 60) as session:
        held = {lane: ids_of(20 + lane, lane) for lane in range(3)}
        session.ask(held, 5).wait()
        counts = {2: 2, 0: 1, 1: 4}
        longer = {lane: [*ids, *ids_of(5, 7)] for lane, ids in held.items()}
        said = session.ask(longer, 5, counts).wait().clone()
    assert outputs == [dict.fromkeys(range(3), 1), counts]
    assert backend.tokens == 20 + 21 + 22 + 3 * 5
    assert_says(
        backend,
        said,
        [ids[: len(ids) - left] for lane, ids in longer.items() for left in reversed(range(counts[lane]))],
    )


class TestCaches:
    @pytest.mark.parametrize("family", ["llama", "gemma3", "mamba"])
    def test_a_cache_that_grows_keeps_what_it_has(self, tmp_path: Path, family: str) -> None:
        """Each token is read once, though the caches are four."""
        backend = tiny(tmp_path, family)
        one, other = ids_of(1300), [*ids_of(90, 1), 3]
        with backend.open(2) as session:
            said = [session.ask({1: other[:-1]}, 5).wait().clone()]
            said += [
                session.ask({0: one[:length]}, 5).wait().clone() for length in (100, 250, 251, 600, 1300)
            ]
            said.append(session.ask({1: other}, 5).wait().clone())
            assert backend.tokens == 1300 + len(other)
        lengths = (100, 250, 251, 600, 1300)
        assert_says(backend, joined(said), [other[:-1], *(one[:length] for length in lengths), other])

    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_lanes_that_no_text_has_used_take_no_memory(self, tmp_path: Path, family: str) -> None:
        """One long text among 32 lanes; the longest of them all would be 32 times as much."""
        backend = tiny(tmp_path, family)
        short, long = [ids_of(20), ids_of(30, 1)], ids_of(1500)
        with backend.open(32, 64) as session:
            session.ask(dict(enumerate(short)), 5)
            for length in (100, 700, 1500):
                session.ask({2: long[:length]}, 5)
            # Of own cells each of the first 4 lanes has as many as the longest.
            most = 4 * 2048 if family == "gemma3" else 2 * 1550
            assert 0 < sum(session.bytes_held.values()) <= backend.cache_bytes(most)
            targets = {31: ids_of(40, 2), 0: [*short[0], 5], 2: [*long, 5]}
            said = session.ask(targets, 5).wait().clone()
        assert_says(backend, said, list(targets.values()))

    @pytest.mark.parametrize("family", ["llama", "gemma3"])
    def test_texts_that_have_gone_take_no_memory_beside_others(self, tmp_path: Path, family: str) -> None:
        """No more than `bytes_needed` says of those that are there."""
        backend = tiny(tmp_path, family)
        short, long = ids_of(40, 2), ids_of(1500)
        with backend.open(32, 64) as session:
            session.ask({0: long}, 5)
            session.set_aside(0, forget=True)
            for used in (2, 3, 5, 9, 17, 32):  # a long text's room, once for each, would be too much
                said = session.ask(dict.fromkeys(range(used), short), 5).wait().clone()
                most = max(backend.bytes_needed(32, 256, used).values(), default=0)
                assert sum(session.bytes_held.values()) <= max(most, backend.cache_bytes(2048))
            for lane in range(32):
                session.set_aside(lane, forget=True)
            again = session.ask({0: long}, 5).wait().clone()
            assert sum(session.bytes_held.values()) <= backend.cache_bytes(4096)
        assert_says(backend, joined([said, again]), [short] * 32 + [long])

    @pytest.mark.parametrize("family", ["llama", "gemma3", "mamba"])
    def test_prompts_that_begin_alike_are_read_once(self, tmp_path: Path, family: str) -> None:
        backend = tiny(tmp_path, family)
        ends = [ids_of(5 + lane, lane + 1) for lane in range(4)]
        texts = [[*ids_of(200), *end] for end in ends]
        with backend.open(4, 300) as session:
            said = session.ask(dict(enumerate(texts)), 5).wait().clone()
            once = 200 + sum(map(len, ends))
            assert backend.tokens == (once if backend.shares else once + 3 * 200)
            longer = [[*text, 7] for text in texts]
            more = session.ask(dict(enumerate(longer)), 5).wait().clone()
        assert_says(backend, joined([said, more]), [*texts, *longer])

    def test_what_leaves_a_window_comes_back(self, tmp_path: Path) -> None:
        """Gemma's tiny copy has windows of 16: texts far beyond it are cut far back, among others."""
        backend = tiny(tmp_path, "gemma3")
        with backend.open(3, 200) as session:
            session.ask({lane: ids_of(150, lane) for lane in range(3)}, 5)
            for cut in (140, 120, 60, 10):
                targets = {lane: [*ids_of(150, lane)[:cut], 5, 6] for lane in (2, 0)}
                said = session.ask(targets, 5).wait().clone()
                assert_says(backend, said, list(targets.values()))

    def test_logits_outlive_the_buffer_that_they_lie_in(self, tmp_path: Path) -> None:
        """They may be overwritten, but their memory stays: the next forward, a larger buffer, the end."""
        backend = tiny(tmp_path)
        kept = []
        for _ in range(20):
            with backend.open(2) as session:
                kept.append(session.ask({0: ids_of(20)}, 5).wait())
                kept.append(session.ask({0: ids_of(90), 1: ids_of(80)}, 5, 40).wait())
                last = session.ask({0: ids_of(30, 2)}, 5, 30).wait()
                kept.append(last)
        assert all(bool(torch.isfinite(one.scores()).all()) for one in kept)
        assert_says(backend, last, [ids_of(30, 2)[: n + 1] for n in range(30)])
