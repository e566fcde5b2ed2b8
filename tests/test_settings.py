"""Settings: every field of transformers' GenerationConfig is honoured or refused by name."""

from __future__ import annotations

import pytest
import torch
from tiny_models import EOS, tiny_main_model
from transformers import (
    CompileConfig,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from deepen_ext import InputError
from deepen_ext.decoding.setting_rules import HONOURED, NO_EFFECT, REFUSED
from deepen_ext.decoding.settings import Settings

PROMPT = [5, 6, 7, 5]

# A value that does something, and the processor that does it (None: an attribute of Settings).
EXAMPLES = {
    "max_new_tokens": (7, None),
    "max_length": (9, None),
    "min_length": (8, "MinLengthLogitsProcessor"),
    "min_new_tokens": (3, "MinNewTokensLengthLogitsProcessor"),
    "max_time": (2.5, None),
    "stop_strings": (["end", "日"], None),
    "do_sample": (True, None),
    "eos_token_id": ([3, 4], None),
    "temperature": (0.5, "TemperatureLogitsWarper"),
    "top_k": (5, "TopKLogitsWarper"),
    "top_p": (0.9, "TopPLogitsWarper"),
    "min_p": (0.1, "MinPLogitsWarper"),
    "top_h": (0.4, "TopHLogitsWarper"),
    "typical_p": (0.9, "TypicalLogitsWarper"),
    "epsilon_cutoff": (1e-3, "EpsilonLogitsWarper"),
    "eta_cutoff": (1e-3, "EtaLogitsWarper"),
    "repetition_penalty": (1.2, "RepetitionPenaltyLogitsProcessor"),
    "encoder_repetition_penalty": (1.2, "EncoderRepetitionPenaltyLogitsProcessor"),
    "no_repeat_ngram_size": (2, "NoRepeatNGramLogitsProcessor"),
    "encoder_no_repeat_ngram_size": (2, "EncoderNoRepeatNGramLogitsProcessor"),
    "bad_words_ids": ([[8, 9]], "NoBadWordsLogitsProcessor"),
    "renormalize_logits": (True, "LogitNormalization"),
    "forced_bos_token_id": (8, "ForcedBOSTokenLogitsProcessor"),
    "forced_eos_token_id": ([2, 8], "ForcedEOSTokenLogitsProcessor"),
    "exponential_decay_length_penalty": ((3, 1.2), "ExponentialDecayLengthPenalty"),
    "suppress_tokens": ([8, 9], "SuppressTokensLogitsProcessor"),
    "begin_suppress_tokens": ([8], "SuppressTokensAtBeginLogitsProcessor"),
    "sequence_bias": ({(8,): 2.0, (5, 9): -1.0}, "SequenceBiasLogitsProcessor"),
    "watermarking_config": ({"bias": 2.0}, "WatermarkLogitsProcessor"),
}
WARPERS = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# Values away from the default where True is not one.
REFUSED_VALUES = {
    "num_beams": 4,
    "num_return_sequences": 2,
    "use_cache": False,
    "cache_implementation": "static",
    "guidance_scale": 1.5,
    "compile_config": CompileConfig(),
    "penalty_alpha": 0.6,
    "length_penalty": 2.0,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
}


@pytest.fixture(scope="module")
def main():
    return tiny_main_model()


def fields() -> set[str]:
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")}


def kinds(processors) -> list[str]:
    return [type(one).__name__ for one in processors]


class TestEveryField:
    def test_is_honoured_refused_or_without_effect(self):
        """A field that a new transformers adds fails here: decide what it is."""
        assert fields() == HONOURED | REFUSED.keys() | NO_EFFECT
        assert len(HONOURED) + len(REFUSED) + len(NO_EFFECT) == len(fields())
        assert EXAMPLES.keys() == HONOURED

    @pytest.mark.parametrize("name", sorted(EXAMPLES))
    @pytest.mark.parametrize("source", ["keyword", "config"])
    def test_an_honoured_one_counts(self, main, name, source):
        value, processor = EXAMPLES[name]
        given = {name: value, **({"do_sample": True} if name in WARPERS else {})}
        if source == "keyword":
            settings = Settings.read(main, **given)
        else:
            settings = Settings.read(main, GenerationConfig(**given))
        default = Settings.read(main)
        assert kinds(default.processors(PROMPT)) == []
        assert kinds(settings.processors(PROMPT)) == ([processor] if processor else [])
        if processor is None:
            seen = (settings.new_tokens(4), settings.stop_strings, settings.do_sample, settings.eos_ids)
            before = (default.new_tokens(4), default.stop_strings, default.do_sample, default.eos_ids)
            assert seen != before or (name == "max_time" and len(settings.criteria()) == 1)

    @pytest.mark.parametrize("name", sorted(REFUSED))
    @pytest.mark.parametrize("source", ["keyword", "config"])
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_a_refused_one_is_named(self, main, name, source):
        value = REFUSED_VALUES.get(name, True)
        config = GenerationConfig()
        setattr(config, name, value)
        with pytest.raises(InputError, match=f"{name} is .*not supported: "):
            Settings.read(main, **({name: value} if source == "keyword" else {"generation_config": config}))

    def test_defaults_are_accepted(self, main):
        """What transformers fills in before it hands a config over changes nothing."""
        config = GenerationConfig(**GenerationConfig._get_default_generation_params())
        config.max_length = None
        config.guidance_scale = 1
        settings = Settings.read(main, config)
        assert kinds(settings.processors(PROMPT)) == []
        assert settings.new_tokens(4) == 128

    @pytest.mark.parametrize("name", sorted(NO_EFFECT))
    def test_what_has_no_effect_is_accepted(self, main, name):
        config = GenerationConfig()
        setattr(config, name, 1)
        assert Settings.read(main, config).max_new_tokens == 128

    def test_an_unknown_field_of_a_config(self, main):
        """GenerationConfig takes any name; one from a later transformers or a slip must not pass."""
        with pytest.raises(InputError, match="no setting 'stop'; did you mean stop_strings"):
            Settings.read(main, stop=["."])
        with pytest.raises(InputError, match="no setting 'temprature'; did you mean temperature"):
            Settings.read(main, GenerationConfig(temprature=0.5))


class TestValues:
    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens is 0; choose 1 or more"),
            ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
            ({"max_new_tokens": True}, "max_new_tokens is True"),
            ({"temperature": 0.0}, "temperature is 0.0; choose 1e-30 to 100, or do_sample=False"),
            ({"temperature": 1e-40}, "temperature is 1e-40; choose 1e-30 to 100"),
            ({"repetition_penalty": 1e-320}, "repetition_penalty is 1e-320; choose 1e-30 to 1e30"),
            ({"encoder_repetition_penalty": 1e300}, r"encoder_repetition_penalty is 1e\+300; choose 1e-30"),
            ({"temperature": "hot"}, "temperature is 'hot'"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"top_p": 1.1}, "top_p is 1.1; choose above 0 to 1"),
            ({"top_k": -1}, "top_k is -1; choose 0 or more"),
            ({"typical_p": 1.5, "do_sample": True}, "typical_p is 1.5"),
            ({"epsilon_cutoff": 1.0, "do_sample": True}, "epsilon_cutoff is 1.0"),
            ({"temperature": 0.7}, "temperature is 0.7, but nothing is sampled; set do_sample=True"),
            ({"top_k": 5, "do_sample": False}, "top_k is 5, but nothing is sampled"),
            ({"do_sample": 1}, "do_sample is 1; choose True or False"),
            ({"repetition_penalty": -1}, "repetition_penalty is -1; choose 1e-30 to 1e30"),
            ({"suppress_tokens": [300]}, "suppress_tokens is .*lie in 0..299"),
            ({"eos_token_id": -1}, "eos_token_id is -1; token ids"),
            ({"bad_words_ids": [[1, 2], [400]]}, "bad_words_ids is"),
            ({"bad_words_ids": 5}, "transformers refuses a setting: .*bad_words_ids"),
            ({"bad_words_ids": [[EOS]]}, "holds an EOS id"),
            ({"sequence_bias": {(3,): 1}}, "transformers refuses a setting: .*sequence_bias"),
            ({"sequence_bias": {(300,): 1.0}}, "sequence_bias is"),
            ({"forced_eos_token_id": []}, "forced_eos_token_id holds no token"),
            ({"exponential_decay_length_penalty": 3}, "transformers refuses a setting"),
            ({"suppress_tokens": [EOS], "forced_eos_token_id": EOS}, "transformers refuses a setting"),
            ({"watermarking_config": {"greenlist_ratio": 7}}, "transformers refuses a setting"),
            ({"stop_strings": [""]}, "stop_strings must be non-empty"),
            ({"stop_strings": [3]}, "stop_strings"),
            ({"max_time": 0}, "max_time is 0"),
            ({"seed": 1.5}, "seed is 1.5; give a whole number"),
            ({"seed": [1, True]}, "seed is True; give a whole number"),
            (
                {"generation_config": {"top_k": 3}},
                "generation_config must be a transformers.GenerationConfig",
            ),
            ({"logits_processor": [3]}, "logits_processor holds a int"),
            ({"stopping_criteria": [MaxLengthCriteria(9)]}, "MaxLengthCriteria; give max_new_tokens"),
            ({"stopping_criteria": [EosTokenCriteria(9)]}, "EosTokenCriteria"),
            ({"assistant_model": object()}, "assistant_model is not supported"),
            ({"attention_mask": torch.ones(1, 2)}, "attention_mask is not supported"),
            ({"repetition_penalti": 1.2}, "did you mean repetition_penalty"),
            ({"logit_processor": []}, "did you mean logits_processor"),
            ({"xyzzy": 1}, "no setting 'xyzzy'; leave it out"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_wrong_ones(self, main, keywords, message):
        with pytest.raises(InputError, match=message):
            Settings.read(main, **keywords)

    def test_a_processor_given_twice(self, main):
        own = [RepetitionPenaltyLogitsProcessor(1.5)]
        with pytest.raises(InputError, match="RepetitionPenaltyLogitsProcessor, and the settings ask"):
            Settings.read(main, repetition_penalty=1.2, logits_processor=own)
        assert Settings.read(main, logits_processor=own).processors(PROMPT)[0] is own[0]

    def test_none_is_not_given(self, main):
        config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.3)
        settings = Settings.read(main, config, max_new_tokens=None, repetition_penalty=None, seed=None)
        assert settings.max_new_tokens == 9
        assert len(settings.processors(PROMPT)) == 1


