"""Likelihoods under teacher forcing, against plain forwards of the same models, fused one token at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from sessions import changed, open_session, read, sync
from transformers import PreTrainedTokenizerBase

from deepen_ext.decoding.prompt_weights import prompt_weights, read_prompts
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError, ModelError
from deepen_ext.fusers.settings import SHARPNESS
from deepen_ext.measure.likelihood import readings as readings_module
from deepen_ext.measure.likelihood import text_reading as likelihood
from deepen_ext.measure.likelihood.text_reading import TextReading, TokenLikelihoods, pieces
from deepen_ext.members.distribution import forbid
from deepen_ext.members.hf import session as session_module
from deepen_ext.members.member import Member
from deepen_ext.members.top_k_only import TopKOnly
from deepen_ext.ops.token_logprobs import token_logprobs
from deepen_ext.text.growing_text import GrowingText
from deepen_ext.text.vocabulary import Vocabulary

PROSE = "The naïve café in Zürich sells straw\u00adberries 🍓🍓 and Antarctica's ice; it costs 1,250 €.\n"
CODE = "def area(r):\n    # π·r²\n    return 3.14159 * r**2\n"


@pytest.fixture(params=["tiny_smollm2", "tiny_gemma"])
def member(request: pytest.FixtureRequest) -> Member:
    return request.getfixturevalue(request.param)


def plain_logits(member: Member, ids: list[int]) -> torch.Tensor:
    """Logits [len(ids), V] of one forward of transformers, without a cache."""
    with torch.inference_mode():
        return member.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def written_logits(member: Member, ids: list[int]) -> torch.Tensor:
    """`plain_logits` with -inf for special tokens that are not among the ids."""
    named = {i for i in ids if member.vocabulary.tokens[i] is None}
    special = [i for i, text in enumerate(member.vocabulary.tokens) if not text]
    forbidden = torch.tensor(sorted(set(special) - named - set(member.eos_ids)))
    return plain_logits(member, ids).index_fill(1, forbidden, -math.inf)


class TestRead:
    """`Session.read`."""

    def test_blocks_are_those_of_one_forward(self, member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = member.vocabulary.prefix_ids + member.vocabulary.encode(PROSE + CODE)
        expected = plain_logits(member, ids)
        monkeypatch.setattr(session_module, "READ_BLOCK", 16)
        with open_session(member, 2) as session:
            sync(session, {0: ids[:4], 1: ids[:9]})
            blocks = list(read(session, 1, ids, 5))
            assert len(blocks) > 2
            assert {len(block) for block in blocks[:-1]} == {16}
            torch.testing.assert_close(torch.cat(blocks), expected[5:], atol=1e-3, rtol=0)
            assert session.ids(1) == ids
            assert session.tokens_fed == 4 + 9 + len(ids) - 5  # nothing of the row's first five again
            fed = session.tokens_fed
            last = sync(session, {1: ids})
            torch.testing.assert_close(last[0], expected[-1], atol=1e-3, rtol=0)
            assert session.tokens_fed == fed  # the last logits are known
            other = sync(session, {0: ids[:5]})  # the other row is as it was
            torch.testing.assert_close(other[0], expected[4], atol=1e-3, rtol=0)
            assert session.tokens_fed == fed + 1

    @pytest.mark.parametrize(("length", "blocks"), [(34, [16, 18]), (35, [16, 16, 3]), (18, [18]), (1, [1])])
    def test_a_small_rest_goes_with_the_block_before(
        self, tiny_smollm2: Member, length: int, blocks: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids = tiny_smollm2.vocabulary.encode(PROSE)[:length]
        monkeypatch.setattr(session_module, "READ_BLOCK", 16)
        with open_session(tiny_smollm2) as session:
            assert [len(block) for block in read(session, 0, ids)] == blocks

    def test_dropped_half_way(self, tiny_smollm2: Member, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = tiny_smollm2.vocabulary.encode(PROSE)
        monkeypatch.setattr(session_module, "READ_BLOCK", 8)
        with open_session(tiny_smollm2) as session:
            reading = read(session, 0, ids)
            next(reading)
            next(reading)
            assert session.ids(0) == ids[:16]
            assert not torch.is_inference_mode_enabled()  # of the caller's own
            got = sync(session, {0: ids[:18]})
            torch.testing.assert_close(got[0], plain_logits(tiny_smollm2, ids[:18])[-1], atol=1e-3, rtol=0)
            with pytest.raises(InputError, match="other ids while it was read"):
                next(reading)

    def test_wrong_input(self, tiny_smollm2: Member) -> None:
        with open_session(tiny_smollm2) as session:
            for start in (-1, 3):
                with pytest.raises(InputError, match="choose 0 to 2"):
                    read(session, 0, [1, 2, 3], start)
            with pytest.raises(InputError, match="nothing to feed"):
                read(session, 0, [])
            with pytest.raises(InputError, match="lane 1 is not one of"):
                read(session, 1, [1])


def last_logits(member: Member, ids: list[int]) -> torch.Tensor:
    """Logits [1, V] after these ids, from a forward of its own; remembered, since many ask."""
    key = id(member), tuple(ids)
    if key not in _remembered:
        with torch.inference_mode():
            output = member.model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
        _remembered[key] = output.logits[0]
    return _remembered[key]


_remembered: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}


def first_ids(member: Member, context: str) -> list[int]:
    """What a member reads before context and text."""
    return member.vocabulary.prefix_ids or ([] if context else [member.tokenizer.bos_token_id])


@dataclass
class Slow:
    """What `slowly` found at each token, and why assistants were not asked."""

    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    unfinished: int = 0
    sat_out: int = 0
    less: int = 0  # tokens at which an assistant kept a part of its weight
    inside: int = 0  # an assistant spoke after a text that ended inside one of its tokens of the whole


def slowly(ensemble: Ensemble, context: str, text: str) -> Slow:
    """One token at a time: the text so far tokenised afresh, forwards from scratch, one row of fusion."""
    main, *assistants = ensemble.members
    vocabulary = main.vocabulary
    ids = first_ids(main, context) + vocabulary.encode(context + text)
    found = Slow()
    for place in range(len(first_ids(main, context) + vocabulary.encode(context)), len(ids)):
        logits = forbid(last_logits(main, ids[:place]), main.unwritable(ids))
        said: list[torch.Tensor | None] = [logits]
        weights = list(ensemble.weights)
        so_far = vocabulary.decode(ids[len(first_ids(main, context)) : place])
        top = logits[0].softmax(dim=-1).topk(16)
        candidates = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        for assistant in assistants:
            try:
                read = so_far.decode()
            except UnicodeDecodeError:
                found.unfinished += 1
                said.append(None)
                continue
            growing = GrowingText(assistant.vocabulary, read)
            i, rule = len(said), ensemble.boundary_rule
            if rule is not None and ensemble.weights[i] > ensemble.weights[0]:
                keeps = rule.share(growing, candidates, ensemble.weights[0], ensemble.weights[i])
                weights[i] = keeps * ensemble.weights[i]
                weights[0] += ensemble.weights[i] - weights[i]
                found.less += 0 < keeps < 1
            elif rule is not None and rule.sits_out(growing, candidates):
                weights[i] = 0.0
            if not weights[i]:
                found.sat_out += 1
                said.append(None)
                continue
            own = assistant.vocabulary.encode(read)
            found.inside += own != assistant.vocabulary.encode(context + text)[: len(own)]
            said.append(last_logits(assistant, first_ids(assistant, context) + own))
        fused = ensemble.fuser.step(said, weights).logits[0].double()
        found.logprobs.append(float(fused.log_softmax(dim=-1)[ids[place]]))
        found.greedy.append(int(fused.argmax()) == ids[place])
    return found


class TestMember:
    """A member alone."""

    @pytest.mark.parametrize("text", [PROSE, CODE, "One token of <|im_end|>, or <eos>?", " ", "x"])
    def test_equals_a_plain_forward(self, member: Member, text: str) -> None:
        ids = first_ids(member, "") + member.vocabulary.encode(text)
        scored = ids[len(first_ids(member, "")) :]
        expected = written_logits(member, ids)[len(ids) - len(scored) - 1 : -1].double().log_softmax(dim=-1)
        own = TextReading([member], "", text).member(member)
        assert own.logprobs == pytest.approx(
            [float(row[token]) for row, token in zip(expected, scored, strict=True)], abs=1e-4
        )
        assert own.greedy == [int(row.argmax()) == token for row, token in zip(expected, scored, strict=True)]
        assert own.nbytes == own.ends[-1] == len(text.encode())
        assert own.ends == sorted(own.ends)
        assert own.total == pytest.approx(sum(own.logprobs))
        assert own.bits_per_byte == pytest.approx(-own.total / math.log(2) / own.nbytes)

    @pytest.mark.parametrize(
        ("context", "text"),
        [
            ("The capital of France is", " Paris, of course."),
            ("The capital of France is ", "Paris, of course."),  # the space goes to the text
            ("Question: why?\n\n", "Because."),  # and so do line ends
            ("A straw", "berry is red"),  # a token reaches from one to the other
            ("", "Paris"),
            ("  \n", "Paris"),
        ],
    )
    def test_context_is_lm_evals(self, member: Member, context: str, text: str) -> None:
        """lm_eval.api.model.TemplateLM._encode_pair, with its treatment of an empty context."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, text = context[:-spaces], context[-spaces:] + text
        prefix = first_ids(member, context)
        whole = prefix + member.vocabulary.encode(context + text)
        scored = whole[len(prefix + member.vocabulary.encode(context)) :]
        assert 0 < len(scored) < len(whole)
        rows = written_logits(member, whole)[-len(scored) - 1 : -1].double().log_softmax(dim=-1)
        reading = TextReading([member], context, text)
        own = reading.member(member)
        assert own.logprobs == pytest.approx(
            [float(row[token]) for row, token in zip(rows, scored, strict=True)], abs=1e-4
        )
        assert reading.text == text
        assert own.nbytes == own.ends[-1] == len(text.encode())


