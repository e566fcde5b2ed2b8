"""The chooser: transformers' processors on a batch, greedy or with a seed for each row."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tiny_models import tiny_main_model
from transformers import LogitsProcessor
from transformers.generation import logits_process

from deepen_ext import InputError
from deepen_ext.decoding import sampler
from deepen_ext.decoding.draws import draw
from deepen_ext.decoding.processor_kinds import STATELESS
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.top_p import top_p

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
    {"forced_bos_token_id": 4, "encoder_no_repeat_ngram_size": 2, "min_length": 9, "max_length": 11},
    {"forced_eos_token_id": 2, "max_new_tokens": 6, "exponential_decay_length_penalty": (1, 1.5)},
]


@pytest.fixture(scope="module")
def main():
    return tiny_main_model()


def scores_of(steps: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """[steps, rows, V], with ties."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(steps, len(PROMPTS), vocab, generator=random) * 8).round() / 2


def write(chooser, scores, rows, numbers=None):
    """The tokens of these rows, each with its own ids; row r's scores are scores[:, r], its text number r."""
    ids = {row: list(PROMPTS[row]) for row in rows}
    for step in scores:
        tokens = chooser.choose(step[list(rows)], numbers or list(rows), [ids[row] for row in rows])
        for row, token in zip(rows, tokens.tolist(), strict=True):
            ids[row].append(token)
    return {row: ids[row][len(PROMPTS[row]) :] for row in rows}


class TestBatch:
    @pytest.mark.parametrize("at_once", [1, 3, 100], ids="{} rows at once".format)
    @pytest.mark.parametrize("settings", SAMPLING, ids=lambda one: "-".join(one) or "plain")
    def test_a_row_draws_what_it_draws_alone(self, main, settings, at_once, monkeypatch):
        monkeypatch.setattr(sampler, "_AT_ONCE", at_once * main.vocab_size)
        settings = Settings.read(main, do_sample=True, seed=11, **settings)
        scores = scores_of(6, main.vocab_size)
        together = write(Chooser(settings, PROMPTS, "cpu"), scores, ROWS)
        for row in ROWS:
            assert write(Chooser(settings, PROMPTS, "cpu"), scores, [row])[row] == together[row]
        assert len({tuple(one) for one in together.values()}) == len(PROMPTS)

    @pytest.mark.parametrize("settings", GREEDY, ids=lambda one: "-".join(one))
    def test_a_row_is_processed_as_alone(self, main, settings):
        settings = Settings.read(main, **settings)
        scores = scores_of(6, main.vocab_size)
        together = write(Chooser(settings, PROMPTS, "cpu"), scores, ROWS)
        for row in ROWS:
            alone = Chooser(settings, [PROMPTS[row]], "cpu")
            assert write(alone, scores, [row], [0])[row] == together[row]

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
        with pytest.raises(InputError, match="text 0: the processors forbid every token; forbid fewer"):
            Chooser(settings, PROMPTS, "cpu").choose(torch.zeros(4, main.vocab_size), ROWS, PROMPTS)

    def test_the_text_is_named_by_its_number(self, main, monkeypatch):
        monkeypatch.setattr(sampler, "_AT_ONCE", 2 * main.vocab_size)
        scores = torch.zeros(4, main.vocab_size)
        scores[3] = -math.inf
        with pytest.raises(InputError, match="text 3: the processors forbid every token"):
            Chooser(Settings.read(main, do_sample=True), PROMPTS, "cpu").choose(scores, ROWS, PROMPTS)

    def test_scores_that_overflow_and_scores_that_are_nan(self, main):
        """Each is called by what it is: neither is a token that was forbidden."""
        near_the_largest = torch.full((4, main.vocab_size), 3e38)
        overflows = Chooser(Settings.read(main, do_sample=True, temperature=0.5), PROMPTS, "cpu")
        with pytest.raises(InputError, match=r"text 0: the processors make a score infinite.*temperature"):
            overflows.choose(near_the_largest, ROWS, PROMPTS)
        spoils = Chooser(
            Settings.read(main, logits_processor=[lambda ids, scores: scores * math.nan]), PROMPTS, "cpu"
        )
        with pytest.raises(InputError, match="text 0: the processors give NaN"):
            spoils.choose(near_the_largest, ROWS, PROMPTS)


