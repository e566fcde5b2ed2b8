"""The loop, on tiny models with real tokenizers: batches, the certified skip, streams, traces, and what goes
wrong. The demo pair itself is in a few tests, under `demo_pair`."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sessions import changed, forcing, sync
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer

from deepen_ext import Ensemble, InputError, ModelError
from deepen_ext.members.hf.session import HFSession

PROMPTS = [
    "The capital of France is",
    "Question: A train covers 180 km in 2.5 hours. What is its average speed?\nAnswer:",
    "def quicksort(values):\n    if len(values) <= 1:\n",
    "Once",
    "The history of tea begins in ancient China, where, it is said, leaves from a wild tree blew into a pot "
    "of boiling water. From there it spread to",
]
# Questions of GSM8K's kind: text on which models are often sure.
SUMS = [
    "Question: Tom has 3 boxes with 12 pencils each and gives 7 pencils away. How many pencils are left?\n"
    "Let's think step by step\nAnswer:",
    "Question: A baker makes 24 rolls an hour and works 6 hours. He sells 100 rolls. How many are left?\n"
    "Let's think step by step\nAnswer:",
]

# With all the public names the package is held until its modules are emptied, and the stream is too.
_LEAVES_A_STREAM = """
import sys
import deepen_ext
from deepen_ext import *
member = load_member(sys.argv[1])
stream = Ensemble([member, member], fuser="union-topk").stream("The museum", max_new_tokens=5)
next(stream)
print("open")
"""


@pytest.fixture(scope="module")
def pair(tiny_smollm2, tiny_gemma, rows_folder):
    return Ensemble([tiny_smollm2, tiny_gemma], fuser="deepen", learning_rate=0.3)


@pytest.fixture(scope="module")
def demo_pair(smollm2, gemma, rows_folder):
    return Ensemble([smollm2, gemma])


def test_the_demo_pair_alone_in_batches_and_certified(demo_pair):
    """What the rest of this file shows of tiny models, on the real ones."""
    settings = {"max_new_tokens": 10, "stop_strings": ["."]}
    prompts = [PROMPTS[0], SUMS[0], PROMPTS[4]]
    alone = [demo_pair.generate(prompt, **settings) for prompt in prompts]
    assert "Paris" in alone[0].text
    assert sum(one.changed_tokens for one in alone) > 0
    batch = demo_pair.generate(prompts, **settings, batch_size=2)
    skipped = demo_pair.generate(prompts, **settings, certified_skip=True)
    for found in (batch, skipped):
        assert [one.token_ids for one in found] == [one.token_ids for one in alone]
        assert [one.finish_reason for one in found] == [one.finish_reason for one in alone]
    assert 0.1 < skipped.timings.skipped_share < 0.9


@pytest.mark.parametrize("skip", [False, True])
def test_a_constant_in_the_main_models_logits_changes_no_token(pair, skip):
    settings = {"max_new_tokens": 6, "certified_skip": skip}
    plain = pair.generate(PROMPTS[:2], **settings)
    for constant in (1000.0, -100.0):
        hook = pair.members[0].model.register_forward_hook(
            lambda _, inputs, output, by=constant: dataclasses.replace(output, logits=output.logits + by)
        )
        moved = pair.generate(PROMPTS[:2], **settings)
        hook.remove()
        assert [one.token_ids for one in moved] == [one.token_ids for one in plain]


def stops_in(texts: list[str]) -> list[str]:
    """Stop strings that end the first of these texts early, and the last one later."""
    return [texts[0].split()[1], texts[-1].split()[-3]]


class TestBatch:
    def test_each_row_is_the_row_alone(self, pair):
        """Rows of other lengths beside it, rows that end sooner: none of it changes a row's tokens."""
        settings = {"max_new_tokens": 16}
        settings["stop_strings"] = stops_in(pair.generate(PROMPTS, **settings).texts)
        batch = pair.generate(PROMPTS, **settings)
        alone = [pair.generate(prompt, **settings) for prompt in PROMPTS]
        assert batch.texts == [one.text for one in alone]
        assert [one.token_ids for one in batch] == [one.token_ids for one in alone]
        assert [one.finish_reason for one in batch] == [one.finish_reason for one in alone]
        assert [one.changed_tokens for one in batch] == [one.changed_tokens for one in alone]
        assert len({one.finish_reason for one in batch}) > 1  # some end early
        assert sum(one.changed_tokens > 0 for one in batch) > 1
        assert batch.timings.tokens == sum(len(one.token_ids) for one in batch)

    def test_prompts_wait_for_a_place(self, pair):
        """Two at a time: where a text ends the next prompt begins; each is as if all were there at once."""
        some = pair.variant(weights="prompt")
        settings = {"max_new_tokens": 9}
        settings["stop_strings"] = stops_in(some.generate(PROMPTS, **settings).texts)
        whole = some.generate(PROMPTS, **settings)
        seen, records = set(), []
        hooks = [
            one.model.get_input_embeddings().register_forward_pre_hook(lambda _, x: seen.add(len(x[0])))
            for one in some.members
        ]
        batch = some.generate(PROMPTS, **settings, batch_size=2, trace=records.append)
        for hook in hooks:
            hook.remove()
        assert seen == {1, 2}
        assert [one.token_ids for one in batch] == [one.token_ids for one in whole]
        assert [one.finish_reason for one in batch] == [one.finish_reason for one in whole]
        assert [one.changed_tokens for one in batch] == [one.changed_tokens for one in whole]
        assert batch.texts == whole.texts
        lengths = [len(one.token_ids) for one in whole]
        assert batch.timings.tokens == sum(lengths)
        assert batch.timings.steps < sum(max(lengths[i : i + 2]) for i in range(0, len(lengths), 2))
        rows = [record["row"] for record in records]
        assert sorted(set(rows), key=rows.index) == list(range(len(PROMPTS)))  # they begin in their order
        skipping = some.generate(PROMPTS, **settings, batch_size=3, certified_skip=True)
        assert skipping.texts == batch.texts

    @pytest.mark.parametrize("draft", [0, "auto"])
    def test_nothing_is_kept_of_texts_that_ended(self, pair, monkeypatch, draft):
        """With draft=0 three texts end at once, and one waits: two of the lanes are free for good."""
        released = Counter()
        release = HFSession.release

        def counted(session, lane):
            released[lane] += 1
            release(session, lane)

        monkeypatch.setattr(HFSession, "release", counted)
        run = pair.start(PROMPTS[:4], max_new_tokens=5, eos_token_id=[], batch_size=3, draft=draft)
        held = []
        for _ in run:
            writing = set(run._schedule.active)
            left = sum(text.finish_reason is None for text in run._texts.values())
            assert 3 - len(released) == min(left, 3)
            assert set(released.values()) <= {len(pair.members)}
            assert run._writer._lookups.keys() <= writing
            assert run._pace._unread.keys() <= writing
            held.append((len(writing), 3 - len(released)))
        assert released == dict.fromkeys(range(3), len(pair.members))
        assert (3, 3) in held
        assert (0, 1) in held or draft  # the three texts have ended, and the last one has not begun

    def test_a_run_closed_while_prompts_wait(self, pair):
        run = pair.start(PROMPTS, max_new_tokens=3, batch_size=2, draft=0)
        for _ in range(4):
            next(iter(run))
        run.close()
        assert [len(one.token_ids) for one in run.results()] == [3, 3, 1, 1, 0]
        reasons = [one.finish_reason for one in run.results()]
        assert reasons == ["length", "length", "cancelled", "cancelled", "cancelled"]

    def test_past_the_sliding_window(self, pair):
        """Gemma's windows are 16 tokens here: rows on both sides of it, with rollbacks of their own."""
        assert pair.members[1].model.config.sliding_window == 16
        long = " ".join(PROMPTS)
        prompts = [long, PROMPTS[0], long[80:130]]
        lengths = [len(pair.members[1].vocabulary.encode(prompt)) for prompt in prompts]
        assert lengths[0] > 32 > 16 > lengths[2] > 10 > lengths[1]  # the last ones pass it on their way
        batch = pair.generate(prompts, max_new_tokens=20)
        assert batch.texts == [pair.generate(prompt, max_new_tokens=20).text for prompt in prompts]
        assert sum(one.changed_tokens > 0 for one in batch) > 1

    def test_another_main_model_and_three_members(self, pair):
        small, gemma = pair.members
        trio = Ensemble([gemma, small, small], recipe="bytes", weights=[0.5, 0.3, 0.2], cache=False)
        batch = trio.generate(PROMPTS[:2], max_new_tokens=8)
        assert batch.texts == [trio.generate(prompt, max_new_tokens=8).text for prompt in PROMPTS[:2]]

    def test_members_of_different_dtypes(self, smollm2, gemma):
        half = changed(
            gemma, model=copy.deepcopy(gemma.model).to(torch.bfloat16), dtype=torch.bfloat16, name="half"
        )
        mixed = Ensemble([smollm2, half], cache=False)
        records: list[dict] = []
        batch = mixed.generate(PROMPTS[:2], max_new_tokens=4, trace=records.append)
        assert len(records) == 8
        assert sum(one["members"][-1]["name"] == "half" for one in records) > 4
        assert "Paris" in batch.texts[0]
        assert mixed.fuser.maps[1].rows.values.dtype == torch.float32

    def test_unfinished_characters_in_some_rows(self, pair):
        """A row in the middle of a character waits for its assistants, the others do not."""
        prompts = ["日本の首都は", "Emoji: 🙂🙃🫠", PROMPTS[0]]
        records: list[dict] = []
        batch = pair.generate(prompts, max_new_tokens=10, trace=records.append)
        waits = {one["position"] for one in records if one["not_asked"] == "unfinished character"}
        asked = {one["position"] for one in records if one["not_asked"] is None}
        assert waits & asked
        assert batch.texts == [pair.generate(prompt, max_new_tokens=10).text for prompt in prompts]

    def test_a_seed_gives_a_row_its_own_draws(self, pair):
        settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.1, "top_k": 40}
        batch = pair.generate([PROMPTS[0]] * 3, seed=5, **settings)
        assert len(set(batch.texts)) > 1  # one draw each
        assert batch.texts[0] == pair.generate(PROMPTS[0], seed=5, **settings).text

    def test_one_prompt_in_a_list(self, pair):
        batch = pair.generate(PROMPTS[:1], max_new_tokens=4)
        assert len(batch) == 1
        assert batch.texts == [pair.generate(PROMPTS[0], max_new_tokens=4).text]


