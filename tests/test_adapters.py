"""transformers' own calls, with an ensemble behind them: the same text as `Ensemble.generate`.

Tiny models with real tokenizers; the demo pair itself where `demo_pair` is."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    GenerationConfig,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
    TextIteratorStreamer,
    set_seed,
)

from deepen_ext import Ensemble, InputError
from deepen_ext.adapters import DeepenLogitsProcessor, custom_generate, pipeline
from deepen_ext.decoding.assistants import Assistants
from deepen_ext.decoding.prompt_ids import text_of

SHORT = "The capital of France is"
LONG = (
    "The history of tea begins in ancient China, where, it is said, leaves from a wild tree blew into a pot "
    "of boiling water. From there it spread to"
)
REPEATED = "A cormorant dry its wings 🦙🦙, a cormorant dry its wings 🦙🦙, a cormorant dry"
CHAT = [{"role": "user", "content": "What is the capital of Australia?"}]
TOKENS = 6


@pytest.fixture(scope="module")
def pair(tiny_smollm2, tiny_gemma):
    return Ensemble([tiny_smollm2, tiny_gemma], fuser="deepen", learning_rate=0.3, cache=False)


@pytest.fixture(scope="module")
def demo_pair(smollm2, gemma):
    return Ensemble([smollm2, gemma], recipe="bytes", cache=False)


@pytest.fixture(scope="module")
def main(pair):
    """The main model, as transformers has it."""
    return pair.members[0].model


@pytest.fixture(scope="module")
def expected(pair):
    """What `Ensemble.generate` writes; not what the main model writes alone."""
    batch = pair.generate([SHORT, LONG], max_new_tokens=TOKENS)
    assert all(one.changed_tokens for one in batch)
    return [one.token_ids for one in batch]


@pytest.fixture
def fuse(pair):
    with DeepenLogitsProcessor(pair) as processor:
        yield processor


def inputs(pair, *prompts: str):
    """What a tokenizer gives `generate`: ids and mask, shorter prompts padded on the left."""
    return pair.members[0].tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")


def new_ids(output: torch.Tensor, given) -> list[list[int]]:
    return output[:, given["input_ids"].shape[1] :].tolist()


def test_the_demo_pair_writes_the_same_in_every_way(demo_pair):
    batch = demo_pair.generate([SHORT, LONG], max_new_tokens=TOKENS)
    expected = [one.token_ids for one in batch]
    assert "Paris" in batch.texts[0]
    assert any(one.changed_tokens for one in batch)
    given, model = inputs(demo_pair, SHORT, LONG), demo_pair.members[0].model
    settings = {"max_new_tokens": TOKENS, "do_sample": False}
    with DeepenLogitsProcessor(demo_pair) as fuse:
        assert new_ids(model.generate(**given, logits_processor=[fuse], **settings), given) == expected
    own = model.generate(**given, custom_generate=demo_pair.custom_generate, **settings)
    assert new_ids(own, given) == expected
    records = pipeline(demo_pair, **settings)([SHORT, LONG], return_full_text=False, batch_size=2)
    assert [record[0]["generated_text"] for record in records] == batch.texts


class TestSameText:
    """Greedy: two rows, of which the shorter is padded."""

    def test_logits_processor(self, pair, main, fuse, expected):
        given = inputs(pair, SHORT, LONG)
        assert (given["attention_mask"] == 0).any()
        output = main.generate(**given, logits_processor=[fuse], max_new_tokens=TOKENS, do_sample=False)
        assert new_ids(output, given) == expected

    def test_custom_generate(self, pair, main, expected):
        given = inputs(pair, SHORT, LONG)
        output = main.generate(
            **given, custom_generate=pair.custom_generate, max_new_tokens=TOKENS, do_sample=False
        )
        assert output.dtype == torch.int64
        assert torch.equal(output[:, : given["input_ids"].shape[1]], given["input_ids"])
        assert new_ids(output, given) == expected

    def test_pipeline(self, pair, expected):
        write = pipeline(pair, max_new_tokens=TOKENS, do_sample=False)
        texts = [pair.members[0].tokenizer.decode(ids) for ids in expected]
        records = write([SHORT, LONG], return_full_text=False, batch_size=2)
        assert [record[0]["generated_text"] for record in records] == texts
        assert write(SHORT)[0]["generated_text"] == SHORT + texts[0]

    def test_rows_that_end_at_different_steps(self, pair, main, fuse):
        """A stop after the tokens of one row; the other goes on, and the first is padded."""
        tokenizer = pair.members[0].tokenizer
        texts = [tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True), LONG]
        ends = [*pair.members[0].eos_ids, pair.generate(texts[0], max_new_tokens=TOKENS).token_ids[2]]
        alone = [pair.generate(text, max_new_tokens=TOKENS, eos_token_id=ends) for text in texts]
        lengths = [len(one.token_ids) for one in alone]
        assert lengths[0] <= 3 < lengths[1]
        padding = [[tokenizer.pad_token_id] * (max(lengths) - length) for length in lengths]
        padded = [one.token_ids + pads for one, pads in zip(alone, padding, strict=True)]
        given = inputs(pair, *texts)
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": ends}
        assert new_ids(main.generate(**given, logits_processor=[fuse], **settings), given) == padded
        output = main.generate(**given, custom_generate=pair.custom_generate, **settings)
        assert new_ids(output, given) == padded

    def test_gemma_as_the_main_model(self, pair):
        """Its tokenizer puts BOS before the text, and pads with a token of its own."""
        small, gemma = pair.members
        swapped = Ensemble([gemma, small], fuser="deepen", learning_rate=0.3, cache=False)
        tokens = [one.token_ids for one in swapped.generate([SHORT, LONG], max_new_tokens=5)]
        given = inputs(swapped, SHORT, LONG)
        assert (given["input_ids"] == gemma.tokenizer.bos_token_id).sum() == 2
        settings = {"max_new_tokens": 5, "do_sample": False}
        with DeepenLogitsProcessor(swapped) as processor:
            output = gemma.model.generate(**given, logits_processor=[processor], **settings)
        assert new_ids(output, given) == tokens
        output = gemma.model.generate(**given, custom_generate=swapped.custom_generate, **settings)
        assert new_ids(output, given) == tokens


class TestLogitsProcessor:
    def test_beams(self, pair, main, fuse, monkeypatch):
        """Rows change places at every step: each is what it would be alone, and no prompt is read twice."""
        orders: list[list[int]] = []
        reorder = Assistants.reorder
        monkeypatch.setattr(
            Assistants, "reorder", lambda self, sources: orders.append(sources) or reorder(self, sources)
        )
        calls = []

        def record(ids, scores):
            fused = fuse(ids, scores)
            calls.append((ids.clone(), scores.clone(), fused.clone()))
            return fused

        given = inputs(pair, SHORT, LONG)
        main.generate(**given, logits_processor=[record], num_beams=3, max_new_tokens=5, do_sample=False)
        assert len(calls) == 5
        assert any(len(set(order)) < 6 for order in orders)  # some beam gave two, another none
        ids, scores, fused = calls[-1]
        # Their sum is that of transformers' own: 1 as far as float32 sums of 49,152 terms go.
        torch.testing.assert_close(fused.logsumexp(-1), scores.logsumexp(-1), atol=2e-4, rtol=0)
        torch.testing.assert_close(scores.logsumexp(-1), torch.zeros(6), atol=1e-3, rtol=0)
        for row in range(0, 6, 2):
            with DeepenLogitsProcessor(pair) as alone:
                one = slice(row, row + 1)
                torch.testing.assert_close(alone(ids[one], scores[one]), fused[one], atol=2e-4, rtol=1e-4)
        (session,) = fuse._assistants._sessions
        short, long = (len(pair.members[1].vocabulary.encode(text)) + 1 for text in (SHORT, LONG))
        # Beams of one prompt share it, where it is long enough; a step of a beam feeds a few tokens.
        assert short + long < session._session.tokens_fed < 3 * short + long + 2 + 6 * 4 * 5

    def test_one_processor_for_several_calls(self, pair, main, fuse, expected):
        """Another prompt, fewer rows."""
        settings = {"logits_processor": [fuse], "max_new_tokens": TOKENS, "do_sample": False}
        for rows in ([0, 1], [1]):
            given = inputs(pair, *([SHORT, LONG][row] for row in rows))
            assert new_ids(main.generate(**given, **settings), given) == [expected[row] for row in rows]

    def test_a_processor_after_it_acts_on_the_fused_scores(self, pair, main, fuse):
        penalised = pair.generate(REPEATED, max_new_tokens=TOKENS, repetition_penalty=1.5)
        assert penalised.token_ids != pair.generate(REPEATED, max_new_tokens=TOKENS).token_ids
        given = inputs(pair, REPEATED)
        after = [fuse, RepetitionPenaltyLogitsProcessor(1.5)]
        output = main.generate(**given, logits_processor=after, max_new_tokens=TOKENS, do_sample=False)
        assert new_ids(output, given) == [penalised.token_ids]

    def test_a_chat(self, pair, main):
        answer = pair.generate(CHAT, without_template="plain", max_new_tokens=TOKENS)
        given = chat_inputs(pair)
        with DeepenLogitsProcessor(pair, messages=CHAT, without_template="plain") as fuse:
            output = main.generate(**given, logits_processor=[fuse], max_new_tokens=TOKENS, do_sample=False)
        assert new_ids(output, given) == [answer.token_ids]

    @pytest.mark.parametrize("drafts", ["prompt lookup", "a model"])
    def test_assisted_decoding_writes_the_same(self, pair, main, drafts):
        """transformers goes back wherever a draft is not what the fused scores say."""
        given = inputs(pair, REPEATED)
        expected = pair.generate(REPEATED, max_new_tokens=14, eos_token_id=[5])
        assert expected.changed_tokens
        shown, back, drafts_left_alone = [], [], []

        class Watched(DeepenLogitsProcessor):
            def __call__(self, input_ids, scores):
                back.append(input_ids.shape[1] < shown[-1] if shown else False)
                shown.append(input_ids.shape[1])
                fused = super().__call__(input_ids, scores)
                drafts_left_alone.append(fused is scores)
                return fused

        draft = {"prompt lookup": {"prompt_lookup_num_tokens": 4}, "a model": {"assistant_model": main}}
        with Watched(pair) as fuse:
            output = main.generate(
                **given,
                logits_processor=[fuse],
                max_new_tokens=14,
                do_sample=False,
                eos_token_id=[5],
                **draft[drafts],
            )
        assert new_ids(output, given) == [expected.token_ids]
        assert any(back)
        assert any(drafts_left_alone)
        assert not all(drafts_left_alone)

    @pytest.mark.parametrize(
        "later",
        [
            "🦙🦙",
            "<|im_start|>user",
            "🦙<|im_start|>",
            "<|im_end|>",
            "<|im_end|><|im_end|>",
            "<|im_end|>\nHi",
        ],
    )
    def test_the_same_ids_are_the_same_text(self, pair, later):
        """Step by step, begun anew, and gone back to: what an assistant reads depends on the ids alone."""
        vocabulary = pair.members[0].vocabulary
        prompt, after = vocabulary.encode("ok"), vocabulary.encode(later)
        assert later[0] != "🦙" or len(vocabulary.encode("🦙")) > 1  # some end inside a character
        scores = torch.randn(1, pair.members[0].vocab_size, generator=torch.Generator().manual_seed(1))
        with DeepenLogitsProcessor(pair) as steps:
            for end in (*range(len(after) + 1), *range(len(after), -1, -1)):
                ids = torch.tensor([prompt + after[:end]])
                fused = steps(ids, scores)
                with DeepenLogitsProcessor(pair) as anew:
                    torch.testing.assert_close(fused, anew(ids, scores), atol=1e-4, rtol=1e-4)
                    assert read_by(steps) == read_by(anew)

    def test_a_prompt_that_ends_inside_a_character(self, pair, main, fuse):
        """The assistants wait for the rest of it, as they do for a character that was begun by a step."""
        vocabulary = pair.members[0].vocabulary
        ids = torch.tensor([vocabulary.encode("A llama: 🦙")[:-1]])
        rest = SuppressTokensLogitsProcessor(
            [i for i in range(vocabulary.vocab_size) if i != vocabulary.encode("A llama: 🦙")[-1]]
        )
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False}
        main.generate(ids, logits_processor=[fuse, rest], **settings)
        assert read_by(fuse) == ["A llama: "]
        texts = []
        with pytest.MonkeyPatch.context() as patch:
            close = Assistants.close
            patch.setattr(
                Assistants, "close", lambda self: texts.append(self.texts[0]._text(0).text) or close(self)
            )
            main.generate(
                ids,
                custom_generate=pair.custom_generate,
                logits_processor=[rest],
                **settings,
            )
        assert set(texts) == {"A llama: 🦙"}

    def test_padding_is_what_the_mask_says(self, pair, main, fuse):
        """SmolLM2 pads with its EOS, which a prompt may begin with: no padding where the mask is 1."""
        tokenizer = pair.members[0].tokenizer
        eos = tokenizer.pad_token_id
        assert eos in pair.members[0].eos_ids
        given = tokenizer(
            ["<|im_end|><|im_end|>Sky", LONG], return_tensors="pt", padding=True, padding_side="left"
        )
        main.generate(**given, logits_processor=[fuse], max_new_tokens=1, do_sample=False)
        assert read_by(fuse) == ["<|im_end|><|im_end|>Sky", LONG]
        alone = {name: one[:1, -3:] for name, one in given.items()}
        main.generate(**alone, logits_processor=[fuse], max_new_tokens=1, do_sample=False)
        assert read_by(fuse) == ["<|im_end|><|im_end|>Sky"]
        alone["attention_mask"] = torch.tensor([[0, 1, 1]])
        main.generate(**alone, logits_processor=[fuse], max_new_tokens=1, do_sample=False)
        assert read_by(fuse) == ["<|im_end|>Sky"]

    def test_a_prompt_that_ends_with_several_eos_ids(self, pair, main, fuse):
        """They are the prompt's own, not what follows the end of a row."""
        given = inputs(pair, "Sky<|im_end|><|im_end|><|im_end|>")
        main.generate(**given, logits_processor=[fuse], max_new_tokens=1, do_sample=False)
        assert read_by(fuse) == ["Sky<|im_end|><|im_end|><|im_end|>"]

    def test_prompts_it_cannot_read(self, pair, main, fuse):
        settings = {"logits_processor": [fuse], "max_new_tokens": 2, "do_sample": False}
        right = pair.members[0].tokenizer(
            [SHORT, LONG], return_tensors="pt", padding=True, padding_side="right"
        )
        with pytest.raises(InputError, match="prompt 0 is padded on the right; pad on the left"):
            main.generate(**right, **settings)
        embeddings = main.get_input_embeddings()(inputs(pair, SHORT)["input_ids"])
        with pytest.raises(InputError, match="no use for inputs_embeds"):
            main.generate(inputs_embeds=embeddings, **settings)
        with pytest.raises(InputError, match="prompt 0 is empty"):
            fuse(torch.empty(1, 0, dtype=torch.long), torch.randn(1, pair.members[0].vocab_size))

    def test_scores_of_another_model(self, fuse):
        with pytest.raises(InputError, match="as many tokens as the member has"):
            fuse(torch.tensor([[1, 2, 3]]), torch.randn(1, 1000))

    def test_chats_and_rows_that_do_not_fit(self, pair):
        fuse = DeepenLogitsProcessor(pair, messages=[CHAT, CHAT], without_template="plain")
        with pytest.raises(InputError, match="there are 2 chats for 3 prompts"):
            fuse(torch.ones(3, 4, dtype=torch.long), torch.randn(3, pair.members[0].vocab_size))

    def test_close_frees_the_caches(self, pair, monkeypatch):
        closed = []
        monkeypatch.setattr(Assistants, "close", lambda self: closed.append(self))
        with DeepenLogitsProcessor(pair) as fuse:
            fuse(inputs(pair, SHORT)["input_ids"], torch.randn(1, pair.members[0].vocab_size))
            assert not closed
        assert len(closed) == 1
        assert fuse._assistants is None


