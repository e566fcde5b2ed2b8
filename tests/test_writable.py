"""What can be written: a token with text, or EOS; whatever the model gives special tokens and padding."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
import torch
from sessions import changed, open_session
from transformers import LlamaConfig, LlamaForCausalLM

from deepen_ext import Ensemble
from deepen_ext.adapters import DeepenLogitsProcessor
from deepen_ext.decoding.prompt_weights import read_prompts
from deepen_ext.fusers import FUSERS
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.members.distribution import forbid
from deepen_ext.members.member import Member
from deepen_ext.text.vocabulary import Vocabulary

PROMPT = "The capital of France is"
PADDING = 8  # logits beyond the tokenizer
NEW = {"max_new_tokens": 7}


def tiny(like: Member, seed: int, padding: int) -> Member:
    """A member with the tokenizer of another and a small random model, whose logits have padding at the end.

    With padding, its tokens without text have the largest logits: the padding, and special tokens."""
    rows = like.vocab_size + padding
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=like.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.8,
        eos_token_id=like.eos_ids[0],
        bos_token_id=like.eos_ids[0],
        pad_token_id=like.eos_ids[0],
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    vocabulary = like.vocabulary
    if padding:
        vocabulary = Vocabulary.from_tokenizer(like.tokenizer, rows)
        model.resize_token_embeddings(rows)
        special = [i for i, text in enumerate(vocabulary.tokens) if not text and i not in like.eos_ids]
        assert len(special) > padding

        def raise_special(module, inputs, output):
            logits = output.logits.clone()
            largest = logits.amax(-1, keepdim=True)
            logits[..., special] = largest + torch.linspace(2, 5, len(special))
            logits[..., -1] = largest[..., 0] + 9
            return dataclasses.replace(output, logits=logits)

        model.register_forward_hook(raise_special)
    member = changed(like, name=f"tiny{seed}", model=model, vocab_size=vocabulary.vocab_size)
    return dataclasses.replace(member, vocabulary=vocabulary, eos_ids=(like.eos_ids[0],))


def double_the_main_model(logits, said, weights):
    """A function of the caller's that looks at all logits, and gives what cannot be written a chance."""
    return (logits * 1.5).clamp(min=-1e4) + 1


@pytest.fixture(scope="module")
def members(tiny_smollm2):
    """The main model as it is, the same with padding, and an assistant."""
    return tiny(tiny_smollm2, 1, 0), tiny(tiny_smollm2, 1, PADDING), tiny(tiny_smollm2, 2, 0)


# What draws needs sampling, and spans have no likelihood (tests/test_draw.py, tests/test_spans.py).
@pytest.fixture(
    scope="module",
    params=[*(name for name, one in FUSERS.items() if not one.draws and not one.spans), "function"],
)
def pair(request, members):
    """Ensembles of one fuser: whose main model has no padding, and whose has."""
    fuser = double_the_main_model if request.param == "function" else request.param
    settings = {"fuser": fuser, "candidates": 5, "boundary_aware": False, "cache": False}
    plain, padded, assistant = members
    return Ensemble([plain, assistant], **settings), Ensemble([padded, assistant], **settings)


def check(padded: Ensemble, ids: list[int]) -> None:
    main = padded.members[0]
    assert all(main.vocabulary.tokens[token] or token in main.eos_ids for token in ids)


class TestEveryFuser:
    @pytest.mark.parametrize(
        "settings", [{}, {"do_sample": True, "seed": 3}, {"repetition_penalty": 1.2}], ids=str
    )
    def test_generate(self, pair, settings):
        want, found = (one.generate(PROMPT, **NEW, **settings) for one in pair)
        check(pair[1], found.token_ids)
        assert found.token_ids == want.token_ids
        assert found.text == want.text != ""
        assert found.changed_tokens == want.changed_tokens

    def test_custom_generate(self, pair):
        want, found = (self.written(one, custom_generate=one.custom_generate) for one in pair)
        check(pair[1], found)
        assert found == want

    @pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=str)
    def test_the_logits_processor(self, pair, settings):
        found = []
        for one in pair:
            with DeepenLogitsProcessor(one) as fuse:
                found.append(self.written(one, logits_processor=[fuse], **settings))
        check(pair[1], found[1])
        assert found[1] == found[0]

    def written(self, ensemble: Ensemble, **settings) -> list[int]:
        main = ensemble.members[0]
        inputs = main.tokenizer(PROMPT, return_tensors="pt")
        given = main.model.generate(**inputs, do_sample=False, **NEW, **settings)
        return given[0, inputs["input_ids"].shape[1] :].tolist()

    def test_likelihood(self, pair):
        """What has the largest logits and cannot be written takes no probability from the text."""
        scores = []
        for one in pair:
            with TextReading(one.members, PROMPT, " Paris, of course.") as reading:
                fused, alone = reading.fused(one), reading.member(one.members[0])
            scores.append((fused.logprobs, alone.logprobs))
        for want, found in zip(*scores, strict=True):
            assert all(map(math.isfinite, found))
            assert found == pytest.approx(want, abs=1e-3)

    def test_lm_eval(self, pair):
        lm_eval = pytest.importorskip("lm_eval.api.instance")
        from deepen_ext.adapters.lm_eval import DeepenLM

        answers = []
        for one in pair:
            model = DeepenLM(one)
            requests = [
                lm_eval.Instance(kind, {}, arguments, 0)
                for kind, arguments in (
                    ("loglikelihood", (PROMPT, " Paris")),
                    ("generate_until", (PROMPT, {"until": ["\n\n\n"], "max_gen_toks": 5})),
                )
            ]
            ((likelihood, _),) = model.loglikelihood(requests[:1], disable_tqdm=True)
            answers.append((likelihood, model.generate_until(requests[1:], disable_tqdm=True)))
        assert answers[1][0] == pytest.approx(answers[0][0], abs=1e-3)
        assert answers[1][1] == answers[0][1]