class TestSkip:
    @pytest.mark.parametrize(("learning_rate", "tokens"), [(0.1, 40), (0.15, 64), (0.3, 40)])
    def test_the_text_is_the_same(self, pair, learning_rate, tokens):
        ensemble = pair.variant(recipe="bytes", learning_rate=learning_rate)
        asked = ensemble.generate(PROMPTS + SUMS, max_new_tokens=tokens)
        skipped = ensemble.generate(PROMPTS + SUMS, max_new_tokens=tokens, certified_skip=True)
        assert [one.token_ids for one in skipped] == [one.token_ids for one in asked]
        assert sum(one.changed_tokens for one in asked) > 0
        assert asked.timings.settled == 0
        assert 0.1 < skipped.timings.skipped_share < 0.9

    def test_under_processors(self, pair):
        settings = {"max_new_tokens": 24, "repetition_penalty": 1.2, "suppress_tokens": [28, 198]}
        asked = pair.generate(SUMS[0], **settings)
        skipped = pair.generate(SUMS[0], certified_skip=True, **settings)
        assert skipped.token_ids == asked.token_ids
        assert 0 < skipped.timings.settled < 24
        assert asked.token_ids != pair.generate(SUMS[0], max_new_tokens=24).token_ids

    def test_a_processor_that_nobody_knows_turns_it_off(self, pair):
        def upside_down(ids, scores):
            return scores if ids.shape[1] % 2 else scores.where(scores == -torch.inf, -scores)

        settings = {"max_new_tokens": 6, "logits_processor": [upside_down]}
        asked = pair.generate(SUMS[0], **settings)
        skipped = pair.generate(SUMS[0], certified_skip=True, **settings)
        assert skipped.token_ids == asked.token_ids
        assert skipped.timings.settled == 0

    def test_the_assistant_catches_up(self, pair):
        fed = []
        records: list[dict] = []

        def count(_module, _arguments, keywords):
            fed.append(keywords["input_ids"].shape[1])

        hook = pair.members[1].model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            pair.generate(SUMS[0], max_new_tokens=24, certified_skip=True, draft=0, trace=records.append)
        finally:
            hook.remove()
        assert len(fed) == sum(one["not_asked"] is None for one in records) < 24
        assert max(fed[1:]) > 1

    def test_a_gate_is_no_certificate(self, pair):
        settings = {"max_new_tokens": 20, "do_sample": True, "seed": 3}
        gated = pair.generate(SUMS[0], confidence_gate=0.8, **settings)
        assert 0 < gated.timings.gated < 20
        assert pair.generate(SUMS[0], confidence_gate=1.0, **settings).timings.gated <= gated.timings.gated
        with pytest.raises(
            InputError, match="certified_skip holds for greedy decoding only; for sampling use"
        ):
            pair.generate(SUMS[0], certified_skip=True, **settings)
        for gate in (1.5, 0):
            with pytest.raises(InputError, match=rf"confidence_gate is {gate}"):
                pair.generate(SUMS[0], confidence_gate=gate)


