"""The chooser: transformers' processors on a batch, greedy or with a seed for each row."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_main_model
from transformers import LogitsProcessor

from deepen_ext import InputError
from deepen_ext.decoding.sampler import Chooser, _draw_noise, _draw_one_number
from deepen_ext.decoding.settings import Settings

PROMPTS = [[5, 6, 7, 5, 6], [8, 9], [10], [5, 6, 5, 6, 5]]
ROWS = range(len(PROMPTS))
SAMPLING = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 20, "min_p": 0.02, "typical_p": 0.95},
    {"top_h": 0.6, "eta_cutoff": 1e-3, "epsilon_cutoff": 1e-4, "renormalize_logits": True},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "top_p": 0.8},
    {"watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"}},
]
GREEDY = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "suppress_tokens": [3, 4]},
    {"encoder_repetition_penalty": 2.0, "begin_suppress_tokens": [7]},
    {"sequence_bias": {(5, 6): -2.0, (9,): 1.5}, "bad_words_ids": [[6, 5]], "renormalize_logits": True},
]


@pytest.fixture(scope="module")
def main():
    return tiny_main_model()


def scores_of(steps: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """[steps, rows, V], with ties."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(steps, len(PROMPTS), vocab, generator=random) * 8).round() / 2


def write(chooser, scores, rows):
    """The tokens of these rows, each with its own ids; row r's scores are scores[:, r]."""
    ids = {row: list(PROMPTS[row]) for row in rows}
    own = range(len(rows)) if len(rows) < len(PROMPTS) else rows  # a chooser of one row calls it 0
    for step in scores:
        tokens = chooser.choose(step[list(rows)], list(own), [ids[row] for row in rows])
        for row, token in zip(rows, tokens.tolist(), strict=True):
            ids[row].append(token)
    return {row: ids[row][len(PROMPTS[row]) :] for row in rows}


class TestBatch:
    @pytest.mark.parametrize("settings", SAMPLING, ids=lambda one: "-".join(one) or "plain")
    def test_a_row_draws_what_it_draws_alone(self, main, settings):
        scores = scores_of(6, main.vocab_size)
        together = write(
            Chooser(Settings.read(main, do_sample=True, seed=11, **settings), PROMPTS, "cpu"), scores, ROWS
        )
        for row in ROWS:
            alone = Settings.read(main, do_sample=True, seed=11 + row, **settings)
            assert write(Chooser(alone, [PROMPTS[row]], "cpu"), scores, [row])[row] == together[row]
        assert len({tuple(one) for one in together.values()}) == len(PROMPTS)

    @pytest.mark.parametrize("settings", GREEDY, ids=lambda one: "-".join(one))
    def test_a_row_is_processed_as_alone(self, main, settings):
        settings = Settings.read(main, **settings)
        scores = scores_of(6, main.vocab_size)
        together = write(Chooser(settings, PROMPTS, "cpu"), scores, ROWS)
        for row in ROWS:
            assert write(Chooser(settings, [PROMPTS[row]], "cpu"), scores, [row])[row] == together[row]

    def test_rows_that_finish_early_leave_the_others_alone(self, main):
        settings = Settings.read(main, do_sample=True, seed=3, repetition_penalty=1.2)
        scores = scores_of(5, main.vocab_size)
        whole = write(Chooser(settings, PROMPTS, "cpu"), scores, ROWS)
        chooser = Chooser(settings, PROMPTS, "cpu")
        ids = [list(prompt) for prompt in PROMPTS]
        for step, rows in zip(scores, [[0, 1, 2, 3], [0, 1, 3], [0, 3], [3, 0], [3]], strict=True):
            for row, token in zip(
                rows, chooser.choose(step[rows], rows, [ids[row] for row in rows]).tolist(), strict=True
            ):
                ids[row].append(token)
        for row, count in ((0, 4), (1, 2), (2, 1), (3, 5)):
            assert ids[row][len(PROMPTS[row]) :] == whole[row][:count]