class TestSources:
    def test_keywords_override_the_config(self, main):
        config = GenerationConfig(do_sample=True, temperature=0.5, top_k=7, max_length=6, eos_token_id=9)
        settings = Settings.read(main, config, temperature=0.8, max_new_tokens=50)
        temperature, top_k = settings.processors(PROMPT)
        assert (temperature.temperature, top_k.top_k) == (0.8, 7)
        assert settings.new_tokens(4) == 50
        assert settings.eos_ids == {9}
        greedy = Settings.read(main, config, do_sample=False)  # its temperature falls with its sampling
        assert greedy.processors(PROMPT) == []
        assert config.temperature == 0.5

    def test_the_models_own_config_is_no_source(self, main):
        model_config = main.model.generation_config
        model_config.repetition_penalty = 1.7
        try:
            assert Settings.read(main).processors(PROMPT) == []
            assert len(Settings.read(main, model_config).processors(PROMPT)) == 1
        finally:
            model_config.repetition_penalty = None

    def test_eos(self, main):
        assert Settings.read(main).eos_ids == {EOS}
        assert Settings.read(main, eos_token_id=7).eos_ids == {7}
        assert Settings.read(main, eos_token_id=[7, 8]).eos_ids == {7, 8}
        assert Settings.read(main, eos_token_id=torch.tensor([7, 8])).eos_ids == {7, 8}
        assert Settings.read(main, eos_token_id=[]).eos_ids == frozenset()
        scores = torch.zeros(1, main.vocab_size)
        after = Settings.read(main, eos_token_id=[7, 8], min_new_tokens=1).processors(PROMPT)(
            torch.tensor([PROMPT]), scores
        )
        assert torch.isinf(after[0]).nonzero().flatten().tolist() == [7, 8]