class TestStream:
    def test_the_pieces_are_the_text(self, pair):
        with pair.stream(PROMPTS[0], max_new_tokens=16) as stream:
            pieces = list(stream)
        assert len(pieces) > 5
        assert "".join(pieces) == stream.result.text == pair.generate(PROMPTS[0], max_new_tokens=16).text

    def test_closing_ends_the_work_and_frees_the_caches(self, pair):
        stream = pair.stream(PROMPTS[0], max_new_tokens=100)
        first = next(stream)
        sessions = [stream._run._main, *stream._run._assistants._sessions]
        stream.close()
        assert list(stream) == []
        assert stream.result.text == first
        assert stream.result.finish_reason == "cancelled"
        for session in sessions:
            with pytest.raises(InputError, match="was released"):
                sync(session, {0: [1]})
        stream.close()  # again is no error

    def test_dropping_frees_the_caches_without_the_garbage_collector(self, pair):
        gc.collect()
        gc.disable()
        try:
            for _ in (stream := pair.stream(PROMPTS[0], max_new_tokens=20)):
                break
            caches = [one._session._cache for one in (stream._run._main, *stream._run._assistants._sessions)]
            assert all(cache.nbytes > 0 for cache in caches)
            del stream, _
            assert all(cache.nbytes == 0 for cache in caches)
        finally:
            gc.enable()

    def test_a_finished_generation_holds_no_cache(self, pair):
        run = pair.start(PROMPTS[:2], max_new_tokens=2)
        list(run)
        assert run._main._session._cache.nbytes == 0
        assert [one.text for one in run.results()] == pair.generate(PROMPTS[:2], max_new_tokens=2).texts

    def test_closing_from_another_thread_ends_it_after_the_step(self, pair):
        stream = pair.stream(PROMPTS[0], max_new_tokens=100)
        hook = pair.members[1].model.register_forward_pre_hook(
            lambda *_: threading.Thread(target=stream.close).run()
        )
        try:
            pieces = list(stream)
        finally:
            hook.remove()
        assert len(pieces) == 1
        assert stream.result.finish_reason == "cancelled"

    def test_a_stream_that_was_never_read(self, pair):
        stream = pair.stream(PROMPTS[0], max_new_tokens=4)
        stream.close()
        assert stream.result.text == ""

    def test_its_result_is_cancelled_until_the_text_has_its_end(self, pair):
        with pair.stream(PROMPTS[0], max_new_tokens=4, eos_token_id=[]) as stream:
            assert stream.result.finish_reason == "cancelled"
            next(stream)
            assert stream.result.finish_reason == "cancelled"
            list(stream)
            assert stream.result.finish_reason == "length"

    def test_one_that_is_open_at_the_interpreters_end_says_nothing(self, tiny_smollm2_dir):
        done = subprocess.run(
            [sys.executable, "-c", _LEAVES_A_STREAM, tiny_smollm2_dir], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, "open\n"), done.stderr
        assert "Exception ignored" not in done.stderr

    def test_streamers_of_transformers(self, pair, capsys):
        tokenizer = pair.members[0].tokenizer
        text = pair.generate(PROMPTS[0], max_new_tokens=10).text
        pair.generate(PROMPTS[0], max_new_tokens=10, streamer=TextStreamer(tokenizer, skip_prompt=True))
        assert capsys.readouterr().out == text + "\n"
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        settings = {"max_new_tokens": 10, "streamer": streamer}
        thread = threading.Thread(target=pair.generate, args=(PROMPTS[0],), kwargs=settings)
        thread.start()
        assert "".join(streamer) == text
        thread.join()

    def test_a_streamer_ends_also_after_an_error(self, pair):
        streamer = TextIteratorStreamer(pair.members[0].tokenizer, skip_prompt=True, timeout=60)
        with pytest.raises(InputError, match="top_k"):
            pair.generate(PROMPTS[0], top_k=-1, do_sample=True, streamer=streamer)
        assert list(streamer) == [""]
        hook = pair.members[1].model.register_forward_pre_hook(_fail)
        try:
            with pytest.raises(ModelError):
                pair.generate(PROMPTS[0], max_new_tokens=4, streamer=streamer)
        finally:
            hook.remove()
        assert list(streamer) == [""]


