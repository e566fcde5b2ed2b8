"""What a backend says of itself, what comes back from it, and what is refused where it lacks something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from asking import K, ask, fresh, opened, text
from subjects import Subject

from deepen_ext.errors import InputError
from deepen_ext.fusers.parts import Part
from deepen_ext.members.backend import Backend, require
from deepen_ext.members.member import Member


class TestFacts:
    def test_what_it_says_of_itself(self, subject: Subject) -> None:
        backend = subject.backend
        assert backend.name
        assert backend.vocab_size == subject.vocab_size
        assert backend.context_length == subject.context_length
        assert backend.device == subject.device
        most = backend.capabilities.max_topk
        assert most is None or 1 <= most <= backend.vocab_size

    def test_a_description_for_readers(self, subject: Subject) -> None:
        described = subject.backend.describe()
        assert described.architecture
        assert described.dtype == subject.dtype
        for figure in (described.parameters, described.weights_bytes, described.cache_bytes):
            assert figure is None or (isinstance(figure, int) and figure > 0)

    def test_tokens_depend_on_the_whole_text(self, subject: Subject) -> None:
        """Else no comparison of this suite would show anything."""
        ids = text(30)
        said = fresh(subject, ids).topk
        for at in (0, 10, 28):
            other = fresh(subject, [*ids[:at], (ids[at] + 3) % 100, *ids[at + 1 :]]).topk
            assert float((said.probs.log() - other.probs.log()).abs().max()) > 2 * subject.tolerance


class TestWhatComesBack:
    def test_a_distribution_is_what_the_capabilities_say(self, subject: Subject, lanes: int) -> None:
        backend = subject.backend
        targets = {lane: text(9 + lane, lane) for lane in range(lanes)}
        with opened(backend, lanes) as session:
            for k in (1, 5, K, subject.vocab_size, subject.vocab_size + 10):
                size = min(k, backend.capabilities.max_topk or k, subject.vocab_size)
                for positions in (1, 3):
                    said = session.ask(targets, k, positions).wait()
                    assert len(said) == lanes * positions
                    assert said.name == backend.name
                    assert said.vocab_size == subject.vocab_size
                    assert said.k == size
                    assert said.device == said.topk.probs.device == backend.device
                    ids, probs, tail, status = said.topk
                    assert ids.shape == probs.shape == (len(said), size)
                    assert tail.shape == status.shape == (len(said),)
                    assert ids.dtype == status.dtype == torch.int32
                    assert probs.dtype == tail.dtype == torch.float32
                    assert status.tolist() == [0] * len(said)
                    assert all(len(set(row)) == size for row in ids.tolist())
                    assert 0 <= int(ids.min()) <= int(ids.max()) < subject.vocab_size
                    torch.testing.assert_close(probs.sum(1) + tail, torch.ones(len(said)))
                    assert bool((tail >= 0).all())

    def test_probabilities_are_those_of_the_softmax(self, subject: Subject) -> None:
        """Of full logits, where there are any; those are [n, V] in the model's dtype."""
        with opened(subject.backend) as session:
            said = session.ask({0: text(20)}, K, 4).wait()
        assert (said.logits is not None) == subject.backend.capabilities.logits
        if said.logits is not None:
            assert said.logits.shape == (4, subject.vocab_size)
            assert said.logits.is_contiguous()
            assert str(said.logits.dtype) == f"torch.{subject.dtype}"
            whole = said.logits.double().softmax(-1)
            torch.testing.assert_close(said.topk.probs, whole.gather(1, said.topk.ids.long()).float())
            torch.testing.assert_close(said.topk.probs, whole.topk(K).values.float())

    def test_sorted_down_with_ties_to_the_lower_id(self, subject: Subject) -> None:
        with opened(subject.backend) as session:
            ids, probs, _, _ = session.ask({0: text(40)}, K, 30).wait().topk
        assert bool((probs.diff() <= 0).all())
        tied = probs.diff() == 0
        assert bool((ids.diff()[tied] > 0).all())
        if subject.plain is not None:  # these have tokens that tie (`subjects._model`)
            assert int(tied.sum()) > 5

    def test_nothing_asked_is_nothing_said(self, subject: Subject, lanes: int) -> None:
        with opened(subject.backend, lanes) as session:
            for positions in (1, 3):
                said = session.ask({}, K, positions).wait()
                assert len(said) == 0
                assert said.topk.ids.shape == (0, min(K, subject.backend.capabilities.max_topk or K))
                ask(subject, session, {0: text(7)})