class TestLengths:
    def test_new_tokens(self, main):
        assert Settings.read(main).new_tokens(1000) == 128
        assert Settings.read(main, max_length=10).new_tokens(4) == 6
        both = Settings.read(main, max_length=10, max_new_tokens=3)
        assert [both.new_tokens(length) for length in (4, 7, 9)] == [3, 3, 1]
        with pytest.raises(InputError, match="the prompt's 10 tokens reach max_length, which is 10"):
            both.new_tokens(10)

    def test_forced_eos_comes_last(self, main):
        for keywords, length in (({"max_new_tokens": 3}, 7), ({"max_length": 6}, 6)):
            processors = Settings.read(main, forced_eos_token_id=EOS, **keywords).processors(PROMPT)
            for now in range(4, length):
                scores = processors(torch.zeros(1, now, dtype=torch.long), torch.randn(1, main.vocab_size))
                assert bool(torch.isinf(scores).any()) == (now == length - 1)

    def test_criteria(self, main):
        stop = [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 3])]
        settings = Settings.read(main, stopping_criteria=StoppingCriteriaList(stop), max_time=1e6)
        criteria = settings.criteria()
        assert [type(one) for one in criteria][1:] == [MaxTimeCriteria]
        assert not criteria(torch.tensor([[1, 2]]), None).any()
        assert criteria(torch.tensor([[1, 2, 3]]), None).all()
        assert len(Settings.read(main).criteria()) == 0
        assert settings.criteria() is not settings.criteria()


def test_processors_come_in_transformers_order(main):
    mine = LogitsProcessorList([lambda ids, scores: scores])
    settings = Settings.read(
        main,
        do_sample=True,
        top_p=0.9,
        temperature=0.7,
        suppress_tokens=[3],
        repetition_penalty=1.1,
        sequence_bias={(4,): 1.0},
        renormalize_logits=True,
        logits_processor=mine,
    )
    assert kinds(settings.processors(PROMPT)) == [
        "SequenceBiasLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "function",
        "TemperatureLogitsWarper",
        "TopPLogitsWarper",
        "LogitNormalization",
    ]


def test_allowed_tokens_by_row(main):
    seen = []
    settings = Settings.read(
        main, prefix_allowed_tokens_fn=lambda row, ids: seen.append((row, ids.tolist())) or [row]
    )
    scores = settings.processors(PROMPT, text=3)(torch.tensor([PROMPT]), torch.zeros(1, main.vocab_size))
    assert seen == [(3, PROMPT)]
    assert torch.isfinite(scores[0]).nonzero().flatten().tolist() == [3]
