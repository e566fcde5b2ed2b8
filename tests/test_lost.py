"""A member that is lost while an ensemble writes: what is kept, who goes on, and that nothing stays open."""

from __future__ import annotations

import json
import os
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import run as run_command
from losing_backend import EVERYTHING, QUESTIONS, Losing, backend_of, losing
from tiny_models import PROSE, one_byte_tokens, save_model, tiny_reader
from tokenizers import Tokenizer, trainers

from deepen_ext import Ensemble
from deepen_ext.adapters.logits_processor import DeepenLogitsProcessor
from deepen_ext.decoding.generation import BatchGeneration, Generation
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.errors import InputError, MemberLost, ModelError
from deepen_ext.measure.evaluation.runner import evaluate
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.presets import Preset, load_preset, write_preset

PROMPT = PROSE[:40]
LONG = [PROSE[:360], PROSE[600:960]]  # read one by one; short prompts are asked for together
LOSSES = int(os.environ.get("DEEPEN_LOSSES", "70"))
PROMPTS = [PROMPT, PROSE[200:230], "Once", PROSE[700:790], "The first"]
NEW = 16
# The assistants count for much, and are asked about every token.
LOUD: dict[str, Any] = {"fuser": "deepen", "learning_rate": 1.0, "boundary_aware": False, "cache": False}


def _trained(size: int) -> Tokenizer:
    """Single bytes, and so many tokens in all, the longer ones learned from prose."""
    tokenizer = one_byte_tokens()
    alphabet = sorted(tokenizer.get_vocab().keys() - {"<eos>"})
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """A main model of single bytes and two assistants of longer tokens, all of which may be lost."""
    found = []
    for i, (name, tokenizer) in enumerate(
        [("main", one_byte_tokens()), ("first", _trained(330)), ("second", _trained(420))]
    ):
        folder = save_model(tmp_path_factory.mktemp("models") / name, tokenizer, seed=i)
        read = PROSE[300 * i : 300 * i + 1200]
        found.append(losing(tiny_reader(load_member(folder), name, read, seed=i + 1)))
    return found


@pytest.fixture(autouse=True)
def _all_there(members: list[Member]) -> Iterator[None]:
    """Before a test all are there; after it none of their sessions is open."""
    for member in members:
        backend_of(member).arm(None)
        backend_of(member).elsewhere = False
    yield
    for member in members:
        backend_of(member).check_free()


@pytest.fixture(scope="module")
def ensembles(members: list[Member]) -> Callable[..., Ensemble]:
    """Ensembles of these members by their indices, each made once."""
    made: dict[Any, Ensemble] = {}

    def get(*indices: int, **settings: Any) -> Ensemble:
        key = indices, repr(sorted(settings.items()))
        if key not in made:
            made[key] = Ensemble([members[i] for i in indices], **{**LOUD, **settings})
        return made[key]

    return get


def lose(member: Member, at: int, kinds: tuple[str, ...] = QUESTIONS) -> Losing:
    backend_of(member).arm(at, kinds)
    return backend_of(member)


def write(ensemble: Ensemble, prompt: Any = PROMPT, **settings: Any) -> Any:
    return ensemble.generate(prompt, **{"max_new_tokens": NEW, "draft": 0, **settings})


def smaller_from(ensemble: Ensemble, whole: Generation, prompt: str, at: int, **settings: Any) -> list[int]:
    """What an ensemble writes of a text whose first `at` new tokens are there."""
    text = prompt + ensemble.members[0].vocabulary.decode(whole.token_ids[:at]).decode()
    return ensemble.generate(text, max_new_tokens=NEW - at, draft=0, **settings).token_ids