@pytest.fixture(scope="module")
def ensembles(tiny_smollm2: Member, tiny_gemma: Member) -> dict[str, Ensemble]:
    """By what is different about them; without the rows that an earlier run has left on disk."""
    pair = [tiny_smollm2, tiny_gemma]
    byte_rows = Ensemble(pair, fuser="deepen", cache=False)
    return {
        "bytes": byte_rows,
        "no rule": byte_rows.variant(boundary_aware=False),
        "average, its own weights": byte_rows.variant(fuser="average", weights=[0.7, 0.3]),
        "a function": byte_rows.variant(fuser=lambda logits, said, weights: logits / 2),
        "swapped, no rule": Ensemble(
            [tiny_gemma, tiny_smollm2], fuser="deepen", boundary_aware=False, cache=False
        ),
        "an assistant leads": byte_rows.variant(fuser="follow", weights=[0.3, 0.7]),
        "three": Ensemble([tiny_gemma, tiny_smollm2, tiny_smollm2], fuser="average", cache=False),
    }


def test_a_text_that_names_what_stands_before_it(tiny_gemma: Member) -> None:
    """It gets no second BOS, and the one it has is not scored."""
    named, plain = (
        readings_module.Reading(tiny_gemma, "", text) for text in ("<bos>Hello world", "Hello world")
    )
    assert named.ids == plain.ids
    assert named.scored == plain.scored == tiny_gemma.vocabulary.encode("Hello world")
    assert (named.begin, plain.begin) == (5, 0)


