"""Certified skip: what is settled never changes, whatever the assistants say; and the bound is tight."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_main_model

from deepen_ext import ops
from deepen_ext.decoding.certificate import Certificate
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.skips import REASONS, Skips
from deepen_ext.fusers.search_bound import SearchBound, movement

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCAB = 300  # where no model is needed


@pytest.fixture(scope="module")
def tiny_main():
    return tiny_main_model()


def identity_rows(vocab: int) -> ops.RelativeRows:
    """Every token is its own anchor: an assistant can ask for any token it likes."""
    columns = torch.arange(vocab, dtype=torch.int32)[:, None].contiguous()
    return ops.RelativeRows(columns, torch.ones(vocab, 1), torch.zeros(vocab), vocab)


def against(logits, wanted, *, learning_rate, steps, share=1.0, min_probability=0.0, log_probs=True):
    """The fused logits where one assistant, with this share of the weight, gives `wanted` [B] all it has."""
    rows = identity_rows(logits.shape[1])
    batch = len(logits)
    assistant = torch.full((batch, 2), 1e-6)
    assistant[:, 0] = 1 - 1e-6
    ids = torch.stack([wanted, (wanted + 1) % logits.shape[1]], dim=1).int()
    status = torch.zeros(batch, dtype=torch.int32)
    topk = ops.TopK(ids, assistant, torch.zeros(batch), status)
    main = ops.topk_softmax(logits, min(128, logits.shape[1]))
    fused = logits.clone()
    weights = torch.tensor([[1 - share, share]]).repeat(batch, 1)
    members = [ops.FuseInput(main, rows), ops.FuseInput(topk, rows)]
    _, chosen = ops.fuse(
        fused,
        members,
        weights,
        learning_rate=learning_rate,
        steps=steps,
        min_probability=min_probability,
        log_probs=log_probs,
    )
    assert torch.equal(chosen.long(), fused.argmax(dim=-1))
    return fused


class Settled:
    """What a Certificate asks of a Chooser, for greedy decoding without processors."""

    def samples(self, row):
        return False

    def processors(self, row):
        return []


def plain(learning_rate, steps, log_probs=True) -> Certificate:
    return Certificate(SearchBound.of(learning_rate, steps, log_probs=log_probs), Settled())


def settled(certificate, logits, **keywords):
    return certificate.settled(logits, range(len(logits)), [[]] * len(logits), **keywords)


def near_the_bound(
    rows, learning_rate, steps, dtype, seed, *, spread=0.05, vocab=VOCAB, log_probs=True, height=0.0
):
    """Logits of any height whose two largest differ by about what the search can move."""
    random = torch.Generator().manual_seed(seed)
    decay, reach = movement(learning_rate, steps)
    top = height + torch.rand(rows, generator=random) * 100 - 50
    needed = torch.full((rows,), 2 * reach / decay)
    if not log_probs:
        needed = needed.maximum((1 - decay) * top + reach)
    gap = needed * (1 + spread * torch.randn(rows, generator=random)).clamp(min=0.01)
    low = 12 + 10 * torch.rand(rows, 1, generator=random)
    logits = top[:, None] - gap[:, None] - low - torch.rand(rows, vocab, generator=random) * 4
    order = torch.rand(rows, vocab, generator=random).argsort(dim=1)[:, :2]  # either may have the lower id
    logits.scatter_(1, order, torch.stack([top, top - gap], dim=1))
    return logits.to(dtype), order


class TestMovement:
    @pytest.mark.parametrize("learning_rate", [0.05, 0.15, 1.0])
    @pytest.mark.parametrize("steps", [1, 5, 10])
    def test_it_is_what_adamw_can_do(self, learning_rate, steps):
        """Growing gradients reach it; no random ones exceed it."""
        decay, reach = movement(learning_rate, steps)
        start = 20.0
        logits = torch.full((1001,), start, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.AdamW([logits], lr=learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 10, eta_min=learning_rate / 4)
        random = torch.Generator().manual_seed(steps)
        for step in range(steps):
            gradient = torch.randn(1001, generator=random, dtype=torch.float64).exp()
            gradient[::2] *= torch.randn(501, generator=random, dtype=torch.float64).sign()
            gradient[0] = (0.999 / 0.9) ** step
            logits.grad = gradient
            optimiser.step()
            schedule.step()
        moved = (logits.detach() - decay * start).abs()
        assert moved.max() <= reach * (1 + 1e-6)
        assert moved[0] >= reach * (1 - 1e-6)

    def test_more_steps_than_the_schedule_has(self):
        """Past its period the cosine rises again, and c_t with the steps."""
        (_, ten), (_, twenty), (decay, most) = (movement(0.15, steps) for steps in (10, 20, 64))
        assert twenty - ten > 0.95 * ten
        assert most > 4 * twenty
        assert decay == pytest.approx(1 - 0.01 * 0.15 * 64 * 0.625, abs=0.005)


class TestSoundness:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("steps", [1, 3, 5, 10, 25, 64])
    @pytest.mark.parametrize("log_probs", [True, False])
    def test_no_assistant_changes_a_settled_token(self, dtype, steps, log_probs):
        flips = kept = 0
        for seed, learning_rate in enumerate([0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 3.0]):
            logits, order = near_the_bound(128, learning_rate, steps, dtype, seed, log_probs=log_probs)
            certificate = plain(learning_rate, steps, log_probs=log_probs)
            main_choice = logits.argmax(dim=-1)
            sure = settled(certificate, logits)
            for k in (20, 1):  # one alone does not say how far the second is
                assert torch.equal(sure, settled(certificate, logits, top=ops.topk_softmax(logits, k)))
            for share, min_probability in ((1.0, 0.0), (0.9, 0.0), (1.0, 0.2)):
                fused = against(
                    logits,
                    order[:, 1],
                    learning_rate=learning_rate,
                    steps=steps,
                    share=share,
                    min_probability=min_probability,
                    log_probs=log_probs,
                )
                changed = fused.argmax(dim=-1) != main_choice
                assert not (changed & sure).any()
                flips += int(changed.sum())
            kept += int(sure.sum())
        assert kept > 100  # the test is about something
        if steps <= 5:
            assert flips > 20

    @pytest.mark.parametrize("height", [-1000.0, 100.0, 1000.0])
    def test_a_constant_leaves_what_is_settled(self, height):
        """Also where the logits are so large that their rounding counts."""
        flips = 0
        for seed, steps in enumerate((1, 5, 10)):
            logits, order = near_the_bound(256, 0.15, steps, torch.float32, seed, height=height)
            certificate = plain(0.15, steps)
            sure, main_choice = settled(certificate, logits), logits.argmax(dim=-1)
            changed = against(logits, order[:, 1], learning_rate=0.15, steps=steps).argmax(-1) != main_choice
            assert not (changed & sure).any()
            flips += int(changed.sum())
            there = settled(certificate, logits - height)  # nearly the same logits
            assert sure.sum() > 50
            assert (there != sure).float().mean() < 0.05
        assert flips > 20

    @pytest.mark.parametrize("steps", [2, 5, 10])
    def test_random_targets_and_diffuse_rows(self, steps):
        """Rows that share anchors, dense targets: the search itself, without fuse."""
        random = torch.Generator().manual_seed(steps)
        for learning_rate in (0.1, 0.4, 1.0):
            logits, _ = near_the_bound(
                64, learning_rate, steps, torch.float32, steps, vocab=40, log_probs=False
            )
            values = torch.softmax(6 * torch.randn(40, 60, generator=random), dim=-1)
            target = torch.softmax(8 * torch.randn(64, 60, generator=random), dim=-1)
            ids = torch.arange(40, dtype=torch.int32).repeat(64, 1)
            found = ops.inverse_search(
                logits,
                ids,
                torch.full((64,), -torch.inf),
                target,
                ops.RelativeRows(None, values, None, 60),
                learning_rate=learning_rate,
                steps=steps,
            )
            sure = settled(plain(learning_rate, steps, log_probs=False), logits)
            assert sure.sum() > 10
            assert torch.equal(found.argmax(dim=-1)[sure], logits.argmax(dim=-1)[sure])

    def test_a_runner_up_that_is_no_candidate_waits_while_the_first_decays(self):
        """One candidate with a large logit: what it may lose counts, and so does its decay."""
        decay, reach = movement(0.15, 5)
        certificate = plain(0.15, 5, log_probs=False)
        logits = torch.full((1, VOCAB), 60.0)
        logits[0, 7] = 300.0
        lowest = 300 * decay - reach
        logits[0, 9] = lowest + 0.1
        assert decay * (300 - float(logits[0, 9])) > 2 * reach  # one condition holds, the other does not
        assert not settled(certificate, logits)
        assert settled(plain(0.15, 5), logits)  # a log-probability near 0 does not decay
        logits[0, 9] = lowest - 0.1
        assert settled(certificate, logits)


class TestLimits:
    @pytest.mark.parametrize("log_probs", [True, False])
    def test_rounding_makes_them_no_narrower(self, log_probs):
        """Beside the same in float64, of logits that a step of float32 moves as far as some searches do."""
        random = torch.Generator().manual_seed(2)
        logits = torch.rand(200, VOCAB, generator=random) * 4000 - 2000
        first, probability = logits.amax(dim=1, keepdim=True), torch.rand(200, 1, generator=random)
        lower, upper = SearchBound.of(0.15, 5, log_probs=log_probs).limits(logits, first, probability)
        decay, reach = movement(0.15, 5)
        z, c = logits.double(), first.double() - probability.double().log() if log_probs else 0.0
        more = 5e-5 * reach  # half of what is added for the moments
        lowest = (decay * (z - c) - reach - more + c).minimum(z)  # a token that is no candidate stays
        highest = (decay * (z - c) + reach + more + c).maximum(z)
        assert (lowest == z).any()
        assert (highest == z).any() == (not log_probs)  # log-probabilities decay upwards
        assert (lower <= lowest).all()
        assert (upper >= highest).all()
        assert (lowest - lower).max() < 0.01
        assert (upper - highest).max() < 0.01


class TestTightness:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("learning_rate", "steps"), [(0.1, 5), (0.15, 5), (0.25, 5), (0.5, 3)])
    @pytest.mark.parametrize("log_probs", [True, False])
    def test_just_under_the_bound_tokens_do_change(self, learning_rate, steps, dtype, log_probs):
        decay, reach = movement(learning_rate, steps)
        logits = torch.full((2, VOCAB), -20.0)
        logits[:, 3] = 2.0
        logits[0, 5] = 2.0 - 0.9 * 2 * reach / decay
        logits[1, 5] = 2.0 - 1.03 * 2 * reach / decay
        logits = logits.to(dtype)
        search = {"learning_rate": learning_rate, "steps": steps, "log_probs": log_probs}
        fused = against(logits, torch.tensor([5, 5]), **search)
        assert fused.argmax(dim=-1).tolist() == [5, 3]
        assert settled(plain(**search), logits).tolist() == [False, True]


class TestEdges:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rows_without_a_gap_are_not_settled(self, dtype):
        logits = torch.zeros(6, VOCAB)
        logits[1, 4] = torch.nan
        logits[2] = -torch.inf
        logits[3, 4] = torch.inf
        logits[4, 4] = 30.0
        logits[5] = -torch.inf
        logits[5, 4] = 1.0  # the only token there is
        assert settled(plain(0.15, 5), logits.to(dtype)).tolist() == [False, False, False, False, True, True]

    def test_ties_after_rounding_are_not_settled(self):
        """bfloat16 has no value between 64 and 64.5, nor up to 65: both bounds round to the same one."""
        logits = torch.zeros(1, VOCAB, dtype=torch.bfloat16)
        logits[0, 9], logits[0, 4] = 65.0, 64.0
        assert not settled(plain(0.2, 2), logits)
        assert settled(plain(0.2, 2), logits.float())
        logits[0, 9] = 64.5
        assert not settled(plain(0.091, 2, log_probs=False), logits)
        assert settled(plain(0.091, 2, log_probs=False), logits.float())


def chooser_of(member, rows, **settings) -> Chooser:
    return Chooser(Settings.read(member, **settings), [PROMPT] * rows, "cpu")


PROMPT = [10, 11, 12, 10, 11]

ORDERLY = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "repetition_reward": {"repetition_penalty": 0.7},
    "prompt_penalty": {"encoder_repetition_penalty": 1.3},
    "suppress": {"suppress_tokens": [12, 40]},
    "suppress_first": {"begin_suppress_tokens": [10]},
    "bias": {"sequence_bias": {(11, 12): 3.5, (40,): -2.0}},
    "bad_words": {"bad_words_ids": [[11, 12]]},
    "ngrams": {"no_repeat_ngram_size": 2},
    "prompt_ngrams": {"encoder_no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 4},
    "min_length": {"min_length": 9},
    "forced_eos": {"forced_eos_token_id": 10, "max_new_tokens": 1},
    "several": {"repetition_penalty": 1.2, "suppress_tokens": [12], "no_repeat_ngram_size": 3},
}


class TestProcessors:
    @pytest.mark.parametrize("name", ORDERLY)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("log_probs", [True, False])
    def test_no_assistant_changes_a_settled_token(self, tiny_main, name, dtype, log_probs):
        """Tokens that the processors reach lie near the bound; the assistant asks for each in turn."""
        learning_rate, steps = 0.15, 5
        count = 64
        rows, ids = range(count), [PROMPT] * count
        chooser = chooser_of(tiny_main, count, **ORDERLY[name])
        random = torch.Generator().manual_seed(1)
        tokens = torch.tensor([2, 10, 11, 12, 40, 50])  # EOS, the prompt's, biased ones, and one of no list
        logits = torch.full((count, tiny_main.vocab_size), -20.0)
        height = torch.rand(count, 1, generator=random) * 12 - 6
        logits[:, tokens] = height + torch.rand(count, len(tokens), generator=random) * 8
        logits = logits.to(dtype)
        own = chooser.processed(logits, rows, ids).argmax(dim=-1)
        certificate = Certificate(SearchBound.of(learning_rate, steps, log_probs=log_probs), chooser)
        sure = certificate.settled(logits, rows, ids)
        if name != "forced_eos":
            assert 0 < sure.sum() < count
        if name in ("repetition_penalty", "suppress", "bias"):
            assert (own != logits.argmax(dim=-1))[sure].any()
        changes = 0
        for wanted in tokens:
            wants = wanted.repeat(count)
            fused = against(logits, wants, learning_rate=learning_rate, steps=steps, log_probs=log_probs)
            after = chooser.processed(fused, rows, ids).argmax(dim=-1)
            assert torch.equal(after[sure], own[sure])
            changes += int((after != own).sum())
        assert changes > 0 or name == "forced_eos"

    @pytest.mark.parametrize(
        "settings",
        [
            {"do_sample": True},
            {"renormalize_logits": True},
            {"exponential_decay_length_penalty": (1, 1.5)},
            {"watermarking_config": {"bias": 2.0}},
            {"prefix_allowed_tokens_fn": lambda row, ids: [1, 2, 3]},
            {"logits_processor": [lambda ids, scores: scores]},
            {"suppress_tokens": [12], "logits_processor": [lambda ids, scores: scores]},
        ],
        ids="+".join,
    )
    def test_off_where_it_cannot_be_proved(self, tiny_main, settings):
        logits = torch.zeros(1, tiny_main.vocab_size)
        logits[0, 5] = 1000.0
        assert settled(plain(0.1, 5), logits)
        chooser = chooser_of(tiny_main, 1, **settings)
        assert not Certificate(SearchBound.of(0.1, 5, log_probs=True), chooser).settled(logits, [0], [PROMPT])

    @pytest.mark.parametrize("log_probs", [True, False])
    def test_a_penalty_of_the_first_choice(self, tiny_main, log_probs):
        """The bounds are those of the logits as they are; then they are processed."""
        chooser = chooser_of(tiny_main, 2, repetition_penalty=1.4)
        bound = SearchBound.of(0.15, 5, log_probs=log_probs)
        decay, reach = movement(0.15, 5)
        c = 30.0 if log_probs else 0.0
        lowest = (decay * (30 - c) - reach + c) / 1.4
        logits = torch.full((2, tiny_main.vocab_size), -20.0)
        logits[:, 11] = 30.0  # of the prompt
        for row, gap in enumerate((-0.002, 0.002)):
            logits[row, 50] = (lowest - gap - reach - c) / decay + c
        assert settled(plain(0.15, 5, log_probs), logits).all()
        sure = Certificate(bound, chooser).settled(logits, [0, 1], [PROMPT] * 2)
        assert sure.tolist() == [False, True]

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_row_without_a_softmax_stays_so(self, tiny_main, value):
        """Also where the token that has none is forbidden."""
        chooser = chooser_of(tiny_main, 2, suppress_tokens=[40])
        logits = torch.zeros(2, tiny_main.vocab_size)
        logits[:, 5] = 1000.0
        logits[0, 40] = value
        sure = Certificate(SearchBound.of(0.1, 5, log_probs=False), chooser).settled(
            logits, [0, 1], [PROMPT] * 2
        )
        assert sure.tolist() == [False, True]

    def test_all_tokens_forbidden(self, tiny_main):
        everything = list(range(tiny_main.vocab_size))
        chooser = chooser_of(tiny_main, 1, suppress_tokens=everything)
        logits = torch.randn(1, tiny_main.vocab_size)
        assert not Certificate(SearchBound.of(0.1, 5, log_probs=True), chooser).settled(logits, [0], [PROMPT])


def reasons(member, logits, ids, weights=(0.5, 0.5), *, processed=None, **asked):
    """Of each row, why it needs no assistant, where the main model's texts end with 2 and 3."""
    fuser = SimpleNamespace(
        bounded=lambda one: one[0] >= one[1],
        first_end_needs_all=True,
        search_bound=lambda: SearchBound.of(0.15, 5, log_probs=True),
    )
    team = SimpleNamespace(fuser=fuser, main=SimpleNamespace(eos_ids=(2, 3)), method="")
    rows, chooser = range(len(logits)), chooser_of(member, len(logits), **(processed or {}))
    skips = Skips(team, Settings.read(member), chooser, **asked)
    main = SimpleNamespace(topk=ops.topk_softmax(logits, 20), said=SimpleNamespace(scores=lambda: logits))
    weights = [weights] * len(logits) if isinstance(weights, tuple) else weights
    return [REASONS[code] for code in skips.flags(main, rows, ids, weights)]