def read_by(fuse: DeepenLogitsProcessor) -> list[str]:
    """What the assistant has read of each row."""
    assistants = fuse._assistants
    return [text._text(0).text for text in assistants.texts.values()]


class TestCustomGenerate:
    def test_eos_ids_that_generation_config_does_not_name(self, pair, expected, monkeypatch):
        """The config and the tokenizer name some too, which transformers does not pass on."""
        own, end = pair.members[0].eos_ids, expected[0][2]
        assert end not in (*own, *expected[0][:2])
        first = replace(pair.members[0], eos_ids=(*own, end))
        ensemble = Ensemble([first, pair.members[1]], fuser="deepen", learning_rate=0.3, cache=False)
        monkeypatch.setattr(first.model.generation_config, "eos_token_id", own[0])
        text = ensemble.generate(SHORT, max_new_tokens=TOKENS).token_ids
        assert text == expected[0][:3]
        given = inputs(ensemble, SHORT)
        settings = {"custom_generate": ensemble.custom_generate, "max_new_tokens": TOKENS, "do_sample": False}
        assert new_ids(first.model.generate(**given, **settings), given) == [text]
        on = first.model.generate(**given, **settings, eos_token_id=[own[0], expected[0][4]])
        assert len(new_ids(on, given)[0]) > 3  # other ids that are asked for are the only ones

    def test_streamers_get_the_text(self, pair, main, expected):
        """transformers keeps the streamer from a callable: only the prompt would arrive, and no end."""
        tokenizer = pair.members[0].tokenizer
        text = tokenizer.decode(expected[1])
        given = inputs(pair, LONG)
        for skip_prompt, start in ((True, ""), (False, LONG)):
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=1)
            output = main.generate(
                **given,
                custom_generate=pair.custom_generate,
                streamer=streamer,
                max_new_tokens=TOKENS,
                do_sample=False,
            )
            assert "".join(streamer) == start + text
            assert new_ids(output, given) == [expected[1]]

    @pytest.mark.parametrize("settings", [{"guidance_scale": 2.0}, {"max_new_tokens": 8190}])
    def test_a_streamer_ends_with_an_error(self, pair, main, settings):
        streamer = TextIteratorStreamer(pair.members[0].tokenizer, timeout=1)
        with pytest.raises(InputError):
            main.generate(
                **inputs(pair, SHORT),
                custom_generate=pair.custom_generate,
                streamer=streamer,
                **({"max_new_tokens": 4} | settings),
            )
        assert "".join(streamer) == SHORT  # and no queue.Empty: it has an end

    @pytest.mark.parametrize(
        "settings",
        [
            {"repetition_penalty": 1.5, "min_new_tokens": TOKENS},
            {"stop_strings": ["wings"]},
            {"do_sample": True, "temperature": 1.5, "top_k": 20, "seed": 7},
            {"certified_skip": True},
        ],
    )
    def test_settings_act_as_in_the_ensemble(self, pair, main, settings):
        """On rows without their padding, which transformers' own processors would take for text."""
        prompts = [REPEATED, LONG]
        alone = pair.generate(prompts, max_new_tokens=TOKENS, **settings)
        as_ever = pair.generate(prompts, max_new_tokens=TOKENS).texts == alone.texts
        assert as_ever == ("certified_skip" in settings)
        given = inputs(pair, *prompts)
        output = main.generate(
            **given,
            custom_generate=pair.custom_generate,
            max_new_tokens=TOKENS,
            tokenizer=pair.members[0].tokenizer,
            **({"do_sample": False} | settings),
        )
        for ids, one in zip(new_ids(output, given), alone, strict=True):
            assert ids[: len(one.token_ids)] == one.token_ids
            assert set(ids[len(one.token_ids) :]) <= {pair.members[0].tokenizer.pad_token_id}

    @pytest.mark.parametrize(
        ("prompt", "written", "stop"),
        [
            ("Hello there", "! And more", "there!"),
            ("Hello", " there! And", "there!"),
            ("Hello", "<|im_start|>user", "<|im_start|>"),
            ("Hello", " you<|im_start|>user", "you<|im_start|>"),
            ("Hello there!", " And more", "there!"),
            ("Hello", " 🦙🦙 and", "🦙"),
        ],
    )
    def test_stop_strings_as_in_transformers(self, tiny_smollm2, prompt, written, stop):
        """Its own criterion: a stop string may begin in the prompt, and be a special token's name."""
        alone, smollm2 = Ensemble([tiny_smollm2], fuser="single"), tiny_smollm2
        given = inputs(alone, prompt)
        forced = smollm2.vocabulary.encode(written)
        start = given["input_ids"].shape[1]
        settings = {
            "stop_strings": [stop],
            "max_new_tokens": len(forced),
            "do_sample": False,
            "prefix_allowed_tokens_fn": lambda _, ids: [forced[len(ids) - start]],
        }
        expected = smollm2.model.generate(**given, **settings, tokenizer=smollm2.tokenizer)
        output = smollm2.model.generate(**given, **settings, custom_generate=alone.custom_generate)
        assert torch.equal(output, expected)
        own = alone.generate(prompt, **settings)
        in_prompt = prompt.endswith("there")
        assert own.finish_reason == (
            "length" if in_prompt or output.shape[1] == start + len(forced) else "stop_string"
        )
        if not in_prompt:  # a stop string of the ensemble's stands in the new text
            assert own.token_ids == expected[0, start:].tolist()

    def test_special_tokens_are_handed_over_by_name(self, pair, main, fuse):
        """Written by the loop as they are read in a prompt; the text is without them."""
        forced = pair.members[0].vocabulary.encode("Hi<|im_start|>user")
        prompt = len(inputs(pair, SHORT)["input_ids"][0])
        settings = {
            "max_new_tokens": len(forced),
            "prefix_allowed_tokens_fn": lambda _, ids: [forced[len(ids) - prompt]],
        }
        run = pair.start(SHORT, **settings)
        for _ in run:
            pass
        assert run._assistants.texts[0]._text(0).text == SHORT + "Hi<|im_start|>user"
        assert run.results()[0].text == "Hiuser"

    def test_own_processors_and_criteria(self, pair, main, expected):
        class AfterFour(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                return torch.tensor([input_ids.shape[1] >= prompt + 4])

        prompt = len(pair.members[0].vocabulary.encode(SHORT))
        forbid = SuppressTokensLogitsProcessor([expected[0][0]], device="cpu")
        arguments = {"logits_processor": [forbid], "stopping_criteria": [AfterFour()]}
        alone = pair.generate(SHORT, max_new_tokens=TOKENS, **arguments)
        assert alone.finish_reason == "stopping_criteria"
        assert alone.token_ids[0] != expected[0][0]
        given = inputs(pair, SHORT)
        output = main.generate(
            **given,
            custom_generate=pair.custom_generate,
            max_new_tokens=TOKENS,
            do_sample=False,
            **arguments,
        )
        assert new_ids(output, given) == [alone.token_ids]

    def test_a_generation_config_and_a_dictionary_back(self, pair, main, expected):
        given = inputs(pair, SHORT)
        length = given["input_ids"].shape[1]
        config = GenerationConfig(max_length=length + 3, do_sample=False, return_dict_in_generate=True)
        output = main.generate(**given, generation_config=config, custom_generate=pair.custom_generate)
        assert new_ids(output.sequences, given) == [expected[0][:3]]
        assert config.max_length == length + 3

    def test_greedy_whatever_the_model_says_about_sampling(self, pair, main, expected, monkeypatch):
        """A chat model's generation_config.json often has a temperature, which greedy decoding ignores."""
        monkeypatch.setattr(main.generation_config, "do_sample", True)
        monkeypatch.setattr(main.generation_config, "temperature", 0.6)
        given = inputs(pair, SHORT)
        output = main.generate(
            **given, custom_generate=pair.custom_generate, max_new_tokens=3, do_sample=False
        )
        assert new_ids(output, given) == [expected[0][:3]]

    def test_several_samples_and_set_seed(self, pair, main):
        def draw():
            set_seed(3)
            return main.generate(
                **inputs(pair, LONG),
                custom_generate=pair.custom_generate,
                do_sample=True,
                temperature=1.5,
                num_return_sequences=2,
                max_new_tokens=5,
            )

        first = draw()
        assert first.shape[0] == 2
        assert not torch.equal(first[0], first[1])
        assert torch.equal(first, draw())

    def test_a_chat(self, pair, main):
        """The assistants read it in their own way, not in the main model's template."""
        answer = pair.generate(CHAT, without_template="plain", max_new_tokens=TOKENS)
        given, records = chat_inputs(pair), []
        output = main.generate(
            **given,
            custom_generate=pair.custom_generate,
            messages=CHAT,
            without_template="plain",
            trace=records.append,
            max_new_tokens=TOKENS,
            do_sample=False,
        )
        assert new_ids(output, given) == [answer.token_ids]
        assert len(records) == len(answer.token_ids)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_beams": 2}, "num_beams is 2, .* logits processor"),
            ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
            ({"certified_skip": True, "do_sample": True}, "certified_skip"),
            ({"messages": CHAT}, "tiny-gemma: its tokenizer has no chat template"),
            ({"messages": [CHAT, CHAT], "without_template": "plain"}, "there are 2 chats for 1 prompts"),
            ({"attention_mask": torch.zeros(1, 5, dtype=torch.long)}, "prompt 0 is empty"),
        ],
    )
    def test_what_it_refuses(self, pair, main, settings, message):
        given = {**inputs(pair, SHORT), "max_new_tokens": 4} | settings
        with pytest.raises(InputError, match=message):
            main.generate(**given, custom_generate=pair.custom_generate)

    def test_one_chat_for_two_prompts(self, pair, main):
        """Here and in the logits processor; the texts of one prompt may share its chat."""
        chat = {"messages": CHAT, "without_template": "plain"}
        settings = {"max_new_tokens": 2, "do_sample": True}
        two = {one: row.repeat(2, 1) for one, row in inputs(pair, SHORT).items()}
        other = {**two, "input_ids": two["input_ids"].clone()}
        other["input_ids"][1, 0] += 1
        for given, refused in ((two, False), (other, True)):
            with pytest.raises(InputError, match="prompts 0 and 1 differ") if refused else nullcontext():
                main.generate(**given, **settings, custom_generate=pair.custom_generate, **chat)
            with (
                DeepenLogitsProcessor(pair, **chat) as fuse,
                pytest.raises(InputError, match="prompts 0 and 1 differ") if refused else nullcontext(),
            ):
                main.generate(**given, **settings, logits_processor=[fuse])

    def test_the_main_model_alone_may_call_it(self, pair):
        with pytest.raises(InputError, match="belongs to tiny-smollm2"):
            pair.members[1].model.generate(**inputs(pair, SHORT), custom_generate=pair.custom_generate)

    def test_not_both_at_once(self, pair, main, fuse):
        with pytest.raises(InputError, match="fuses already"):
            main.generate(
                **inputs(pair, SHORT), custom_generate=pair.custom_generate, logits_processor=[fuse]
            )

    def test_other_ways_of_decoding(self, pair, main):
        with pytest.raises(InputError, match="no use for assistant_model"):
            main.generate(**inputs(pair, SHORT), custom_generate=pair.custom_generate, assistant_model=main)

    def test_called_by_hand(self, pair, main, expected):
        """Not from transformers' generate: processors and streamer are what it is given."""
        ids = inputs(pair, SHORT)["input_ids"]
        config = GenerationConfig(max_length=ids.shape[1] + 3, do_sample=False)
        output = custom_generate(pair)(main, ids, None, None, config)
        assert output[0, ids.shape[1] :].tolist() == expected[0][:3]