class TestChoice:
    @pytest.mark.parametrize("settings", [*SAMPLING[1:], *GREEDY], ids=lambda one: "-".join(one))
    def test_scores_are_what_transformers_makes(self, main, settings):
        sampling = settings in SAMPLING
        settings = Settings.read(main, do_sample=sampling, **settings)
        scores = scores_of(1, main.vocab_size)[0]
        found = Chooser(settings, PROMPTS, "cpu").processed(scores, ROWS, PROMPTS)
        for row in ROWS:
            config = settings._config
            config._eos_token_tensor = torch.tensor(sorted(settings.eos_ids))
            length = len(PROMPTS[row])
            config.max_length = length + settings.max_new_tokens
            processors = main.model._get_logits_processor(
                config, length, torch.tensor([PROMPTS[row]]), device="cpu"
            )
            expected = processors(torch.tensor([PROMPTS[row]]), scores[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=0)

    def test_draws_follow_the_distribution(self, main):
        """What the warpers keep is drawn as often as it is probable."""
        settings = Settings.read(main, do_sample=True, top_k=4, temperature=2.0, seed=0)
        logits = torch.full((1, main.vocab_size), -3.0)
        logits[0, [1, 2, 3, 4]] = torch.tensor([4.0, 3.0, 2.0, 0.0])
        chooser = Chooser(settings, [[5]], "cpu")
        draws = torch.cat([chooser.choose(logits, [0], [[5]]) for _ in range(4000)])
        share = torch.bincount(draws, minlength=main.vocab_size) / len(draws)
        expected = torch.zeros(main.vocab_size)
        expected[[1, 2, 3, 4]] = torch.softmax(torch.tensor([4.0, 3.0, 2.0, 0.0]) / 2, dim=0)
        assert (share - expected).abs().max() < 0.03
        assert share[expected == 0].sum() == 0

    def test_both_ways_of_drawing(self):
        """The one for CUDA too: shares like the probabilities, nothing without any, row by row."""
        probs = torch.tensor([[0.0, 0.6, 0.0, 0.1, 0.3, 0.0], [0.25, 0.0, 0.75, 0.0, 0.0, 0.0]])
        for draw in (_draw_one_number, _draw_noise):
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            draws = torch.stack([draw(probs.clone(), generators) for _ in range(4000)])
            again = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            alone = torch.cat([draw(probs[1:].clone(), again[1:]) for _ in range(4000)])
            assert torch.equal(draws[:, 1], alone)
            for row, expected in enumerate(probs):
                share = torch.bincount(draws[:, row], minlength=6) / len(draws)
                assert (share - expected).abs().max() < 0.03
                assert share[expected == 0].sum() == 0

    def test_the_ends_of_the_running_sum(self, monkeypatch):
        probs = torch.tensor([[0.0, 0.0, 0.4, 0.6, 0.0]])
        for number, token in ((0.0, 2), (1 - 2**-53, 3)):
            fixed = torch.full((1, 1), number, dtype=torch.float64)
            monkeypatch.setattr(torch, "rand", lambda *_, fixed=fixed, **__: fixed)
            assert _draw_one_number(probs, [torch.Generator()]).tolist() == [token]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_greedy_takes_the_known_argmax(self, main, dtype):
        scores = scores_of(1, main.vocab_size)[0].to(dtype)
        chooser = Chooser(Settings.read(main), PROMPTS, "cpu")
        known = torch.arange(len(PROMPTS), dtype=torch.int32)
        assert chooser.choose(scores, ROWS, PROMPTS, known).tolist() == [0, 1, 2, 3]
        assert chooser.choose(scores, ROWS, PROMPTS).tolist() == [
            min(torch.nonzero(row == row.max()).flatten().tolist()) for row in scores
        ]
        penalty = Chooser(Settings.read(main, suppress_tokens=[0, 1, 2, 3]), PROMPTS, "cpu")
        assert not set(penalty.choose(scores, ROWS, PROMPTS, known).tolist()) & {0, 1, 2, 3}

    def test_seeds(self, main):
        scores = scores_of(8, main.vocab_size)
        texts = [
            write(Chooser(Settings.read(main, do_sample=True, seed=seed), PROMPTS, "cpu"), scores, ROWS)[0]
            for seed in (7, 7, 8, None, None)
        ]
        assert texts[0] == texts[1]
        assert len({tuple(one) for one in texts}) == 4

    def test_the_callers_own_processor(self, main):
        """Called row by row with the row's ids; what it writes in place reaches nobody else's tensor."""
        seen = []

        class Mine(LogitsProcessor):
            def __call__(self, input_ids, scores):
                seen.append(input_ids.tolist())
                scores[:, 17] = 100.0
                return scores

        scores = scores_of(1, main.vocab_size)[0]
        before = scores.clone()
        chooser = Chooser(Settings.read(main, logits_processor=[Mine()]), PROMPTS, "cpu")
        assert chooser.choose(scores, ROWS, PROMPTS).tolist() == [17] * 4
        assert seen == [[prompt] for prompt in PROMPTS]
        assert torch.equal(scores, before)

    @pytest.mark.parametrize("do_sample", [False, True])
    def test_every_token_forbidden(self, main, do_sample):
        settings = Settings.read(main, do_sample=do_sample, suppress_tokens=list(range(main.vocab_size)))
        with pytest.raises(InputError, match="text 0: the processors forbid every token, or give NaN"):
            Chooser(settings, PROMPTS, "cpu").choose(torch.zeros(4, main.vocab_size), ROWS, PROMPTS)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "max_new_tokens": 16},
        {"max_length": 20, "forced_eos_token_id": 2, "sequence_bias": {(5,): -3.0}, "suppress_tokens": [28]},
    ],
    ids=lambda one: "-".join(one),
)
def test_greedy_as_transformers_generates(tiny_smollm2, settings):
    """One real model alone: prompt lengths, EOS ids and ends mean the same as in its own generate()."""
    ids = tiny_smollm2.vocabulary.prefix_ids + tiny_smollm2.vocabulary.encode("The history of tea begins in")
    prompt = torch.tensor([ids])
    expected = tiny_smollm2.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=2, **settings
    )
    read = Settings.read(tiny_smollm2, **settings)
    chooser, now = Chooser(read, [ids], "cpu"), list(ids)
    for _ in range(read.new_tokens(len(ids))):
        with torch.inference_mode():
            logits = tiny_smollm2.model(torch.tensor([now])).logits[:, -1]
        now += chooser.choose(logits, [0], [now]).tolist()
        if now[-1] in read.eos_ids:
            break
    assert now == expected[0].tolist()
