"""The whole thing: SmolLM2-135M-Instruct and Gemma-3-270M write one text, tiny readers where any would do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sessions import changed, forcing

from deepen_ext import Ensemble, InputError, RelativeMap, load_members
from deepen_ext.space.anchors import shared_anchors
from deepen_ext.text.characters import Utf8Stream
from deepen_ext.text.growing_text import GrowingText

PROMPT = "The capital of France is"
LONG = (
    "The history of tea begins in ancient China, where, it is said, leaves from a wild tree blew into a pot "
    "of boiling water. From there it spread to"
)


@pytest.fixture(scope="module")
def pair(smollm2, gemma, rows_folder):
    return Ensemble([smollm2, gemma])


@pytest.fixture(scope="module")
def tiny_pair(tiny_smollm2, tiny_gemma, rows_folder):
    return Ensemble([tiny_smollm2, tiny_gemma])


def main_alone(member, prompt: str, count: int) -> list[int]:
    """Greedy tokens of transformers' own generate."""
    ids = torch.tensor([member.vocabulary.prefix_ids + member.vocabulary.encode(prompt)])
    output = member.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=member.eos_ids[0],
    )
    return output[0, ids.shape[1] :].tolist()


class TestGenerate:
    def test_writes_a_fused_text(self, pair):
        pieces: list[str] = []
        result = pair.generate(PROMPT, max_new_tokens=24, on_text=pieces.append)
        assert "Paris" in result.text
        assert result.finish_reason == "length"
        assert len(result.token_ids) == result.timings.tokens == 24
        assert "".join(pieces) == result.text
        assert pair.members[0].vocabulary.decode(result.token_ids).decode() == result.text

    def test_the_assistant_changes_tokens(self, pair):
        fused = pair.generate(LONG, max_new_tokens=32)
        alone = main_alone(pair.members[0], LONG, 32)
        assert fused.changed_tokens > 0
        assert fused.token_ids != alone
        # Up to the first token that differs, nothing was counted as changed or different.
        first = next(i for i, (a, b) in enumerate(zip(fused.token_ids, alone, strict=True)) if a != b)
        assert pair.generate(LONG, max_new_tokens=first + 1).changed_tokens == 1

    def test_all_weight_on_the_main_model_is_the_main_model(self, smollm2, gemma):
        result = Ensemble([smollm2, gemma], weights=[1, 0]).generate(LONG, max_new_tokens=24)
        assert result.token_ids == main_alone(smollm2, LONG, 24)
        assert result.changed_tokens == 0

    def test_twins_agree_with_themselves(self, smollm2):
        """A model fused with itself changes nothing: both say the same in relative space."""
        result = Ensemble([smollm2, smollm2], recipe="bytes").generate(LONG, max_new_tokens=16)
        assert result.token_ids == main_alone(smollm2, LONG, 16)
        assert len(set(result.timings.members_ms)) == 2

    @pytest.mark.parametrize("recipe", ["bytes", "paper"])
    def test_other_recipes(self, smollm2, gemma, recipe):
        result = Ensemble([smollm2, gemma], recipe=recipe).generate(PROMPT, max_new_tokens=8)
        assert "Paris" in result.text

    def test_gemma_may_be_the_main_model(self, smollm2, gemma):
        result = Ensemble([gemma, smollm2], recipe="bytes").generate(PROMPT, max_new_tokens=12)
        assert "Paris" in result.text
        assert gemma.vocabulary.decode(result.token_ids).decode() == result.text

    def test_three_members(self, smollm2, gemma):
        trio = Ensemble([smollm2, gemma, smollm2], recipe="bytes", weights=[0.4, 0.4, 0.2])
        assert "Paris" in trio.generate(PROMPT, max_new_tokens=8).text

    def test_each_step_is_fuse_logits_on_fresh_forwards(self, tiny_pair):
        """No cache, no re-tokenised suffix, no kept row: the same tokens come out of whole forwards."""
        tiny_pair = tiny_pair.variant(fuser="deepen")
        result = tiny_pair.generate("Café 日本 and", max_new_tokens=20)
        main, assistant = tiny_pair.members
        ids = main.vocabulary.prefix_ids + main.vocabulary.encode("Café 日本 and")
        text, characters = "Café 日本 and", Utf8Stream()
        for token in result.token_ids:
            with torch.inference_mode():
                ours = main.model(torch.tensor([ids])).logits[:, -1]
                assistant_ids = assistant.vocabulary.prefix_ids + assistant.vocabulary.encode(text)
                theirs = assistant.model(torch.tensor([assistant_ids])).logits[:, -1]
            step = tiny_pair.fuser.step([ours, None if characters.pending else theirs], tiny_pair.weights)
            assert int(step.chosen) == token
            ids.append(token)
            text += characters.feed(main.vocabulary.bytes_of(token))

    def test_unfinished_characters_wait(self, pair, monkeypatch):
        """While main spells a character byte by byte the assistant sits out, then reads it whole."""
        main, _ = pair.members
        emoji = "🫠"
        spelled = main.vocabulary.encode(f" {emoji}!")
        assert any(
            b"\xf0" in main.vocabulary.bytes_of(i) and len(main.vocabulary.bytes_of(i)) < 5 for i in spelled
        )
        read: list[str] = []
        original = GrowingText.append
        monkeypatch.setattr(
            GrowingText, "append", lambda self, text: read.append(text) or original(self, text)
        )
        asked = {"max_new_tokens": len(spelled), "logits_processor": [forcing(spelled)]}
        result = pair.generate("Hi", draft=0, **asked)  # a draft's text is read, too
        assert result.text == f" {emoji}!"
        assert "".join(read) == f" {emoji}"  # nobody reads the last token
        assert all("\ufffd" not in piece for piece in read)

    @pytest.mark.parametrize("draft", [0, 3])
    def test_no_token_is_fed_twice(self, tiny_pair, draft):
        """Beside the text only what a draft had and did not stand is fed."""
        fed: dict[str, int] = dict.fromkeys(tiny_pair.names, 0)
        hooks = []
        for name, member in zip(tiny_pair.names, tiny_pair.members, strict=True):

            def count(_module, _arguments, keywords, name=name):
                fed[name] += keywords["input_ids"].shape[1]

            hooks.append(member.model.register_forward_pre_hook(count, with_kwargs=True))
        try:
            result = tiny_pair.generate(LONG, max_new_tokens=32, draft=draft)
        finally:
            for hook in hooks:
                hook.remove()
        main, assistant = tiny_pair.members
        prompt = len(main.vocabulary.prefix_ids + main.vocabulary.encode(LONG))
        dropped = result.timings.drafted - result.timings.stood
        assert (dropped > 0) == (draft > 0)
        assert fed[tiny_pair.names[0]] == prompt + 31 + dropped
        text = LONG + result.text
        tokens = len(assistant.vocabulary.prefix_ids + assistant.vocabulary.encode(text))
        # Re-tokenising the end of the text rolls a few tokens back, never the prompt.
        assert tokens - 3 <= fed[tiny_pair.names[1]] <= tokens + 32