class TestBoundaries:
    def test_an_assistant_sits_out_inside_its_token(self, demo_pair, gemma):
        """Main is about to go on inside a word that is one token of Gemma's."""
        text = "The capital of Fran"
        assert len(gemma.vocabulary.encode(" France")) == 1
        records: list[dict] = []
        aware = demo_pair.variant(fuser="deepen")
        aware.generate([text, PROMPTS[0]], max_new_tokens=1, trace=records.append)
        assert [one["not_asked"] for one in records] == ["boundary", None]
        unaware = aware.variant(boundary_aware=False)
        unaware.generate(text, max_new_tokens=1, trace=records.append)
        assert records[2]["not_asked"] is None

    @pytest.mark.parametrize("fuser", ["follow", "union-vocab", "deepen"])
    def test_one_that_leads_keeps_a_part_of_its_weight(self, demo_pair, fuser):
        records: list[dict] = []
        led = demo_pair.variant(fuser=fuser, weights=[0.1, 0.9])
        led.generate(["The capital of Fran", "2 + 2 ="], max_new_tokens=1, trace=records.append)
        inside, between = ([member["weight"] for member in one["members"]] for one in records)
        assert between == pytest.approx([0.1, 0.9], abs=0.02)
        assert inside == pytest.approx([1 - inside[1], inside[1]])
        assert 0.05 < inside[1] < 0.8