class TestStop:
    @pytest.mark.parametrize("at", [0, 1, 9, 20])
    def test_the_error_has_what_was_written(self, ensembles, members: list[Member], at: int) -> None:
        whole = write(ensembles(0, 1, 2))
        lose(members[1], at)
        with pytest.raises(MemberLost) as caught:
            write(ensembles(0, 1, 2))
        (written,) = caught.value.generations
        assert written.token_ids == whole.token_ids[: len(written.token_ids)]
        assert len(written.token_ids) >= at // 2 - 1
        assert whole.text.startswith(written.text)
        assert (written.finish_reason, written.lost) == ("member_lost", {})
        assert caught.value.member == "first"
        message = str(caught.value)
        assert message.startswith("first: gone at ")
        assert "'continue'" in message
        told = (
            f". {len(written.token_ids)} tokens were written before: they are in this error's `generations`"
        )
        assert message.endswith(told if written.token_ids else "without an assistant that is lost")
        assert write(ensembles(0, 2)).text  # the others are as they were

    def test_it_survives_pickling(self, ensembles, members: list[Member]) -> None:
        lose(members[1], 6)
        with pytest.raises(MemberLost) as caught:
            write(ensembles(0, 1))
        again = pickle.loads(pickle.dumps(caught.value))
        assert (str(again), again.generations) == (str(caught.value), caught.value.generations)

    def test_the_main_model(self, ensembles, members: list[Member]) -> None:
        for on_failure in ("stop", "continue"):
            lose(members[0], 7)
            with pytest.raises(
                MemberLost, match=r"main: gone at .*the main model, without which no text goes on"
            ):
                write(ensembles(0, 1, on_failure=on_failure))

    def test_a_batch_with_texts_that_wait(self, ensembles, members: list[Member]) -> None:
        whole = write(ensembles(0, 1), PROMPTS, batch_size=2)
        lose(members[1], 2 * NEW + 9)
        with pytest.raises(MemberLost, match=r"tokens of 5 texts were written") as caught:
            write(ensembles(0, 1), PROMPTS, batch_size=2)
        written = caught.value.generations
        assert [one.finish_reason for one in written] == ["length"] * 2 + ["member_lost"] * 3
        for one, other in zip(written, whole, strict=True):
            assert one.token_ids == other.token_ids[: len(one.token_ids)]
        assert not written[4].token_ids

    def test_a_stream_and_its_streamer(self, ensembles, members: list[Member], tmp_path: Path) -> None:
        class Streamer:
            ended = 0

            def put(self, ids: Any) -> None: ...

            def end(self) -> None:
                self.ended += 1

        streamer, trace = Streamer(), tmp_path / "trace.jsonl"
        lose(members[1], 8)
        pieces: list[str] = []
        stream = ensembles(0, 1).stream(
            [{"role": "user", "content": PROMPT}],
            draft=0,
            without_template="plain",
            streamer=streamer,
            trace=trace,
        )
        with pytest.raises(MemberLost) as caught:
            pieces.extend(stream)
        assert "".join(pieces) == caught.value.generations[0].text == stream.result.text != ""
        assert stream.result.finish_reason == "member_lost"
        assert streamer.ended == 1
        assert len(trace.read_text().splitlines()) == len(stream.result.token_ids)

    def test_while_prompts_are_read(self, ensembles, members: list[Member]) -> None:
        for at in range(2):
            lose(members[1], at, ("read",))
            with pytest.raises(MemberLost, match="gone at read"):
                write(ensembles(0, 1, weights="prompt"), LONG)

    def test_inside_of_transformers(self, ensembles, members: list[Member]) -> None:
        main, ensemble = members[0].model, ensembles(0, 1)
        ids = members[0].tokenizer(PROMPT, return_tensors="pt")
        lose(members[1], 8)
        with pytest.raises(MemberLost) as caught:
            main.generate(**ids, max_new_tokens=NEW, custom_generate=ensemble.custom_generate)
        assert caught.value.generations[0].token_ids
        lose(members[1], 8)
        with (
            DeepenLogitsProcessor(ensemble) as processor,
            pytest.raises(MemberLost, match="gone at"),
        ):
            main.generate(**ids, max_new_tokens=NEW, logits_processor=[processor])
        with pytest.raises(InputError, match="cannot be used here: only Ensemble"):
            DeepenLogitsProcessor(ensembles(0, 1, on_failure="continue"))

    def test_what_cannot_be_opened_is_closed_again(self, ensembles, members: list[Member], tmp_path) -> None:
        with pytest.raises(InputError, match="the trace cannot be written"):
            write(ensembles(0, 1), trace=tmp_path / "no folder" / "trace")
        lose(members[1], 0, ("open",))
        with pytest.raises(MemberLost, match="gone at open"):
            write(ensembles(0, 1, 2))