class TestEnding:
    def test_eos(self, smollm2, gemma):
        chat = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
        result = Ensemble([smollm2, gemma], weights=[0.9, 0.1], recipe="bytes").generate(
            chat, max_new_tokens=32
        )
        assert result.finish_reason == "eos"
        assert result.token_ids[-1] in smollm2.eos_ids
        assert "<|im_end|>" not in result.text

    def test_an_assistants_eos_counts(self, smollm2, gemma):
        """Every EOS id of every member stands for the same anchor, one that is the main model's EOS."""
        anchors = shared_anchors([smollm2.vocabulary, gemma.vocabulary], [smollm2.eos_ids, gemma.eos_ids])
        for member, columns in zip((smollm2, gemma), anchors.columns, strict=True):
            assert member.eos_ids
            assert {int(columns[i]) for i in member.eos_ids} == {anchors.eos_column}
        assert int(anchors.token_ids[0][anchors.eos_column]) in smollm2.eos_ids

    @pytest.mark.parametrize("stop", [" Paris", "aris.", ["nothing like it", "Par"]])
    def test_stop_strings_across_tokens(self, pair, stop):
        result = pair.generate(PROMPT, max_new_tokens=24, stop_strings=stop)
        assert result.finish_reason == "stop_string"
        stops = [stop] if isinstance(stop, str) else stop
        assert any(one in result.text for one in stops)
        shorter = pair.members[0].vocabulary.decode(result.token_ids[:-1]).decode()
        assert not any(one in shorter for one in stops)

    def test_an_assistant_that_runs_out_of_context(self, smollm2, gemma):
        """Its tokens may be more than main's: the text so far is returned, not lost."""
        spelled = gemma.vocabulary.encode("日本語の文章は長いです")
        assert len(smollm2.vocabulary.encode("日本語の文章は長いです")) > 2 * len(spelled)
        prompt = len(smollm2.vocabulary.encode(PROMPT))
        short = changed(smollm2, context_length=prompt + len(spelled))
        result = Ensemble([gemma, short], recipe="bytes").generate(
            PROMPT, max_new_tokens=len(spelled), logits_processor=[forcing(spelled)]
        )
        assert result.finish_reason == "context"
        assert 0 < len(result.token_ids) < len(spelled)
        assert "日本語の文章は長いです".startswith(result.text)
        assert result.text