class TestPipeline:
    def test_a_chat(self, pair):
        answer = pair.generate(CHAT, without_template="plain", max_new_tokens=TOKENS)
        write = pipeline(pair, without_template="plain")
        (record,) = write(CHAT, max_new_tokens=TOKENS, do_sample=False)
        assert record["generated_text"] == [*CHAT, {"role": "assistant", "content": answer.text}]

    def test_it_samples_by_default(self, pair):
        write = pipeline(pair, max_new_tokens=4)
        set_seed(11)
        texts = [write(LONG, temperature=2.0)[0]["generated_text"] for _ in range(4)]
        assert len(set(texts)) > 1

    @pytest.mark.parametrize("name", ["tools", "documents", "continue_final_message"])
    def test_what_only_the_main_template_would_see(self, pair, name):
        with pytest.raises(InputError, match=f"{name} is not supported"):
            pipeline(pair)(CHAT, **{name: [{}]})

    def test_the_members_tokenizer_is_left_alone(self, pair):
        assert pipeline(pair).tokenizer.padding_side == "left"
        assert pair.members[0].tokenizer.padding_side == "right"


class TestTextOfIds:
    @pytest.mark.parametrize(
        "text", ["Hello", " two  spaces", "日本 🫠\n", "<|im_start|>user\nHi<|im_end|>\n"]
    )
    def test_main_ids_back_to_text(self, tiny_smollm2, tiny_gemma, text):
        for member in (tiny_smollm2, tiny_gemma):
            vocabulary = member.vocabulary
            assert text_of(member, vocabulary.prefix_ids + vocabulary.encode(text)) == (text, b"")

    def test_nothing_but_bos(self, tiny_gemma):
        assert text_of(tiny_gemma, tiny_gemma.vocabulary.prefix_ids) == ("", b"")