class TestContinue:
    @pytest.mark.parametrize("fuser", ["union-vocab", "deepen", "average", "union-topk", "follow", "product"])
    @pytest.mark.parametrize("at", [0, 11])
    def test_as_a_smaller_ensemble_from_there(
        self, ensembles, members: list[Member], fuser: str, at: int
    ) -> None:
        more = {"weights": [0.4, 0.3, 0.3], "learning_rate": 1.0}
        whole = write(ensembles(0, 1, 2, fuser=fuser, **more))
        lose(members[1], at)
        records: list[dict[str, Any]] = []
        with pytest.warns(UserWarning, match="first: gone at .*; the others go on without it"):
            found = write(
                ensembles(0, 1, 2, fuser=fuser, on_failure="continue", **more), trace=records.append
            )
        position = found.lost["first"]
        assert list(found.lost) == ["first"]
        assert found.token_ids[:position] == whole.token_ids[:position]
        rest = smaller_from(
            ensembles(0, 2, fuser=fuser, weights=[0.4 / 0.7, 0.3 / 0.7], learning_rate=1.0),
            found,
            PROMPT,
            position,
        )
        assert found.token_ids[position:] == rest
        assert [one["lost"] for one in records] == [[]] * position + [["first"]] * (NEW - position)
        assert not any(own["name"] == "first" for one in records[position:] for own in one["members"])

    def test_the_loss_changes_the_text(self, ensembles, members: list[Member]) -> None:
        """Else the tests here would prove little."""
        for fuser in ("deepen", "product", "union-vocab"):
            whole = write(ensembles(0, 1, 2, fuser=fuser))
            lose(members[1], 0)
            with pytest.warns(UserWarning, match="go on without"):
                found = write(ensembles(0, 1, 2, fuser=fuser, on_failure="continue"))
            backend_of(members[1]).arm(None)
            assert found.token_ids != whole.token_ids, fuser

    def test_all_assistants_one_after_the_other(self, ensembles, members: list[Member]) -> None:
        lose(members[1], 6)
        lose(members[2], 15)
        with pytest.warns(UserWarning, match="go on without") as warned:
            found = write(ensembles(0, 1, 2, on_failure="continue"))
        assert len(warned) == 2
        assert {one.filename for one in warned} == {__file__}  # where `write` calls us
        assert found.lost["first"] < found.lost["second"]
        rest = smaller_from(ensembles(0, fuser="single"), found, PROMPT, found.lost["second"])
        assert found.token_ids[found.lost["second"] :] == rest

    @pytest.mark.parametrize("kinds", [("ask",), ("wait",)])
    def test_both_in_one_step(self, ensembles, members: list[Member], kinds: tuple[str, ...]) -> None:
        lose(members[1], 4, kinds)
        lose(members[2], 4, ("wait",))
        with pytest.warns(UserWarning, match="go on without"):
            found = write(ensembles(0, 1, 2, on_failure="continue"))
        assert set(found.lost) == {"first", "second"}
        assert found.lost["first"] == found.lost["second"]

    def test_another_answer_is_waited_for(self, ensembles, members: list[Member]) -> None:
        """The first assistant's is on its way when the second is found lost; `LosingSession` would object."""
        lose(members[2], 5, ("ask",))
        with pytest.warns(UserWarning, match="second: gone at ask"):
            assert len(write(ensembles(0, 1, 2, on_failure="continue")).token_ids) == NEW

    @pytest.mark.parametrize("drafter", ["main", "lookup", "first", "second"])
    @pytest.mark.parametrize("at", [0, 3, 6])
    def test_drafts(self, ensembles, members: list[Member], drafter: str, at: int) -> None:
        """The one that verifies, and the one that writes ahead."""
        whole = write(ensembles(0, 1, 2))
        lose(members[1], at)
        with pytest.warns(UserWarning, match="go on without"):
            found = write(ensembles(0, 1, 2, on_failure="continue"), draft=4, drafter=drafter)
        position = found.lost["first"]
        assert found.token_ids[:position] == whole.token_ids[:position]
        assert found.token_ids[position:] == smaller_from(ensembles(0, 2), found, PROMPT, position)

    def test_the_certified_skip_holds(self, ensembles, members: list[Member]) -> None:
        more = {"fuser": "deepen", "learning_rate": 0.3, "on_failure": "continue"}
        for at in (0, 4, 9):
            for skip in (False, True):
                # At the same token: by then fewer questions were asked with the skip.
                lose(members[1], at)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = write(ensembles(0, 1, 2, **more), certified_skip=skip)
                if not found.lost:
                    continue
                rest = smaller_from(
                    ensembles(0, 2, fuser="deepen", learning_rate=0.3), found, PROMPT, found.lost["first"]
                )
                assert found.token_ids[found.lost["first"] :] == rest

    def test_a_batch_with_texts_that_wait(self, ensembles, members: list[Member]) -> None:
        whole = write(ensembles(0, 1, 2), PROMPTS, batch_size=2)
        lose(members[1], 2 * NEW + 9)
        with pytest.warns(UserWarning, match="go on without"):
            found = write(ensembles(0, 1, 2, on_failure="continue"), PROMPTS, batch_size=2)
        assert isinstance(found, BatchGeneration)
        positions = [one.lost.get("first", NEW) for one in found]
        assert positions[:2] == [NEW, NEW]
        assert 0 < positions[2] < NEW
        assert positions[4] == 0
        for prompt, one, other, at in zip(PROMPTS, found, whole, positions, strict=True):
            assert one.token_ids[:at] == other.token_ids[:at]
            if at < NEW:
                assert one.token_ids[at:] == smaller_from(ensembles(0, 2), one, prompt, at)

    @pytest.mark.parametrize("rule", ["prompt", "size"])
    @pytest.mark.parametrize("at", [0, 1])
    def test_while_prompts_are_read(self, ensembles, members: list[Member], at: int, rule: str) -> None:
        lose(members[1], at, ("read",))
        with pytest.warns(UserWarning, match="first: gone at read"):
            found = write(ensembles(0, 1, 2, weights=rule, on_failure="continue"), LONG)
        smaller = write(ensembles(0, 2, weights=rule), LONG)
        assert [one.lost for one in found] == [{"first": 0}] * 2
        assert [one.token_ids for one in found] == [one.token_ids for one in smaller]

    def test_prompts_that_come_later_are_read_without_it(self, ensembles, members: list[Member]) -> None:
        lose(members[1], 10, ("wait",))
        with pytest.warns(UserWarning, match="go on without"):
            found = write(
                ensembles(0, 1, 2, weights="prompt", on_failure="continue"), PROMPTS[:2], batch_size=1
            )
        smaller = write(ensembles(0, 2, weights="prompt"), PROMPTS[1])
        assert 0 < found[0].lost["first"] < NEW
        assert (found[1].token_ids, found[1].lost) == (smaller.token_ids, {"first": 0})

    def test_while_lanes_are_released(self, ensembles, members: list[Member]) -> None:
        """The texts that ended are whole; the others go on without it."""
        whole = write(ensembles(0, 1), PROMPTS[:3], batch_size=2)
        for on_failure in ("stop", "continue"):
            lose(members[1], 0, ("close",))
            found = write(ensembles(0, 1, on_failure=on_failure), PROMPTS[:3], batch_size=2)
            assert [one.token_ids for one in found] == [one.token_ids for one in whole]
            assert not any(one.lost for one in found)
        lose(members[1], 0, ("release",))
        stops = [PROMPTS[0][:1], *whole[0].text]  # texts of other lengths
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(ensembles(0, 1, on_failure="continue"), PROMPTS[:3], stop_strings=stops)

    def test_a_context_that_nobody_reads_ends_no_text(self, ensembles, members: list[Member]) -> None:
        from dataclasses import replace

        from sessions import changed

        inner = backend_of(members[1]).backend
        room = len(members[1].vocabulary.encode(PROMPT)) + NEW
        narrow = losing(changed(replace(members[1], backend=inner), context_length=room))
        ensemble = Ensemble([members[0], narrow], **LOUD, on_failure="continue")
        backend_of(narrow).arm(6)
        forced = "\x01\x02" * NEW  # bytes that no longer token has
        ids = members[0].vocabulary.encode(forced)
        settings = {"sequence_bias": {(token,): 50.0 for token in set(ids)}, "max_new_tokens": NEW}
        with pytest.warns(UserWarning, match="go on without"):
            assert ensemble.generate(PROMPT, draft=0, **settings).finish_reason == "length"
        backend_of(narrow).check_free()

    @pytest.mark.parametrize("fusion", [{"fuser": "draw"}, {"fuser": "union-vocab"}, {"fuser": "deepen"}])
    def test_sampling(self, ensembles, members: list[Member], fusion: dict[str, Any]) -> None:
        drawn = {"do_sample": True, "seed": 5}
        whole = write(ensembles(0, 1, 2, **fusion), **drawn)
        for drafts in ({"draft": 0}, {"draft": 3}, {"draft": 3, "drafter": "first"}):
            lose(members[1], 5)
            with pytest.warns(UserWarning, match="go on without"):
                found = write(ensembles(0, 1, 2, on_failure="continue", **fusion), **drawn, **drafts)
            position = found.lost["first"]
            assert found.token_ids[:position] == whole.token_ids[:position]
            assert len(found.token_ids) == NEW

    def test_words(self, ensembles, members: list[Member]) -> None:
        whole = write(ensembles(0, 1, 2, fuser="spans"))
        for at in range(0, 30, 6):
            lose(members[1], at)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = write(ensembles(0, 1, 2, fuser="spans", on_failure="continue"))
            position = found.lost.get("first", NEW)
            assert found.token_ids[:position] == whole.token_ids[:position]
            if position < NEW:
                rest = smaller_from(ensembles(0, 2, fuser="spans"), found, PROMPT, position)
                assert found.token_ids[position:] == rest

    def test_shared_forwards(self, ensembles, members: list[Member]) -> None:
        lose(members[1], 9)
        with SharedForwards() as shared:
            with pytest.warns(UserWarning, match="go on without"):
                first = write(ensembles(0, 1, 2, on_failure="continue"), shared=shared)
            with pytest.warns(UserWarning, match="go on without"):
                again = write(ensembles(0, 1, 2, on_failure="continue"), shared=shared)
        assert first.lost["first"] > 0
        assert first.token_ids == again.token_ids

    def test_a_member_here_is_not_lost(self, ensembles, members: list[Member], monkeypatch) -> None:
        """Its failures end the text, as ever."""
        backend = lose(members[1], 5)

        def fail(kind: str) -> None:
            backend.calls.append(kind)
            if len(backend.calls) == 6:
                raise ModelError("first: its forward pass failed")

        monkeypatch.setattr(backend, "call", fail)
        with pytest.raises(ModelError, match="its forward pass failed") as caught:
            write(ensembles(0, 1, 2, on_failure="continue"))
        assert not isinstance(caught.value, MemberLost)

    def test_an_error_of_another_ensemble_is_not_ours(self, ensembles) -> None:
        def processor(ids: Any, scores: Any) -> Any:
            raise MemberLost("elsewhere", "gone")

        with pytest.raises(MemberLost, match=r"^elsewhere: gone$"):
            write(ensembles(0, 1, on_failure="continue"), logits_processor=[processor])