class TestFused:
    """Ensembles, against the slow way."""

    TEXT = "Antarctica's strawberries 🍓 cost 1,250 €\n  in Zürich's"

    @pytest.mark.parametrize(
        ("context", "text"), [("", TEXT), ("Antarctica's strawberries", TEXT[25:])], ids=["start", "end"]
    )
    def test_equals_one_token_at_a_time(
        self,
        ensembles: dict[str, Ensemble],
        tiny_smollm2: Member,
        tiny_gemma: Member,
        context: str,
        text: str,
    ) -> None:
        reading = TextReading([tiny_smollm2, tiny_gemma], context, text)
        unfinished = sat_out = inside = less = 0
        logprobs = {}
        for name, ensemble in ensembles.items():
            expected = slowly(ensemble, reading.context, reading.text)
            unfinished += expected.unfinished
            sat_out += expected.sat_out
            inside += expected.inside
            less += expected.less
            got = reading.fused(ensemble)
            assert got.logprobs == pytest.approx(expected.logprobs, abs=2e-4), name
            assert got.greedy == expected.greedy, name
            assert got.ends[-1] == got.nbytes == len(reading.text.encode())
            logprobs[name] = got.logprobs
        assert unfinished if context else inside
        assert sat_out
        assert less
        assert len({tuple(one) for one in logprobs.values()}) == len(ensembles)  # each is a way of its own

    def test_the_demo_pair(self, smollm2: Member, gemma: Member) -> None:
        """Real models, for which the text is likely."""
        ensemble = Ensemble([smollm2, gemma], fuser="deepen", cache=False)
        reading = TextReading([smollm2, gemma], "Antarctica's", " strawberries 🍓 cost 1,250 €")
        expected, got = slowly(ensemble, reading.context, reading.text), reading.fused(ensemble)
        assert got.logprobs == pytest.approx(expected.logprobs, abs=2e-4)
        assert got.greedy == expected.greedy
        assert abs(got.total - reading.member(smollm2).total) > 0.5

    def test_in_blocks_of_one_row(
        self,
        ensembles: dict[str, Ensemble],
        tiny_smollm2: Member,
        tiny_gemma: Member,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        reading = TextReading([tiny_smollm2, tiny_gemma], "", self.TEXT)
        whole = {name: reading.fused(ensemble) for name, ensemble in ensembles.items()}
        alone = reading.member(tiny_gemma)
        monkeypatch.setattr(likelihood, "_STEP_BYTES", 1)
        with TextReading([tiny_smollm2, tiny_gemma], "", self.TEXT) as other:
            assert other.member(tiny_gemma).logprobs == pytest.approx(alone.logprobs, abs=1e-6)
            for name, ensemble in ensembles.items():
                assert other.fused(ensemble).logprobs == pytest.approx(whole[name].logprobs, abs=1e-4)

    def test_a_main_model_with_all_the_weight(
        self, ensembles: dict[str, Ensemble], tiny_smollm2: Member, tiny_gemma: Member
    ) -> None:
        reading = TextReading([tiny_smollm2, tiny_gemma], "", PROSE)
        alone = reading.member(tiny_smollm2)
        single = Ensemble([tiny_smollm2], fuser="single")
        for fused in (reading.fused(ensembles["bytes"], [1, 0]), reading.fused(single)):
            assert fused.logprobs == pytest.approx(alone.logprobs, abs=1e-6)
            assert (fused.ends, fused.greedy, fused.nbytes) == (alone.ends, alone.greedy, alone.nbytes)
        half = reading.fused(ensembles["bytes"], [0.5, 0.5])
        assert half == reading.fused(ensembles["bytes"])  # the ensemble's own
        assert abs(half.total - alone.total) > 0.5

    def test_what_the_loop_writes_is_greedy(self, ensembles: dict[str, Ensemble]) -> None:
        """The loop decides alike who speaks, over its own text, character by character."""
        prompt = "Continents: Africa, Antarctica,"
        for name in ("bytes", "swapped, no rule"):
            ensemble = ensembles[name]
            written = ensemble.generate(prompt, max_new_tokens=12)
            vocabulary = ensemble.members[0].vocabulary
            whole = written.text.rstrip("\ufffd")  # perhaps the last character is not finished
            ids = vocabulary.encode(prompt + whole)[len(vocabulary.encode(prompt)) :]
            assert ids == written.token_ids[: len(ids)], "choose a prompt that goes on in other tokens"
            assert len(ids) > 9
            assert written.changed_tokens > 0
            scored = TextReading(ensemble.members, prompt, whole).fused(ensemble)
            assert scored.greedy == [True] * len(ids)

    def test_members_read_once(
        self, ensembles: dict[str, Ensemble], tiny_smollm2: Member, tiny_gemma: Member
    ) -> None:
        with fed(tiny_smollm2) as by_smollm2, fed(tiny_gemma) as by_gemma:
            reading = TextReading([tiny_smollm2, tiny_gemma], "", self.TEXT)
            assert not by_smollm2
            reading.member(tiny_smollm2)
            reading.fused(ensembles["bytes"])
            reading.fused(ensembles["no rule"])
            ids = first_ids(tiny_smollm2, "") + tiny_smollm2.vocabulary.encode(self.TEXT)
            assert sum(by_smollm2) == len(ids) - 1
            before = sum(by_gemma)
            for name in ("bytes", "no rule", "average, its own weights", "a function"):
                reading.fused(ensembles[name], [0.4, 0.6])
            reading.member(tiny_gemma)
            assert sum(by_gemma) == before
            assert sum(by_smollm2) == len(ids) - 1

    def test_weights_from_the_context(
        self, ensembles: dict[str, Ensemble], tiny_smollm2: Member, tiny_gemma: Member
    ) -> None:
        """As the loop finds them from a prompt; nothing else that is asked of the reading changes by it."""
        weighs = ensembles["no rule"].variant(weights="prompt")
        context, text = "Die Hauptstadt von Frankreich heißt", " Paris, die von Antarctica's"
        found = []
        for member in (tiny_smollm2, tiny_gemma):
            with open_session(member) as session:
                ids = first_ids(member, context) + member.vocabulary.encode(context)
                found.append(read_prompts(session, member, {0: ids})[0])
        weights = prompt_weights(found, [0.5, 0.5], SHARPNESS)
        assert abs(weights[0] - 0.5) > 0.1
        with TextReading([tiny_smollm2, tiny_gemma], context, text) as reading:
            got = reading.fused(weighs)
            assert got.logprobs == pytest.approx(reading.fused(weighs, weights).logprobs, abs=1e-5)
            after = reading.fused(ensembles["bytes"])
        with TextReading([tiny_smollm2, tiny_gemma], context, text) as reading:
            assert after.logprobs == pytest.approx(reading.fused(ensembles["bytes"]).logprobs, abs=1e-4)
        with TextReading([tiny_smollm2, tiny_gemma], "", text) as reading:  # no prompt tells nothing
            assert reading.fused(weighs) == reading.fused(ensembles["no rule"])

    def test_weights_do_not_depend_on_the_text(
        self, ensembles: dict[str, Ensemble], tiny_smollm2: Member, tiny_gemma: Member
    ) -> None:
        """Also where a token reaches from the context into it, and for texts that are read together."""
        context, members = "I like straw", [tiny_smollm2, tiny_gemma]
        texts = [TextReading(members, context, one) for one in ("berries with cream.", " and hay.")]
        for member in members:
            one, other = (text._readings[id(member)] for text in texts)
            own = first_ids(member, context) + member.vocabulary.encode(context)
            assert one.ids[: len(own)] != own == other.ids[: len(own)] == one.context_ids
            with open_session(member) as session:
                expected = read_prompts(session, member, {0: own})[0].logprobs
            alone = TextReading(members, context, "berries with cream.")._readings[id(member)]
            readings_module.read_together([one, other], contexts=True)
            for reading in (alone, one, other):
                assert reading.prompt_score.logprobs == pytest.approx(expected, abs=1e-5)
        weighs = ensembles["no rule"].variant(weights="prompt")
        again = TextReading(members, context, "berries with cream.")
        again.member(tiny_smollm2)  # read before anybody asks for weights
        assert again.fused(weighs).logprobs == pytest.approx(texts[0].fused(weighs).logprobs, abs=1e-4)

    def test_read_ahead_serves_any_weights(
        self, ensembles: dict[str, Ensemble], tiny_smollm2: Member, tiny_gemma: Member
    ) -> None:
        """An assistant that leads speaks where another one sits out: `tune` read such texts once more."""
        members, shares = [tiny_smollm2, tiny_gemma], ([0.5, 0.5], [0.3, 0.7], [0.1, 0.9], [0.0, 1.0])
        reading = TextReading(members, "", self.TEXT)
        reading.read_ahead(ensembles["bytes"])
        reading.release()
        with fed(tiny_smollm2) as by_smollm2, fed(tiny_gemma) as by_gemma:
            found = [reading.fused(ensembles["bytes"], one) for one in shares]
            assert not by_smollm2
            assert not by_gemma
        for one, own in zip(shares, found, strict=True):
            with TextReading(members, "", self.TEXT) as fresh:
                expected = fresh.fused(ensembles["bytes"], one)
            assert own.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        with fed(tiny_gemma) as by_gemma:
            late = TextReading(members, "", self.TEXT)
            late.fused(ensembles["bytes"], [0.5, 0.5])
            before = len(by_gemma)
            late.fused(ensembles["bytes"], [0.3, 0.7])
            assert len(by_gemma) > before, "choose a text at which the rule makes a difference"

    def test_an_assistant_that_gives_more_than_is_looked_at(
        self, tiny_smollm2: Member, tiny_gemma: Member
    ) -> None:
        """A server's 40 most probable tokens and 20 candidates: its kernels take whole rows."""
        few = replace(tiny_gemma, backend=TopKOnly(tiny_gemma.backend, 40))
        found = []
        for member in (tiny_gemma, few):
            settings = {"fuser": "deepen", "weights": [0.5, 0.5], "candidates": 20, "cache": False}
            ensemble = Ensemble([tiny_smollm2, member], **settings)
            with TextReading(ensemble.members, "The ferry to the", " island leaves twice a day") as reading:
                found.append(reading.fused(ensemble).logprobs)
        assert found[1] == pytest.approx(found[0], abs=1e-4)

    def test_caches_given_back_or_handed_on(
        self, ensembles: dict[str, Ensemble], tiny_smollm2: Member, tiny_gemma: Member
    ) -> None:
        one, other = (
            TextReading([tiny_smollm2, tiny_gemma], "Prices: apples cost", text) for text in (" 2 €", " 3 €")
        )
        ensemble = ensembles["no rule"]
        whole = one.fused(ensemble)
        one.release()
        assert one.fused(ensemble, [0.5, 0.5]) == whole
        alone = TextReading([tiny_smollm2, tiny_gemma], "Prices: apples cost", " 3 €").fused(ensemble)
        one = TextReading([tiny_smollm2, tiny_gemma], "Prices: apples cost", " 2 €")
        one.fused(ensemble)
        other.go_on_from(one)
        with fed(tiny_smollm2) as tokens:
            assert other.fused(ensemble).logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert sum(tokens) < len(tiny_smollm2.vocabulary.encode(" 3 €")) + 1

    def test_a_failing_member_is_named(self, ensembles: dict[str, Ensemble], tiny_gemma: Member) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("out of order")

        reading = TextReading(ensembles["bytes"].members, "", self.TEXT)
        hook = tiny_gemma.model.get_input_embeddings().register_forward_pre_hook(fail)
        try:
            with pytest.raises(
                ModelError, match=rf"{tiny_gemma.name}: its forward pass failed.*out of order"
            ):
                reading.fused(ensembles["bytes"])
        finally:
            hook.remove()
        assert math.isfinite(reading.fused(ensembles["bytes"]).total)


@contextmanager
def fed(member: Member) -> Iterator[list[int]]:
    """How many tokens each forward has meanwhile."""
    seen: list[int] = []
    hook = member.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].numel())
    )
    try:
        yield seen
    finally:
        hook.remove()