class TestRepeatable:
    def test_greedy_with_one_thread_and_two(self, tiny_pair):
        before = torch.get_num_threads()
        try:
            texts = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                texts.append(tiny_pair.generate(LONG, max_new_tokens=24).text)
        finally:
            torch.set_num_threads(before)
        assert texts[0] == texts[1] == texts[2]

    def test_sampling_with_a_seed(self, tiny_pair):
        settings = {"max_new_tokens": 16, "do_sample": True, "temperature": 1.2, "top_p": 0.95}
        first = tiny_pair.generate(LONG, seed=7, **settings)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            again = tiny_pair.generate(LONG, seed=7, **settings)
        finally:
            torch.set_num_threads(before)
        assert first.token_ids == again.token_ids
        assert first.token_ids != tiny_pair.generate(LONG, seed=8, **settings).token_ids

    def test_a_tiny_top_p_is_greedy(self, tiny_pair):
        sampled = tiny_pair.generate(LONG, max_new_tokens=12, do_sample=True, top_p=1e-6, seed=1)
        assert sampled.token_ids == tiny_pair.generate(LONG, max_new_tokens=12).token_ids


class TestRowsOnDisk:
    def test_a_second_run_computes_none(self, tiny_smollm2, tiny_gemma, rows_folder):
        first = Ensemble([tiny_smollm2, tiny_gemma], recipe="calibrated", relative_temperature=21)
        asked = {"max_new_tokens": 8, "draft": 0}  # how far "auto" writes ahead depends on the time
        text = first.generate(PROMPT, **asked).text
        assert first.rows_computed > 0
        second = Ensemble([tiny_smollm2, tiny_gemma], recipe="calibrated", relative_temperature=21)
        assert second.generate(PROMPT, **asked).text == text
        assert second.rows_computed == 0
        # Other settings are other rows.
        third = Ensemble([tiny_smollm2, tiny_gemma], recipe="calibrated", relative_temperature=22)
        assert third.maps[0].rows_known == 0

    def test_a_damaged_file_is_reported_and_rebuilt(self, tiny_smollm2, tiny_gemma, rows_folder):
        first = Ensemble([tiny_smollm2, tiny_gemma], recipe="bytes", candidates=64)
        text = first.generate(PROMPT, max_new_tokens=4).text
        files = [rows_folder / f"{one.fingerprint}.safetensors" for one in first.maps]
        for file in files:
            data = bytearray(file.read_bytes())
            data[-5] ^= 0xFF
            file.write_bytes(data)
        with pytest.warns(UserWarning, match=r"damaged.*computed anew"):
            second = Ensemble([tiny_smollm2, tiny_gemma], recipe="bytes", candidates=64)
        assert second.generate(PROMPT, max_new_tokens=4).text == text
        assert second.rows_computed > 0
        third = Ensemble([tiny_smollm2, tiny_gemma], recipe="bytes", candidates=64)
        assert third.maps[0].rows_known == second.maps[0].rows_known

    def test_rows_that_cannot_be_kept_do_not_cost_the_text(
        self, tiny_smollm2, tiny_gemma, rows_folder, monkeypatch
    ):
        def full(self, path):
            raise OSError(28, "No space left on device")

        ensemble = Ensemble([tiny_smollm2, tiny_gemma], recipe="bytes", candidates=65)
        monkeypatch.setattr(RelativeMap, "save", full)
        monkeypatch.setattr(ensemble.team.maps, "_saved", [-1, -1])
        with pytest.warns(UserWarning, match="rows cannot be kept in .*No space left"):
            assert ensemble.generate(PROMPT, max_new_tokens=2).token_ids

    def test_no_dense_matrix_is_allocated(self, pair):
        for relative in pair.maps:
            assert not relative.is_dense
            assert relative.rows.values.shape[1] <= 32


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prompt": ""}, "prompt is empty"),
            ({"max_new_tokens": 0}, "max_new_tokens is 0"),
            ({"temperature": 0.0, "do_sample": True}, "temperature is 0"),
            ({"top_p": 0.0, "do_sample": True}, "top_p is 0"),
            ({"top_p": 1.1, "do_sample": True}, "top_p is 1.1"),
            ({"stop_strings": [""]}, "stop_strings"),
            ({"max_new_tokens": 8190}, "SmolLM2.*|.*context of 8192; shorten the prompt"),
        ],
    )
    def test_generate(self, pair, arguments, message):
        with pytest.raises(InputError, match=message):
            pair.generate(**({"prompt": PROMPT} | arguments))

    def test_context_of_an_assistant(self, smollm2, gemma):
        short = changed(gemma, context_length=20, name="short-gemma")
        with pytest.raises(InputError, match="short-gemma: the prompt's 6 tokens and 15 new ones exceed"):
            Ensemble([smollm2, short], recipe="bytes").generate(PROMPT, max_new_tokens=15)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"recipe": "byte"}, "recipe is 'byte'; use one of bytes, calibrated, paper"),
            ({"weights": [0.5]}, "1 weights for 2 members"),
            ({"weights": [0.5, 0.6]}, "sum to 1.1"),
            ({"learning_rate": 0}, "learning_rate is 0"),
            ({"steps": 0}, "steps is 0"),
            ({"candidates": 0}, "candidates is 0"),
            ({"entries": 0}, "entries is 0"),
            ({"recipe": "calibrated", "relative_temperature": -3}, "temperature is -3"),
            ({"recipe": "bytes", "relative_temperature": 20}, "bytes recipe has no temperature"),
            ({"min_probability": 1.0}, "min_probability is 1"),
        ],
    )
    def test_settings(self, smollm2, gemma, settings, message):
        with pytest.raises(InputError, match=message):
            Ensemble([smollm2, gemma], **settings)

    def test_one_member(self, smollm2):
        with pytest.raises(InputError, match="two or more members"):
            Ensemble([smollm2])
        with pytest.raises(InputError, match="two or more members"):
            Ensemble.from_pretrained(["somewhere"])

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ("org/model", "'org/model' alone; give a list of names"),
            (Path("model.gguf"), "'model.gguf' alone"),
            (None, "of type NoneType"),
            ({"/no/a", "/no/b"}, "of type set"),  # which is the main model?
            ({"/no/a": 1, "/no/b": 2}, "of type dict"),
            ((name for name in ("/no/a", "/no/b")), "of type generator"),
            (["/no/a", None], "member 1 is None"),
            (["/no/a", 7], "member 1 is 7"),
            (["", "/no/b"], "member 0 is ''"),
        ],
    )
    def test_names_that_are_no_list_of_names(self, members, message):
        with pytest.raises(InputError, match=message):
            Ensemble.from_pretrained(members)
        with pytest.raises(InputError, match=message):
            load_members(members)

    def test_names_in_the_place_of_members(self):
        with pytest.raises(InputError, match="'org/a' is no loaded member; Ensemble"):
            Ensemble(["org/a", "org/b"])
        with pytest.raises(InputError, match="None is no loaded member"):
            Ensemble(None)

    def test_bytes_are_no_prompt(self, pair):
        with pytest.raises(InputError, match=r"the prompt is bytes; give a text, prompt.decode\(\)"):
            pair.generate(b"The sky")
        with pytest.raises(InputError, match="prompt 1 is bytes"):
            pair.generate(["The sky", b"The sky"])

    def test_a_trace_that_is_no_file(self, pair):
        with pytest.raises(InputError, match="trace is of type list; give a file's name, or a function"):
            pair.generate(PROMPT, trace=[])

    def test_weights_are_checked_before_loading(self):
        with pytest.raises(InputError, match="3 weights for 2 members"):
            Ensemble.from_pretrained(["no/such", "no/where"], weights=[0.5, 0.3, 0.2])

    def test_nan_logits_name_the_member(self, smollm2, gemma):
        ensemble = Ensemble([smollm2, gemma], recipe="bytes")
        hook = gemma.model.lm_head.register_forward_hook(lambda _m, _i, output: output * float("nan"))
        try:
            with pytest.raises(InputError, match=f"logits of {ensemble.names[1]}.*NaN"):
                ensemble.generate(PROMPT, max_new_tokens=3)
        finally:
            hook.remove()
        assert "Paris" in ensemble.generate(PROMPT, max_new_tokens=3).text