class TestElsewhere:
    """The first assistant is asked before the main model works."""

    @pytest.mark.parametrize("draft", [0, 4])
    @pytest.mark.parametrize("kinds", [("ask",), ("wait",)])
    @pytest.mark.parametrize("at", [0, 1, 5])
    def test_it_is_lost(self, ensembles, members: list[Member], draft: int, kinds, at: int) -> None:
        """When it is asked, or while the main model works."""
        whole = write(ensembles(0, 1, 2))
        lose(members[1], at, kinds)
        backend_of(members[1]).elsewhere = True
        with pytest.warns(UserWarning, match="first: gone at .*; the others go on without it"):
            found = write(ensembles(0, 1, 2, on_failure="continue"), draft=draft)
        position = found.lost["first"]
        assert draft or position == at
        assert found.token_ids[:position] == whole.token_ids[:position]
        assert found.token_ids[position:] == smaller_from(ensembles(0, 2), found, PROMPT, position)

    @pytest.mark.parametrize("draft", [0, 4])
    def test_the_main_model_is_lost_meanwhile(self, ensembles, members: list[Member], draft: int) -> None:
        """`LosingSession` objects to what is closed while an answer is under way."""
        whole = write(ensembles(0, 1))
        for kinds in (("ask",), ("wait",)):
            lose(members[0], 7, kinds)
            backend_of(members[1]).elsewhere = True
            with pytest.raises(MemberLost, match=r"main: gone at .*the main model") as caught:
                write(ensembles(0, 1, on_failure="continue"), draft=draft)
            (written,) = caught.value.generations
            assert written.token_ids == whole.token_ids[: len(written.token_ids)]
            assert written.token_ids

    def test_both_are(self, ensembles, members: list[Member]) -> None:
        lose(members[0], 7, ("wait",))
        lose(members[1], 7, ("wait",))
        backend_of(members[1]).elsewhere = True
        with pytest.raises(MemberLost, match="main: gone at wait"):
            write(ensembles(0, 1, on_failure="continue"))