def chi_square(draws, probs):
    """How far the counts of the draws are from what is expected, in standard deviations of chi-square."""
    counts, expected = torch.bincount(draws, minlength=len(probs)), probs * len(draws)
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert expected.min() > 5
    freedom = len(expected) - 1
    return ((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)).item()


class TestDraws:
    """What a draw depends on, and how often each token is drawn."""

    def draws(self, chooser, logits, positions, text=0):
        """A token at each of these positions, from the same logits; the chooser's prompt is [5]."""
        ids = [[5] * (1 + one) for one in positions]
        return chooser.choose(logits.expand(len(ids), -1), [text] * len(ids), ids)

    def test_seeds(self, main):
        scores = scores_of(8, main.vocab_size)
        texts = [
            write(Chooser(Settings.read(main, do_sample=True, seed=seed), PROMPTS, "cpu"), scores, ROWS)
            for seed in (7, 7, 8, None, None)
        ]
        assert texts[0] == texts[1]
        assert len({tuple(one[0]) for one in texts}) == 4

    def test_a_seed_for_each_text(self, main):
        """A text's random numbers are those that it has alone, whatever its number."""
        logits = torch.zeros(1, main.vocab_size)
        several = Chooser(Settings.read(main, do_sample=True, seed=[4, 9, 4]), [[5]] * 3, "cpu")
        lists = [self.draws(several, logits, range(20), text).tolist() for text in range(3)]
        assert lists[0] == lists[2] != lists[1]
        for seed, drawn in ((4, lists[0]), (9, lists[1])):
            alone = Chooser(Settings.read(main, do_sample=True, seed=seed), [[5]], "cpu")
            assert self.draws(alone, logits, range(20)).tolist() == drawn

    def test_too_few_seeds(self, main):
        settings = Settings.read(main, do_sample=True, seed=[4, 9])
        with pytest.raises(InputError, match="2 seeds for 3 prompts; give one for each, or one for all"):
            Chooser(settings, [[5]] * 3, "cpu")

    @pytest.mark.parametrize("seed", [-(2**62), 2**62])
    def test_the_widest_seeds(self, main, seed):
        chooser = Chooser(Settings.read(main, do_sample=True, seed=seed), [[5]] * 2, "cpu")
        logits = torch.zeros(1, main.vocab_size)
        assert len({*self.draws(chooser, logits, range(20)).tolist()}) > 10

    def test_the_next_seed_and_the_next_text_have_nothing_in_common(self, main):
        logits = torch.zeros(1, main.vocab_size)
        one, other = (
            Chooser(Settings.read(main, do_sample=True, seed=seed), [[5]] * 3, "cpu") for seed in (1, 2)
        )
        lists = [self.draws(one, logits, range(50), text) for text in (0, 1, 2)]
        lists += [self.draws(other, logits, range(50), text) for text in (0, 1, 2)]
        lists.append(self.draws(one, logits, range(1, 51)))
        for i, some in enumerate(lists):
            for others in lists[:i]:
                assert (some == others).sum() < 10

    def test_the_order_and_number_of_calls_do_not_matter(self, main):
        settings = Settings.read(main, do_sample=True, seed=4, temperature=0.8)
        scores = scores_of(8, main.vocab_size)[:, 0]
        ids = [[5] * (1 + position) for position in range(8)]
        chooser = Chooser(settings, [[5]], "cpu")
        expected = [chooser.choose(scores[i : i + 1], [0], [ids[i]]).item() for i in range(8)]
        assert len(set(expected)) > 4
        other = Chooser(settings, [[5]], "cpu")
        for i in random.Random(0).choices(range(8), k=40):
            assert other.choose(scores[i : i + 1], [0], [ids[i]]).item() == expected[i]
        # New tokens are counted: a prompt's length does not matter, nor what the ids are.
        longer = Chooser(settings, [[9, 8, 7, 6]], "cpu")
        for i, own in enumerate(ids):
            assert longer.choose(scores[i : i + 1], [0], [[9, 8, 7, 6] + [3] * (len(own) - 1)]) == expected[i]

    @pytest.mark.parametrize("top_k", [0, 12])
    def test_draws_follow_the_distribution(self, main, top_k):
        """Over positions, over texts, and from each position to the next."""
        settings = Settings.read(main, do_sample=True, top_k=top_k, temperature=2.0, seed=0)
        logits = torch.full((1, main.vocab_size), -torch.inf)
        random_ids = torch.randperm(main.vocab_size, generator=torch.Generator().manual_seed(0))
        logits[0, random_ids[:60]] = torch.linspace(0, 5, 60)
        probs = torch.zeros(main.vocab_size, dtype=torch.float64)
        kept = random_ids[:60][-top_k:]
        probs[kept] = torch.softmax(logits[0, kept].double() / 2, dim=0)
        chooser = Chooser(settings, [[5]] * 4000, "cpu")
        draws = self.draws(chooser, logits, range(4000))
        assert chi_square(draws, probs) < 3
        of_texts = chooser.choose(logits.expand(4000, -1), range(4000), [[5]] * 4000)
        assert chi_square(of_texts, probs) < 3
        parts = (probs.cumsum(0) * 3.999).long()  # of neighbouring tokens, and pairs of parts
        shares = torch.bincount(parts, weights=probs)
        pairs = parts[draws[:-1]] * 4 + parts[draws[1:]]
        assert chi_square(pairs, (shares[:, None] * shares).flatten()) < 3

    @pytest.mark.parametrize("vocab_size", [1, 2, 3, 15, 16, 17, 250])
    def test_every_size_of_vocabulary(self, vocab_size):
        """Row by row: what a row draws does not depend on the others."""
        probs = torch.softmax(torch.linspace(0, 3, vocab_size, dtype=torch.float64), dim=0)
        if vocab_size > 2:
            probs[1] = 0
            probs /= probs.sum()
        generator = torch.Generator()
        draws = draw(probs.float().expand(20_000, -1), range(20_000), generator)
        if vocab_size > 1:
            assert chi_square(draws, probs) < 3
        for seed in range(20):
            assert draw(probs.float()[None], [seed], generator) == draws[seed]

    def test_similar_distributions_draw_the_same_token(self):
        """Up to the bound for two races; a running sum with one random number does much worse."""
        noise = torch.Generator().manual_seed(0)
        logits = torch.randn(3000, generator=noise, dtype=torch.float64) * 3
        p, q = torch.softmax(torch.stack([logits, logits + logits.new_empty(3000).normal_(0, 0.1)]), dim=1)
        distance = ((p - q).abs().sum() / 2).item()
        assert 0.02 < distance < 0.1
        generator = torch.Generator()
        draws = [draw(one.float().expand(4000, -1), range(4000), generator) for one in (p, q)]
        differ = (draws[0] != draws[1]).double().mean().item()
        assert 0.01 < differ < 2 * distance / (1 + distance)
        share = torch.rand(4000, generator=noise, dtype=torch.float64)
        sums = [torch.searchsorted(one.cumsum(0), share) for one in (p, q)]
        assert (sums[0] != sums[1]).double().mean() > 2 * differ

    def test_random_numbers_that_are_zero(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **_: self.zero_())
        probs = torch.tensor(
            [[0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.0, 0.6], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]]
        )
        assert draw(probs, [1, 2], torch.Generator()).tolist() == [7, 6]

    def test_nan_gives_some_token(self):
        probs = torch.full((2, 250), torch.nan)
        probs[1, 1:] = 0
        assert draw(probs, [1, 2], torch.Generator()).max() < 250