class TestTrace:
    def test_every_token_is_explained(self, pair, tmp_path):
        records: list[dict] = []
        settings = {"max_new_tokens": 12, "certified_skip": True, "draft": 3}
        batch = pair.generate(SUMS, **settings, trace=records.append)
        assert len(records) == 24
        for row, generation in enumerate(batch):
            mine = [one for one in records if one["row"] == row]
            assert [one["position"] for one in mine] == list(range(12))
            assert [one["token"]["id"] for one in mine] == generation.token_ids
            assert "".join(one["token"]["text"] for one in mine) == generation.text
        assert batch.timings.settled == sum(one["not_asked"] == "settled" for one in records) > 0
        for one in records:
            asked = one["not_asked"] is None
            assert [member["name"] for member in one["members"]] == pair.names[: 1 + asked]
            assert [member["weight"] for member in one["members"]] == ([0.5, 0.5] if asked else [1.0])
            assert one["fused"][0]["id"] == one["token"]["id"]
            assert one["members"][0]["top"][0]["id"] == one["main_choice"]["id"]
            assert one["ms"]["members"][pair.names[0]] > 0

        file = tmp_path / "trace.jsonl"
        pair.generate(SUMS, **settings, trace=file)
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert [{**one, "ms": None} for one in lines] == [{**one, "ms": None} for one in records]

    def test_a_refused_call_leaves_the_last_trace(self, pair, tmp_path):
        file = tmp_path / "trace.jsonl"
        file.write_text("the last one", encoding="utf-8")
        with pytest.raises(InputError, match="exceed its context"):
            pair.generate(PROMPTS[0], max_new_tokens=9000, trace=file)
        assert file.read_text(encoding="utf-8") == "the last one"

    def test_a_file_that_cannot_be_written(self, pair, tmp_path):
        with pytest.raises(InputError, match="the trace cannot be written to"):
            pair.generate(PROMPTS[0], trace=tmp_path / "no" / "trace.jsonl")