def test_many_losses_leave_nothing_open(ensembles, members: list[Member]) -> None:
    """Whoever is lost whenever: what was written stands, and no lane is held. DEEPEN_LOSSES=1000 for more."""
    rng, places = random.Random(1), random.Random(2)
    fusions: list[dict[str, Any]] = [
        {"fuser": "union-vocab"},
        {"fuser": "deepen", "boundary_aware": True},
        {"fuser": "follow", "weights": "prompt"},
        {"fuser": "average"},
        {"fuser": "spans"},
    ]
    whole: dict[Any, BatchGeneration] = {}
    stopped = continued = unexpected = 0
    for number in range(LOSSES):
        fusion = fusions[number % len(fusions)]
        count, new = rng.choice([1, 3, 4]), rng.choice([5, 9])
        settings = {"max_new_tokens": new, "batch_size": rng.choice([None, 2])}
        if fusion["fuser"] != "spans":
            settings["draft"] = rng.choice([0, 3, "auto"])
            settings["drafter"] = rng.choice(["auto", "main", "lookup", "first", "second"])
        on_failure = rng.choice(["stop", "continue"])
        for member in members:
            backend_of(member).arm(None)
        key = fusion["fuser"], count, new
        if key not in whole:
            whole[key] = write(ensembles(0, 1, 2, **fusion), PROMPTS[:count], max_new_tokens=new)
        for member in rng.sample(members, rng.choice([1, 1, 2])):
            lose(member, rng.randrange(30), rng.choice([QUESTIONS, EVERYTHING]))
        ensemble = ensembles(0, 1, 2, on_failure=on_failure, **fusion)
        for member in members[1:]:
            backend_of(member).elsewhere = places.random() < 0.5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = list(ensemble.generate(PROMPTS[:count], **settings))
                continued += any(one.lost for one in found)
            except MemberLost as error:
                found = error.generations
                stopped += 1
                unexpected += on_failure == "continue" and error.member != "main"
        assert len(found) == count
        for one, other in zip(found, whole[key], strict=True):
            stands = min([len(one.token_ids), *one.lost.values()])
            assert one.token_ids[:stands] == other.token_ids[:stands], (number, fusion, settings)
            if one.finish_reason != "member_lost" and not one.lost:
                assert one.token_ids == other.token_ids
        for member in members:
            backend_of(member).check_free()
    assert not unexpected
    assert stopped > LOSSES / 10
    assert continued > LOSSES / 10