class TestPlaces:
    """Rows of one text at several positions: a draft's places."""

    @pytest.mark.parametrize("settings", [*SAMPLING, *GREEDY], ids=lambda one: "-".join(one) or "plain")
    def test_one_call_gives_what_one_call_each_gives(self, main, settings):
        settings = Settings.read(main, do_sample=settings in SAMPLING, seed=5, **settings)
        scores = scores_of(6, main.vocab_size)
        written = write(Chooser(settings, PROMPTS, "cpu"), scores, ROWS)
        places = [(row, place) for row in ROWS for place in range(6)]
        random.Random(1).shuffle(places)
        ids = [[*PROMPTS[row], *written[row][:place]] for row, place in places]
        rows, steps = zip(*places, strict=True)
        tokens = Chooser(settings, PROMPTS, "cpu").choose(scores[list(steps), list(rows)], rows, ids)
        assert tokens.tolist() == [written[row][place] for row, place in places]

    def test_going_back(self, main):
        """After a dropped draft the ids are those that are given, and no other."""
        settings = Settings.read(main, repetition_penalty=1.5, no_repeat_ngram_size=2)
        scores = scores_of(1, main.vocab_size)[0][:1]
        chooser, rng = Chooser(settings, PROMPTS, "cpu"), random.Random(2)
        ids, seen = list(PROMPTS[0]), set()
        for _ in range(60):
            kept = rng.randint(len(PROMPTS[0]), len(ids))
            ids = ids[:kept] + [rng.randrange(12) for _ in range(rng.randrange(4))]
            fresh = Chooser(settings, PROMPTS, "cpu").processed(scores, [0], [ids])
            assert torch.equal(chooser.processed(scores, [0], [ids]), fresh)
            seen.add(tuple(fresh.flatten().tolist()))
        assert len(seen) > 20

    def test_ids_that_were_given_out_stay(self, main):
        """Also where rows of one call disagree, and where a processor keeps the tensor."""
        given = []

        class Keeps(LogitsProcessor):
            def __call__(self, input_ids, scores):
                given.append(input_ids)
                return scores

        chooser = Chooser(Settings.read(main, logits_processor=[Keeps()]), [[5]], "cpu")
        ids = [[5, 1, 2, 3], [5, 1], [5, 1, 4, 6, 7], [5], [5, 1, 2], [5, 1, 4], [5] * 40, [5, 2]]
        chooser.processed(torch.zeros(4, main.vocab_size), [0] * 4, ids[:4])
        for one in ids[4:]:
            chooser.processed(torch.zeros(1, main.vocab_size), [0], [one])
        assert [one.tolist() for one in given] == [[one] for one in ids]