class TestTogether:
    """`TextReading.read_together` and `fused_each`."""

    CONTEXT = "Question: What do strawberries cost in Antarctica, and what " + "naïve ice " * 9 + "?\nAnswer:"
    CHOICES = (" 1,250 €", " nothing at all", " strawberries 🍓 of Zürich", " ice")

    def test_equals_texts_read_one_by_one(
        self, ensembles: dict[str, Ensemble], tiny_smollm2: Member, tiny_gemma: Member
    ) -> None:
        members = [tiny_smollm2, tiny_gemma]
        pairs = [(one, None) for one in ensembles.values()]
        before: list[TextReading] = []
        for context, choices in ((self.CONTEXT, self.CHOICES), (self.CONTEXT + " It is", self.CHOICES[:3])):
            readings = [TextReading(members, context, choice) for choice in choices]
            if before:
                readings[0].go_on_from(before[0])
            TextReading.read_together(readings)
            for one in before:
                one.close()
            for reading, choice in zip(readings, choices, strict=True):
                alone = TextReading(members, context, choice)
                for member in members:
                    got, want = reading.member(member), alone.member(member)
                    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
                    assert (got.ends, got.greedy, got.nbytes) == (want.ends, want.greedy, want.nbytes)
                given = reading.fused_each(pairs, greedy=False)
                for name, got in zip(ensembles, given, strict=True):
                    want = alone.fused(ensembles[name])
                    assert got.logprobs == pytest.approx(want.logprobs, abs=2e-4), name
                    assert (got.ends, got.greedy, got.nbytes) == (want.ends, [], want.nbytes)
            before = readings

    def test_the_context_is_fed_once(self, tiny_smollm2: Member, monkeypatch: pytest.MonkeyPatch) -> None:
        def read(*contexts: str) -> int:
            with fed(tiny_smollm2) as seen:
                before: TextReading | None = None
                for context in contexts:
                    readings = [TextReading([tiny_smollm2], context, choice) for choice in self.CHOICES]
                    if before is not None:
                        readings[0].go_on_from(before)
                        before.close()
                    TextReading.read_together(readings)
                    before = readings[0]
            return sum(seen)

        encode = tiny_smollm2.vocabulary.encode
        context = len(encode(self.CONTEXT))
        choices = [len(encode(self.CONTEXT + choice)) - context for choice in self.CHOICES]
        # The choices are filled up to the longest one; the last token of each is not fed.
        padded = context + len(choices) * (max(choices) + 1)
        assert context + sum(choices) - len(choices) <= read(self.CONTEXT) <= padded
        assert padded < len(choices) * context
        # What two items begin with is not fed to the second one either.
        more = self.CONTEXT + " It is"
        assert read(self.CONTEXT, more) < read(self.CONTEXT) + context
        # In pieces that a forward pass has room for.
        monkeypatch.setattr(readings_module, "_TOGETHER", 5)
        assert read(self.CONTEXT) <= padded

    def test_read_already(self, tiny_smollm2: Member) -> None:
        readings = [TextReading([tiny_smollm2], self.CONTEXT, choice) for choice in self.CHOICES]
        first = readings[0].member(tiny_smollm2)
        TextReading.read_together(readings)
        with fed(tiny_smollm2) as seen:
            TextReading.read_together(readings)
            assert readings[0].member(tiny_smollm2) == first
            assert [len(one.member(tiny_smollm2).logprobs) for one in readings]
        assert not seen