def ensembles(members, **settings) -> list[Ensemble]:
    plain, padded, assistant = members
    settings = {"boundary_aware": False, "cache": False} | settings
    return [Ensemble([main, assistant], **settings) for main in (plain, padded)]


@pytest.mark.parametrize("settings", [{"boundary_aware": True}, {"weights": "prompt"}], ids=str)
def test_rules_that_look_at_the_main_models_logits(members, settings):
    want, found = (one.generate(PROMPT, **NEW) for one in ensembles(members, **settings))
    assert found.token_ids == want.token_ids


@pytest.mark.parametrize("skip", [{"certified_skip": True}, {"confidence_gate": 1e-3}], ids=str)
def test_tokens_that_need_no_assistant(members, skip):
    """Steps so small that they rarely change a token."""
    want, found = (one.generate(PROMPT, **NEW, **skip) for one in ensembles(members, learning_rate=0.005))
    assert found.token_ids == want.token_ids
    assert found.timings.settled == want.timings.settled
    assert found.timings.gated == want.timings.gated
    assert found.timings.settled + found.timings.gated > 0


def test_the_callers_eos_is_written_though_it_has_no_text(members):
    """Any token may end a text; the padding's last logit is the largest."""
    _, padded, _ = members
    (_, ensemble) = ensembles(members)
    end = padded.vocab_size - 1
    result = ensemble.generate(PROMPT, eos_token_id=end, **NEW)
    assert (result.token_ids, result.finish_reason, result.text) == ([end], "eos", "")
    inputs = padded.tokenizer(PROMPT, return_tensors="pt")
    with DeepenLogitsProcessor(ensemble, eos_token_id=[end]) as fuse:
        given = padded.model.generate(
            **inputs, do_sample=False, eos_token_id=end, logits_processor=[fuse], **NEW
        )
    assert given[0, inputs["input_ids"].shape[1] :].tolist() == [end]


def test_special_tokens_that_a_text_names_have_a_likelihood(members):
    (_, ensemble) = ensembles(members)
    main = ensemble.members[0]
    with TextReading(ensemble.members, PROMPT, " Paris<|im_start|>") as reading:
        fused, alone = reading.fused(ensemble), reading.member(main)
    assert main.vocabulary.tokens[reading._readings[id(main)].scored[-1]] is None
    assert -30 < fused.logprobs[-1] < 0
    assert -30 < alone.logprobs[-1] < 0


def test_prompts_are_scored_without_what_cannot_be_written(members):

    scores = []
    for member in members[:2]:
        session = open_session(member)
        scores.append(read_prompts(session, member, {0: member.vocabulary.encode(PROMPT)})[0])
        session.close()
    assert scores[1].logprobs == pytest.approx(scores[0].logprobs, abs=1e-4)


class TestUnwritable:
    def test_which_ids(self, members, tiny_smollm2):
        plain, padded, _ = members
        tokens = tiny_smollm2.vocabulary.tokens
        without = [i for i, text in enumerate(tokens) if not text and i not in plain.eos_ids]
        assert plain.unwritable().tolist() == without
        beyond = list(range(plain.vocab_size, padded.vocab_size))
        assert padded.unwritable().tolist() == without + beyond
        assert padded.unwritable(but=[beyond[0], 500]).tolist() == without + beyond[1:]
        assert padded.unwritable([500]) is padded.unwritable()

    def test_few_sets_are_kept(self, members):
        """The special tokens of a prompt are one, and whoever asks a server chooses them."""
        member = dataclasses.replace(members[1])
        whole = member.unwritable().tolist()
        pairs = list(combinations(whole, 2))[:60]
        assert len(pairs) == 60
        for pair in pairs * 2:
            assert member.unwritable(pair).tolist() == [i for i in whole if i not in pair]
            assert len(member._unwritable) <= 32
        assert member.unwritable(pairs[-1]) is member.unwritable(pairs[-1])

    def test_threads_may_ask_for_sets_at_once(self, members):
        member = dataclasses.replace(members[1])
        whole = member.unwritable().tolist()
        pairs = list(combinations(whole, 2))[:60]

        def ask(seed):
            rng = random.Random(seed)
            for _ in range(500):
                pair = rng.choice(pairs)
                assert len(member.unwritable(pair)) == len(whole) - 2

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(ask, range(4)))
        finally:
            sys.setswitchinterval(before)
        assert len(member._unwritable) <= 32

    def test_nothing_is_copied_without_need(self):
        logits = torch.zeros(2, 4)
        assert forbid(logits, torch.empty(0, dtype=torch.long)) is logits
        ids = torch.tensor([1, 3])
        copy = forbid(logits, ids)
        assert copy.tolist() == [[0, -math.inf, 0, -math.inf]] * 2
        assert not logits.any()
        assert forbid(logits, ids, in_place=True) is logits
        assert torch.equal(logits, copy)
