"""Ensembles with a member of which only the most probable tokens are seen, as of a server."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import one_byte_tokens, save_model

from deepen_ext import Ensemble, InputError
from deepen_ext.decoding.prompts import Prompt
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.members.chat import PromptText
from deepen_ext.members.distribution import Distribution, joined, take_topk
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.members.top_k_only import TopKOnly
from deepen_ext.ops import topk_softmax
from deepen_ext.ops.topk_softmax import NOTHING_LEFT

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "L'été dernier,",
]


def hidden(member: Member, k: int) -> Member:
    return replace(member, backend=TopKOnly(member.backend, k))


@pytest.fixture(scope="module")
def pair(tiny_smollm2: Member, tiny_gemma: Member) -> Ensemble:
    return Ensemble([tiny_smollm2, tiny_gemma], fuser="deepen")


@pytest.fixture(scope="module")
def full_texts(pair: Ensemble) -> list[list[int]]:
    found = pair.generate(PROMPTS, max_new_tokens=16)
    assert sum(one.changed_tokens for one in found) > 3  # the assistant has a say
    return [one.token_ids for one in found]


class TestAssistant:
    def test_the_same_texts(self, pair: Ensemble, full_texts: list[list[int]]) -> None:
        """`deepen` and `average` ask an assistant for nothing but its top-k."""
        main, assistant = pair.members
        for fuser in ("deepen", "average"):
            full = full_texts
            if fuser == "average":
                full = [
                    one.token_ids for one in pair.variant(fuser=fuser).generate(PROMPTS, max_new_tokens=8)
                ]
            seen = Ensemble([main, hidden(assistant, 128)], fuser=fuser)
            found = seen.generate(PROMPTS, max_new_tokens=len(full[0]), batch_size=3)
            assert [one.token_ids for one in found] == full

    def test_fewer_tokens_than_candidates(self, pair: Ensemble) -> None:
        """The rest of what it says is its tail; shared forwards know what a smaller top-k is."""
        main, assistant = pair.members
        few = Ensemble([main, hidden(assistant, 5)]).generate(
            PROMPTS[0], max_new_tokens=8, trace=lambda _: None
        )
        assert few.token_ids != []
        with SharedForwards() as shared:
            ensemble = Ensemble([main, hidden(assistant, 5)])
            texts = [ensemble.generate(PROMPTS[:2], max_new_tokens=6, shared=shared).texts for _ in range(2)]
        assert texts[0] == texts[1] == ensemble.generate(PROMPTS[:2], max_new_tokens=6).texts

    def test_its_likelihood_is_out_of_reach_but_not_the_ensembles(self, pair: Ensemble) -> None:
        main, assistant = pair.members
        seen = hidden(assistant, 128)
        with TextReading([main, assistant, seen], "The capital of", " France is Paris.") as reading:
            with pytest.raises(InputError, match=rf"{seen.name}: the likelihood of a text.*'logits'"):
                reading.member(seen)
            full = reading.fused(pair)
            assert full.logprobs != reading.member(main).logprobs
            assert reading.fused(Ensemble([main, seen])).logprobs == full.logprobs


class TestMainModel:
    def test_greedy_deepen_differs_at_near_ties_alone(
        self, pair: Ensemble, full_texts: list[list[int]]
    ) -> None:
        """At every token of the full ensemble's own texts, the two are asked for the next one.

        Log-probabilities stand in for logits, and what special tokens have in the tail is not taken out: that
        moves near-ties, and nothing else.
        """
        main, assistant = pair.members
        seen = Ensemble([hidden(main, 128), assistant])
        prompts = []
        for prompt, own in zip(PROMPTS, full_texts, strict=True):
            ids = main.vocabulary.prefix_ids + main.vocabulary.encode(prompt)
            for n in range(len(own)):
                text = main.vocabulary.decode(ids + own[:n]).decode(errors="ignore")
                prompts.append(Prompt(ids + own[:n], [PromptText(text)]))
        records: list[list[dict]] = [[], []]
        for ensemble, kept in zip((pair, seen), records, strict=True):
            ensemble.generate(prompts, max_new_tokens=1, batch_size=16, trace=kept.append)
            kept.sort(key=lambda one: one["row"])
        differing = 0
        for full, other in zip(*records, strict=True):
            first, second = (one["id"] for one in full["fused"][:2])
            probabilities = [
                {one["id"]: one["probability"] for one in record["fused"]} for record in (full, other)
            ]
            # Probabilities of the two sum over different tokens; the odds of two tokens do not.
            full_odds, seen_odds = (one[first] / one[second] for one in probabilities)
            assert seen_odds == pytest.approx(full_odds, rel=1e-3)
            if full["token"] != other["token"]:
                differing += 1
                assert full_odds < 1.001, (full, other)
        print(f"{differing} of {len(prompts)} steps choose another token")  # shown by pytest -rP
        assert len(prompts) >= 50
        assert differing <= len(prompts) / 50

    def test_sampling_and_skips_within_its_top_k(self, pair: Ensemble, full_texts: list[list[int]]) -> None:
        main, assistant = pair.members
        seen = Ensemble([hidden(main, 30), assistant])
        sampled = seen.generate(PROMPTS[:2], max_new_tokens=6, do_sample=True, top_k=20, top_p=0.9, seed=3)
        again = seen.generate(PROMPTS[:2], max_new_tokens=6, do_sample=True, top_k=20, top_p=0.9, seed=3)
        assert sampled.texts == again.texts
        assert sampled.texts != seen.generate(PROMPTS[:2], max_new_tokens=6).texts
        greedy = seen.generate(PROMPTS[:2], max_new_tokens=10)
        skipped = seen.generate(PROMPTS[:2], max_new_tokens=10, certified_skip=True)
        assert skipped.timings.settled > 0
        assert skipped.texts == greedy.texts

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"do_sample": True}, "set top_k to 1 to 30"),
            ({"do_sample": True, "top_k": 31}, "set top_k to 1 to 30"),
            ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor needs the capability 'logits'"),
            ({"logits_processor": [lambda ids, scores: scores]}, "needs the capability 'logits'"),
        ],
    )
    def test_what_it_cannot_do(self, pair: Ensemble, settings: dict, message: str) -> None:
        seen = Ensemble([hidden(pair.members[0], 30), pair.members[1]])
        with pytest.raises(InputError, match=f"{seen.names[0]}: .*{message}"):
            seen.generate(PROMPTS[0], max_new_tokens=3, **settings)
        seen.generate(PROMPTS[0], max_new_tokens=3, min_new_tokens=3, suppress_tokens=[5])


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    folder = tmp_path_factory.mktemp("tiny")
    return [load_member(save_model(folder / str(i), one_byte_tokens(), seed=i)) for i in range(2)]


class TestRefused:
    """By name, before anything is computed, saying what is missing."""

    @pytest.mark.parametrize(
        ("settings", "capability"),
        [
            ({"fuser": "union-topk"}, "'logits'"),
            ({"fuser": "union-vocab"}, "'logits'"),
            ({"fuser": lambda logits, said, weights: logits}, "'logits'"),
            ({"weights": "prompt"}, "'logits'"),
            ({"recipe": "calibrated"}, "use recipe='bytes'"),
            ({"recipe": "paper"}, "use recipe='bytes'"),
        ],
    )
    @pytest.mark.parametrize("which", [0, 1])
    def test_ensembles(self, members: list[Member], which: int, settings: dict, capability: str) -> None:
        given = [hidden(one, 9) if i == which else one for i, one in enumerate(members)]
        with pytest.raises(InputError, match=rf"^{given[which].name}: .*{capability}"):
            Ensemble(given, **settings)

    def test_a_main_model_under_average(self, members: list[Member]) -> None:
        with pytest.raises(InputError, match=r"^0: .*average.*'logits'"):
            Ensemble([hidden(members[0], 9), members[1]], fuser="average")
        # As an assistant, whatever the recipe: the rows of "average" come from bytes.
        Ensemble([members[0], hidden(members[1], 9)], fuser="average", recipe="paper")

    def test_what_takes_the_model_itself(self, members: list[Member]) -> None:
        seen = hidden(members[0], 9)
        with pytest.raises(InputError, match=r"^0: .*TopKOnly"):
            _ = seen.model
        with pytest.raises(InputError, match=r"^0: .*recipe='bytes'"):
            _ = seen.embedding
        for k in (0, members[0].vocab_size + 1):
            with pytest.raises(InputError, match="0: k is"):
                hidden(members[0], k)

    @pytest.mark.parametrize("fuser", ["single", "deepen"])
    def test_one_that_names_nothing_that_may_be_written(self, members: list[Member], fuser: str) -> None:
        """As a chat model does that begins with a special token, and a server that names one token."""
        main = replace(members[0], vocabulary=copy(members[0].vocabulary))
        first = Ensemble([main], fuser="single").generate("a", max_new_tokens=1).token_ids[0]
        main.vocabulary.tokens = [None if i == first else t for i, t in enumerate(main.vocabulary.tokens)]
        ensemble = Ensemble([hidden(main, 1), *members[1:][: fuser != "single"]], fuser=fuser, cache=False)
        with pytest.raises(InputError, match=r"logits of 0: row 0 .*no token that may be written.*name more"):
            ensemble.generate("a", max_new_tokens=1)


class TestDistribution:
    @pytest.fixture
    def full(self) -> Distribution:
        torch.manual_seed(0)
        return Distribution("it", 50, 6, torch.randn(4, 50))

    @pytest.fixture
    def short(self, full: Distribution) -> Distribution:
        return Distribution("it", 50, 6, known_topk=full.topk)

    def test_scores(self, full: Distribution, short: Distribution) -> None:
        assert full.scores() is full.logits
        scores = short.scores()
        assert scores.shape == (4, 50)
        top = full.topk.ids.long()
        torch.testing.assert_close(scores.gather(1, top), full.scores().log_softmax(-1).gather(1, top))
        assert int((scores > -torch.inf).sum()) == 4 * 6

    def test_at_and_joined(self, full: Distribution, short: Distribution) -> None:
        for one in (full, short):
            for positions in ([1, 2], [3, 0], []):
                part = one.at(positions)
                assert len(part) == len(positions)
                assert torch.equal(part.topk.ids, full.topk.ids[positions])
            both = joined([one.at([2, 3]), one.at([0])])
            assert torch.equal(both.topk.probs, full.topk.probs[[2, 3, 0]])
            assert both.known_topk is not None  # not taken twice
            assert torch.equal(both.scores().softmax(-1), one.scores()[[2, 3, 0]].softmax(-1))
            assert torch.equal(one.clone().topk.ids, full.topk.ids)
            assert one.clone().nbytes == one.nbytes > 0

    def test_joined_parts_of_which_some_have_no_topk_or_another_one(self, full: Distribution) -> None:
        whole = full.topk
        fresh = replace(full, known_topk=None)
        for first, second in ((fresh, full), (full, fresh), (full, full.top(2))):
            fresh.known_topk = None
            both = joined([first, second])
            assert both.known_topk is None
            assert both.k == 6
            assert torch.equal(both.topk.ids, whole.ids.repeat(2, 1))

    def test_without(self, full: Distribution, short: Distribution) -> None:
        forbidden = full.topk.ids[0, [0, 3]].long()
        kept = full.scores().index_fill(1, forbidden, -torch.inf).softmax(-1)
        torch.testing.assert_close(full.without(forbidden).scores().softmax(-1), kept)
        cut = short.without(forbidden).topk
        assert bool((cut.probs.diff() <= 0).all())
        torch.testing.assert_close(cut.probs.sum(1) + cut.tail, torch.ones(4))
        # Where all that is taken out is in the top-k, what is left is exact.
        known = [row for row in range(4) if set(forbidden.tolist()) <= set(full.topk.ids[row].tolist())]
        assert 0 in known
        for row in known:
            here = cut.probs[row] > 0
            torch.testing.assert_close(cut.probs[row][here], kept[row][cut.ids[row][here].long()])

    def test_another_k(self, full: Distribution, short: Distribution) -> None:
        for one in (full, short):
            fewer = one.top(2).topk
            torch.testing.assert_close(fewer.probs, full.topk.probs[:, :2])
            torch.testing.assert_close(fewer.tail, 1 - fewer.probs.sum(1))
        assert short.top(9).topk.ids.shape == (4, 6)
        assert full.top(9).topk.ids.shape == (4, 9)

    def test_all_at_once(self, full: Distribution) -> None:
        other = Distribution("other", 30, 6, torch.randn(2, 30))
        third = Distribution("third", 30, 3, torch.randn(1, 30))
        take_topk([full, other, third])
        for one in (full, other, third):
            assert one.known_topk is not None
            assert torch.equal(one.known_topk.ids, topk_softmax(one.scores(), one.k).ids)

    def test_without_all_of_them(self, full: Distribution, short: Distribution) -> None:
        """Nothing is known of the others: no token can be written."""
        cut = short.without(full.topk.ids[2].long()).topk
        assert cut.status.tolist() == [0, 0, NOTHING_LEFT, 0]