class Counts(LogitsProcessor):
    """Forbids another token at every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        scores[:, self.calls] = -torch.inf
        self.calls += 1
        return scores


class WarmerTemperature(logits_process.TemperatureLogitsWarper):
    """A class of the caller's, whatever it is derived from."""


class TestState:
    @pytest.mark.parametrize("settings", [*SAMPLING, *GREEDY], ids=lambda one: "-".join(one) or "plain")
    def test_of_settings(self, main, settings):
        chooser = Chooser(Settings.read(main, do_sample=settings in SAMPLING, **settings), PROMPTS, "cpu")
        assert chooser.keeps_state == ("watermarking_config" in settings)

    def test_every_class_is_tried(self, main):
        """By `TestPlaces`: it would show a class that keeps a state."""
        made = {logits_process.InfNanRemoveLogitsProcessor}  # no setting asks for it
        for settings in (*SAMPLING, *GREEDY):
            read = Settings.read(main, do_sample=settings in SAMPLING, **settings)
            made |= {type(one) for one in read.processors([5, 6])}
        assert made >= STATELESS

    @pytest.mark.parametrize(
        "settings",
        [
            {"logits_processor": [Counts()]},
            {"logits_processor": [WarmerTemperature(1.5)]},
            {"logits_processor": [lambda ids, scores: scores], "repetition_penalty": 1.1},
            {"prefix_allowed_tokens_fn": lambda text, ids: [1, 2, 3]},
        ],
    )
    def test_what_the_caller_gives_may_keep_one(self, main, settings):
        assert Chooser(Settings.read(main, **settings), PROMPTS, "cpu").keeps_state
        known = [logits_process.RepetitionPenaltyLogitsProcessor(1.2)]
        assert not Chooser(Settings.read(main, logits_processor=known), PROMPTS, "cpu").keeps_state