class TestTransformersSettings:
    def test_a_generation_config(self, pair):
        settings = {"max_new_tokens": 12, "repetition_penalty": 1.3}
        result = pair.generate(PROMPTS[2], generation_config=GenerationConfig(**settings))
        assert len(result.token_ids) == 12
        assert result.token_ids == pair.generate(PROMPTS[2], **settings).token_ids
        assert result.token_ids != pair.generate(PROMPTS[2], max_new_tokens=12).token_ids

    def test_several_eos_ids(self, pair):
        plain = pair.generate(PROMPTS[0], max_new_tokens=12)
        ends = [plain.token_ids[3], plain.token_ids[7]]
        result = pair.generate(PROMPTS[0], max_new_tokens=12, eos_token_id=ends)
        assert result.finish_reason == "eos"
        assert result.token_ids == plain.token_ids[: 1 + min(plain.token_ids.index(one) for one in ends)]

    def test_a_stopping_criterion(self, pair):
        def five(ids, scores):
            return torch.tensor([ids.shape[1] >= 10])

        result = pair.generate(PROMPTS[0], max_new_tokens=12, stopping_criteria=[five])
        assert result.finish_reason == "stopping_criteria"
        prompt = pair.members[0].vocabulary.encode(PROMPTS[0])
        assert len(prompt) + len(result.token_ids) == 10

    def test_stop_strings_inside_characters(self, pair):
        """The last byte of the stop string's last character comes with a token of its own."""
        main = pair.members[0].vocabulary
        spelled = main.encode(" a🫠b")
        part = [i for i in spelled if main.bytes_of(i)[-1:] > b"\x7f"]
        assert len(part) > 1
        result = pair.generate(
            "Hi", max_new_tokens=20, stop_strings="a🫠", logits_processor=[forcing(spelled)]
        )
        assert result.finish_reason == "stop_string"
        assert result.text == " a🫠"

    def test_what_is_not_supported_is_refused_by_name(self, pair):
        with pytest.raises(InputError, match="num_beams"):
            pair.generate(PROMPTS[0], num_beams=2)
        with pytest.raises(InputError, match="did you mean max_new_tokens"):
            pair.generate(PROMPTS[0], max_new_token=2)


def _fail(*_):
    raise RuntimeError("no more room")


class TestBadInput:
    def test_an_empty_prompt_among_good_ones(self, pair):
        with pytest.raises(InputError, match="prompt 1 is empty"):
            pair.generate([PROMPTS[0], "", PROMPTS[1]])
        with pytest.raises(InputError, match="there is no prompt"):
            pair.generate([])
        with pytest.raises(InputError, match="prompt 1 is 7"):
            pair.generate([PROMPTS[0], 7])

    def test_a_prompt_that_is_too_long_is_named(self, pair):
        with pytest.raises(
            InputError, match=r"prompt 1's .* tokens and 128 new ones exceed its context of 8192"
        ):
            pair.generate([PROMPTS[0], "word " * 8100])

    def test_a_batch_that_does_not_fit(self, pair, monkeypatch):
        monkeypatch.setattr("deepen_ext.members.memory.available_bytes", lambda device: 1_000_000)
        with pytest.raises(InputError, match=r"5 prompts.*need about .* GB on cpu.*a smaller batch_size"):
            pair.generate(PROMPTS)
        with pytest.raises(InputError, match="batch size is 0"):
            pair.generate(PROMPTS, batch_size=0)

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_member_that_fails_in_the_middle_of_a_batch(self, pair, which):
        calls = 0

        def later(*_):
            nonlocal calls
            calls += 1
            if calls == 4:
                raise RuntimeError("no more room")

        hook = pair.members[which].model.register_forward_pre_hook(later)
        try:
            message = f"{pair.names[which]}: its forward pass failed: RuntimeError: no more room"
            with pytest.raises(ModelError, match=message):
                pair.generate(PROMPTS[:2], max_new_tokens=8)
        finally:
            hook.remove()
        assert pair.generate(PROMPTS[:2], max_new_tokens=2).timings.tokens == 4

    def test_two_threads(self, pair):
        want = [pair.generate(prompt, max_new_tokens=6).text for prompt in PROMPTS[:4]]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda prompt: pair.generate(prompt, max_new_tokens=6).text, PROMPTS[:4]))
        assert found == want

    def test_on_text_and_streams_take_one_prompt(self, pair):
        for settings in ({"on_text": print}, {"streamer": TextStreamer(pair.members[0].tokenizer)}):
            with pytest.raises(InputError, match="takes one prompt"):
                pair.generate(PROMPTS[:2], **settings)
        with pytest.raises(InputError, match="a stream takes one prompt"):
            pair.stream(PROMPTS[:2])