class TestSkips:
    @pytest.fixture
    def sure(self, tiny_main):
        """Rows of which a search can change none: their first choices are 2, 3, 7, 2, 3."""
        logits = torch.full((5, tiny_main.vocab_size), -20.0)
        logits[range(5), [2, 3, 7, 2, 3]] = 20.0
        return logits

    def test_reasons(self, tiny_main):
        """A gate holds at its own probability; what is certain counts first."""
        logits = torch.full((3, tiny_main.vocab_size), -1000.0)
        logits[0, 7] = logits[1, 7:9] = logits[2, 7:10] = 0.0
        own, gate = [[*PROMPT, 9]] * 3, {"confidence_gate": 0.5}
        assert reasons(tiny_main, logits, own, **gate) == ["gated", "gated", None]
        assert reasons(tiny_main, logits, own, certified_skip=True) == ["settled", None, None]
        assert reasons(tiny_main, logits, own, certified_skip=True, **gate) == ["settled", "gated", None]

    def test_each_text_by_its_weights(self, tiny_main, sure):
        given = [[0.5, 0.5], [0.4, 0.6], [0.6, 0.4], [0.0, 1.0], [1.0, 0.0]]
        own = [[*PROMPT, 9]] * 5
        found = reasons(tiny_main, sure, own, given, certified_skip=True)
        assert found == ["settled", None, "settled", None, "settled"]
        assert reasons(tiny_main, sure, own, (0.4, 0.6), certified_skip=True) == [None] * 5
        assert reasons(tiny_main, sure, own, (0.4, 0.6), confidence_gate=1.0) == ["gated"] * 5

    @pytest.mark.parametrize(
        ("asked", "spared"), [({"certified_skip": True}, "settled"), ({"confidence_gate": 0.9}, "gated")]
    )
    def test_first_tokens_that_may_be_ends(self, tiny_main, sure, asked, spared):
        own = [PROMPT, PROMPT, PROMPT, [*PROMPT, 9], [*PROMPT, 9]]
        assert reasons(tiny_main, sure, own, **asked) == [None, None, spared, spared, spared]
        processed = {"suppress_tokens": [40]}  # by which any of them might be one
        found = reasons(tiny_main, sure, own, processed=processed, **asked)
        assert found == [None, None, None, spared, spared]