class TestProposals:
    @pytest.mark.parametrize("settings", [*SAMPLING[:-1], *GREEDY], ids=lambda one: "-".join(one) or "plain")
    def test_a_guess_is_what_would_be_chosen(self, main, settings):
        settings = Settings.read(main, do_sample=settings in SAMPLING, seed=5, **settings)
        scores = scores_of(4, main.vocab_size)
        written = write(Chooser(settings, PROMPTS, "cpu"), scores, ROWS)
        chooser = Chooser(settings, PROMPTS, "cpu")
        for step in range(4):
            ids = [[*PROMPTS[row], *written[row][:step]] for row in ROWS]
            expected = [written[row][step] for row in ROWS]
            for _ in range(2):
                assert chooser.propose(scores[step], ROWS, ids).tolist() == expected

    @pytest.mark.parametrize("do_sample", [False, True])
    def test_what_keeps_a_state_is_left_out(self, main, do_sample):
        counts = Counts()
        given = {"do_sample": do_sample, "seed": 2, "repetition_penalty": 1.4}
        without = Chooser(Settings.read(main, **given), PROMPTS, "cpu")
        chooser = Chooser(Settings.read(main, logits_processor=[counts], **given), PROMPTS, "cpu")
        scores = scores_of(1, main.vocab_size)[0]
        scores[:, 0] = 30
        guesses = chooser.propose(scores, ROWS, PROMPTS)
        assert counts.calls == 0
        assert torch.equal(guesses, without.choose(scores, ROWS, PROMPTS))
        assert guesses.tolist() == [0] * 4
        assert chooser.choose(scores, ROWS, PROMPTS)[0] != 0
        assert counts.calls == 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_greedy_takes_the_known_argmax(self, main, dtype):
        scores = scores_of(1, main.vocab_size)[0].to(dtype)
        counts = Counts()
        for more in ({}, {"logits_processor": [counts]}):
            chooser = Chooser(Settings.read(main, **more), PROMPTS, "cpu")
            known = torch.arange(4, dtype=torch.int32)
            assert chooser.propose(scores, ROWS, PROMPTS, known).tolist() == [0, 1, 2, 3]
            assert chooser.propose(scores, ROWS, PROMPTS).tolist() == scores.argmax(dim=1).tolist()
        assert counts.calls == 0

    @pytest.mark.parametrize("do_sample", [False, True])
    def test_every_token_forbidden(self, main, do_sample):
        settings = Settings.read(main, do_sample=do_sample, suppress_tokens=list(range(main.vocab_size)))
        chooser = Chooser(settings, PROMPTS, "cpu")
        guesses = chooser.propose(torch.zeros(4, main.vocab_size), ROWS, PROMPTS)
        assert guesses.dtype == torch.int64
        assert ((guesses >= 0) & (guesses < main.vocab_size)).all()
        nan = chooser.propose(torch.full((4, main.vocab_size), torch.nan), ROWS, PROMPTS)
        assert ((nan >= 0) & (nan < main.vocab_size)).all()


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


class TestTopP:
    @pytest.mark.parametrize("p", [0.05, 0.5, 0.95, 0.9999])
    @pytest.mark.parametrize("least", [1, 3])
    def test_it_is_transformers_own(self, p: float, least: int) -> None:
        """Sharp rows, flat ones (of which the first tokens are not enough), forbidden tokens, few tokens."""
        generator = torch.Generator().manual_seed(3)
        scale = torch.tensor([0.1, 0.5, 2.0, 4.0, 8.0, 16.0, 3.0, 1e-3])[:, None]
        scores = torch.randn(8, 5000, generator=generator) * scale
        scores[6, 40:] = -torch.inf
        warper = logits_process.TopPLogitsWarper(p, min_tokens_to_keep=least)
        expected, before = warper(None, scores), scores.clone()
        kept = expected.isfinite().sum(dim=1)
        assert kept.min() <= 3
        assert kept.max() > 200
        assert torch.equal(top_p(warper, scores), expected)
        assert torch.equal(scores, before)
        for row in range(8):
            assert torch.equal(top_p(warper, scores[row : row + 1])[0], expected[row])
        assert torch.equal(top_p(warper, scores[:, :100]), warper(None, scores[:, :100]))

    def test_equal_scores_and_nan(self) -> None:
        """Of tokens of equal scores the same stay, in rows where these are many; NaN is left for `choose`."""
        warper = logits_process.TopPLogitsWarper(0.9)
        scores = (torch.randn(6, 2000, generator=torch.Generator().manual_seed(1)) * 6).round()
        assert torch.equal(top_p(warper, scores), warper(None, scores))
        scores[2, 7] = torch.nan
        scores[3] = -torch.inf
        finite = top_p(warper, scores).amax(dim=1).isfinite()
        assert finite.tolist() == [True, True, False, False, True, True]

    def test_the_warper_is_rarely_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Or nothing would be gained: of logits as models have them, one row in a hundred at most."""
        warper = logits_process.TopPLogitsWarper(0.95)
        scores = torch.randn(300, 5000, generator=torch.Generator().manual_seed(5)) * 4
        asked = []
        own = type(warper).__call__
        monkeypatch.setattr(
            type(warper), "__call__", lambda self, ids, rows: (asked.extend(rows), own(self, ids, rows))[1]
        )
        found = top_p(warper, scores)
        assert len(asked) <= 3
        assert torch.equal(found, own(warper, None, scores))