def test_the_snippets_of_the_documentation(demo_pair, monkeypatch, capsys):
    """`docs/adapters.md` from top to bottom; only the loading is left out."""
    monkeypatch.setattr(Ensemble, "from_pretrained", lambda folders, *, backend: demo_pair)
    page = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(snippets) == 7
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert capsys.readouterr().out.count("Paris") == 3


def chat_inputs(pair):
    """The chat in the main model's template."""
    return pair.members[0].tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def test_the_default_follows_the_prompt_in_transformers_loop_too(tiny_smollm2, tiny_gemma):
    """Weights from the prompt: the processor reads it, and gives what `Ensemble.generate` writes."""
    pair = Ensemble([tiny_smollm2, tiny_gemma], learning_rate=0.3, cache=False)
    assert pair.weighs_prompts
    expected = [one.token_ids for one in pair.generate([SHORT, LONG], max_new_tokens=TOKENS)]
    equal = pair.variant(fuser="deepen").generate([SHORT, LONG], max_new_tokens=TOKENS)
    assert expected != [one.token_ids for one in equal]
    given = inputs(pair, SHORT, LONG)
    settings = {"max_new_tokens": TOKENS, "do_sample": False}
    with DeepenLogitsProcessor(pair) as processor:
        for _ in range(2):
            output = pair.members[0].model.generate(**given, logits_processor=[processor], **settings)
            assert new_ids(output, given) == expected
    output = pair.members[0].model.generate(**given, custom_generate=pair.custom_generate, **settings)
    assert new_ids(output, given) == expected