class TestEvaluation:
    @pytest.mark.parametrize("scoring", ["generation", "likelihood"])
    def test_what_was_answered_stands(
        self, ensembles, members: list[Member], tmp_path: Path, scoring: str
    ) -> None:
        """The error names the member; given again, the call goes on where it ended, to the same answers."""
        (tmp_path / "data" / "piqa").mkdir(parents=True)
        lines = [
            {"question": f"To dry {n} hands", "A": f"use towel {n}", "B": "use oil", "answer": "AB"[n % 2]}
            for n in range(6)
        ]
        test_file = tmp_path / "data" / "piqa" / "test.jsonl"
        test_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = []
        calls = 0
        for name in ("whole", "lost"):
            backend_of(members[1]).arm(calls // 2 if name == "lost" else None)
            out = tmp_path / name

            def run(out: Path = out) -> None:
                evaluate(
                    {"x": ensembles(0, 1)}, "piqa", tmp_path / "data", out=out, batch_size=1, scoring=scoring
                )

            if name == "lost":
                with pytest.raises(MemberLost, match="first: gone at"):
                    run()
                assert 0 < len(_answers(out)) < len(lines)
                backend_of(members[1]).arm(None)
            run()
            calls = len([one for one in backend_of(members[1]).calls if one in QUESTIONS])
            found.append(_answers(out))
        assert len(found[0]) == len(lines)
        assert found[0] == found[1]


def _answers(out: Path) -> list[Any]:
    """What is on disk of the items, without times."""
    (file,) = out.glob("*.jsonl")
    items = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return [{name: value for name, value in one.items() if name != "timing"} for one in items]


class TestWhereItIsSet:
    def test_a_wrong_value(self, ensembles) -> None:
        with pytest.raises(InputError, match="on_failure is 'retry'; use 'stop' or 'continue'"):
            ensembles(0, 1).variant(on_failure="retry")

    def test_a_preset(self, tmp_path: Path) -> None:
        file = tmp_path / "preset.yaml"
        write_preset(file, Preset(["demo:gemma-3-270m"], {"on_failure": "continue"}))
        assert load_preset(file).settings() == {"on_failure": "continue"}
        file.write_text("members: [a, b]\non_failure: retry\n")
        with pytest.raises(InputError, match="line 2: on_failure is 'retry'"):
            load_preset(file)

    def test_an_evaluation_refuses_it(self, ensembles, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="answers of a smaller ensemble would count"):
            evaluate({"x": ensembles(0, 1, on_failure="continue")}, "gsm8k", tmp_path, out=tmp_path)

    def test_the_command_line(self, ensembles, members: list[Member], monkeypatch) -> None:
        asked: list[str | None] = []

        def load(*given: Any, check: Any) -> Ensemble:
            asked.append(None if given[-1] is None else given[-1].value)
            return ensembles(0, 1, on_failure=asked[-1] or "stop")

        monkeypatch.setattr("deepen_ext.commands.generate.load_ensemble", load)
        command = ("generate", "--demo", "--prompt", PROMPT, "--max-new-tokens", "12", "--draft", "0")
        lose(members[1], 9)
        done = run_command(*command)
        assert done.returncode == 1
        assert "error: first: gone at" in done.stderr
        assert "(ended by member_lost)" in done.stderr
        lose(members[1], 9)
        done = run_command(*command, "--json")
        report = json.loads(done.stdout)
        assert (done.returncode, report["finish_reason"], report["lost"]) == (1, "member_lost", {})
        assert report["tokens"] > 0
        lose(members[1], 9)
        done = run_command(*command, "--on-failure", "continue")
        assert done.returncode == 0
        assert "warning: first: gone at" in done.stderr
        assert "without first from token" in done.stderr
        assert asked == [None, None, "continue"]