class TestRefusals:
    """What a backend lacks is refused with the member's name; what it has is given."""

    def test_logits(self, backend: Backend) -> None:
        with opened(backend) as session:
            said = session.ask({0: text(5)}, K).wait()
        part = Part(0, "logits of it", said.topk, [0], said)
        if backend.capabilities.logits:
            require(backend, "logits", "this")
            assert part.logits is said.logits
            return
        with pytest.raises(InputError, match=rf"^{backend.name}: this needs .*'logits'.*leave this out"):
            require(backend, "logits", "this")
        with pytest.raises(InputError, match=rf"^{backend.name}: there are no full logits"):
            _ = part.logits

    def test_what_a_member_has_of_its_model(self, backend: Backend) -> None:
        nothing: Any = None  # for what neither of the two looks at
        member = Member(backend.name, backend, nothing, nothing, ())
        found = backend.embedding()
        if found is not None:
            assert found.dim() == 2
            assert torch.equal(member.embedding, found)
        else:
            with pytest.raises(InputError, match=rf"^{backend.name}: .*embeddings.*recipe='bytes'"):
                _ = member.embedding
        if getattr(backend, "model", None) is not None:
            assert member.model is backend.model  # type: ignore[attr-defined]
        else:
            with pytest.raises(InputError, match=rf"^{backend.name}: .*{type(backend).__name__}"):
                _ = member.model


class TestMemory:
    def test_more_lanes_and_tokens_take_more(self, own: Subject) -> None:
        small, lanes, tokens = (
            own.backend.bytes_needed(*size) for size in ((1, 100), (4, 100), (1, 100_000))
        )
        assert set(small) == set(lanes) == set(tokens)  # {} where it is remote
        for device, size in small.items():
            assert isinstance(device, torch.device)
            assert 0 < size < lanes[device]
            assert size < tokens[device] or not own.cuts

    def test_lanes_that_are_not_used_take_no_more_than_others(self, own: Subject) -> None:
        one, used, all_ = (own.backend.bytes_needed(*size) for size in ((1, 60), (4, 60, 1), (4, 60)))
        with opened(own.backend, 4) as session:
            session.ask({0: text(60)}, K).wait()
            for device, size in session.bytes_held.items():
                assert one[device] <= used[device] <= all_[device]
                assert size <= used[device] or not own.cuts

    def test_what_a_session_holds(self, own: Subject) -> None:
        needed = own.backend.bytes_needed(2, 60)
        with opened(own.backend, 2) as session:
            before = session.bytes_held
            session.ask({0: text(60), 1: text(50)}, K).wait()
            held = session.bytes_held
            assert set(before) == set(held) == set(needed)
            for device, size in held.items():
                assert before[device] <= size
                assert 0 < size <= needed[device] or not own.cuts
        assert sum(session.bytes_held.values()) == 0

    def test_what_is_kept_idle(self, own: Subject) -> None:
        """It is not counted again; closing the backend gives it back."""
        needed = own.backend.bytes_needed(2, 60)
        with opened(own.backend, 2) as session:
            session.ask({0: text(60), 1: text(50)}, K).wait()
        left = own.backend.bytes_needed(2, 60)
        assert all(0 <= left[device] <= needed[device] for device in needed)
        own.backend.close()
        assert own.backend.bytes_needed(2, 60) == needed


class TestFingerprint:
    def test_other_weights_tell_and_other_precisions_do_not(self, own: Subject) -> None:
        changed, coarse = own.other_weights()
        assert own.backend.fingerprint() == own.backend.fingerprint()
        assert own.backend.fingerprint() != changed.fingerprint()
        assert own.backend.fingerprint(torch.bfloat16) == coarse.fingerprint(torch.bfloat16)
        assert changed.fingerprint(torch.bfloat16) != coarse.fingerprint(torch.bfloat16)