def test_log_probabilities_sum_to_one(tiny_smollm2: Member) -> None:
    logits = last_logits(tiny_smollm2, tiny_smollm2.vocabulary.encode("The capital of France is"))[
        :, :3000
    ].contiguous()
    rows = logits.expand(3000, -1).contiguous()
    found, best = token_logprobs(rows, torch.arange(3000))
    assert math.fsum(found.exp().tolist()) == pytest.approx(1, abs=1e-6)
    assert set(best.tolist()) == {int(logits.argmax())}
    halves, _ = token_logprobs(logits.bfloat16(), torch.tensor([5]))
    want = float(logits.bfloat16().double().log_softmax(dim=-1)[0, 5])
    assert float(halves[0]) == pytest.approx(want, abs=1e-6)


class TestWrongInput:
    """Refused before a model runs."""

    @pytest.mark.parametrize(
        ("context", "text", "message"),
        [
            ("A context", "", "text is empty"),
            ("", "half a pair \ud83c here", "lone surrogate at character 12"),
            ("\udf53", "x", "lone surrogate at character 0"),
            ("", "a\x04b", r"loses byte 1 \(0x04\)"),
            ("A straw", "berries", "cut where a word begins"),
        ],
    )
    def test_texts(self, tiny_smollm2: Member, context: str, text: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            TextReading([tiny_smollm2], context, text)

    def test_too_long(self, tiny_smollm2: Member) -> None:
        short = changed(tiny_smollm2, context_length=20)
        TextReading([short], "", " a" * 20)  # the last token is not read
        with pytest.raises(InputError, match="22 tokens, more than its context of 20; shorten the context"):
            TextReading([short], "", " a" * 21)

    def test_strangers(self, tiny_smollm2: Member, tiny_gemma: Member) -> None:
        reading = TextReading([tiny_smollm2], "", "text")
        with pytest.raises(InputError, match="not a member of this reading"):
            reading.member(tiny_gemma)
        with pytest.raises(InputError, match="not a member of this reading"):
            reading.fused(Ensemble([tiny_smollm2, tiny_gemma], recipe="bytes", cache=False))

    def test_nothing_to_begin_with(self, tiny_smollm2: Member) -> None:
        tokenizer = copy.deepcopy(tiny_smollm2.tokenizer)
        tokenizer.bos_token = tokenizer.eos_token = None
        headless = replace(tiny_smollm2, tokenizer=tokenizer, eos_ids=())
        with pytest.raises(InputError, match="give a context"):
            TextReading([headless], "", "text")
        TextReading([headless], "some", " text")


class TestBlocks:
    """`TokenLikelihoods.by_blocks`."""

    ONE = TokenLikelihoods([-4.0, -2.0, -9.0, -1.0], [4, 5, 5, 11], [True, False, True, False], 11)

    def test_spread_over_bytes(self) -> None:
        assert self.ONE.by_blocks(4) == pytest.approx([-4, -2 - 9 - 3 / 6, -3 / 6])
        assert self.ONE.by_blocks(3) == pytest.approx([-3, -1 - 2 - 9 - 1 / 6, -3 / 6, -2 / 6])
        assert self.ONE.by_blocks(100) == pytest.approx([-16])
        assert self.ONE.tokens_by_blocks(5) == pytest.approx([2, 1 + 5 / 6, 1 / 6])
        assert TokenLikelihoods([-1.0, -2.0], [4, 4], [], 4).by_blocks(4) == [-3]  # no bytes, at the end
        with pytest.raises(InputError, match="choose 1 or more"):
            self.ONE.by_blocks(0)

    def test_blocks_add_up(self, tiny_smollm2: Member) -> None:
        own = TextReading([tiny_smollm2], "", PROSE).member(tiny_smollm2)
        for size in (1, 7, 64, 1000):
            blocks = own.by_blocks(size)
            assert len(blocks) == -(-own.nbytes // size)
            assert math.fsum(blocks) == pytest.approx(own.total)
            assert math.fsum(own.tokens_by_blocks(size)) == pytest.approx(len(own.logprobs))


TEXTS = {
    "page": (Path(__file__).parents[1] / "docs" / "gpu.md").read_text(),
    "source": Path(__file__).read_text(),
    "no spaces": "今天天气很好，我们去公园吧。" * 40,
    "whitespace": "a" + " \n" * 300 + "b" + "\t" * 150 + "c",
    "one line ends": "word\n" * 200,
    "short": "x",
}


class TestPieces:
    """`pieces`."""

    @pytest.mark.parametrize("name", list(TEXTS))
    def test_every_character_once(self, name: str) -> None:
        text = TEXTS[name]
        for length, context in ((200, 80), (100, 0), (1, 1), (10**6, 10)):
            found = pieces(text, length=length, context=context)
            assert "".join(piece for _, piece in found) == text
            begin = 0
            for before, piece in found:
                assert piece
                assert len(before) <= context
                assert text[:begin].endswith(before)
                assert before == before.rstrip()  # else its end would be scored again
                inside = text[begin - len(before) - 1 : begin - len(before) + 1].strip()
                words = len(before) < begin and any(map(str.isspace, before))
                assert not words or len(inside) < 2  # the first of them is whole
                assert len(piece) <= length or name == "whitespace" or length == 1
                begin += len(piece)
                assert 2 * len(piece) > length or begin == len(text)
            assert len(found) == 1 or length < len(text)

    def test_no_token_reaches_across_a_cut(self, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
        vocabularies = [Vocabulary.from_tokenizer(one) for one in tokenizers.values()]
        for name in ("page", "source"):
            found = pieces(TEXTS[name], length=300, context=150)
            assert len(found) > 20
            for vocabulary in vocabularies:
                for context, piece in found:
                    own = vocabulary.encode(context)
                    assert vocabulary.encode(context + piece)[: len(own)] == own

    def test_wrong_input(self) -> None:
        with pytest.raises(InputError, match="text is empty"):
            pieces("")
        for lengths in ({"length": 0}, {"context": -1}):
            with pytest.raises(InputError, match=r"choose [01] or more"):
                pieces("text", **lengths)
