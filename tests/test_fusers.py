"""The fusers beside DeePEn: against what their papers say, in plain Python over real vocabularies."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from oracle import random_embedding, random_logits
from tiny_models import one_byte_tokens
from tokenizers.models import BPE

from deepen_ext import Ensemble, InputError, RelativeMap
from deepen_ext.fusers import (
    FUSERS,
    AverageFuser,
    DeepenFuser,
    FunctionFuser,
    TokenBridge,
    UnionTopkFuser,
    parse_fuser,
)
from deepen_ext.fusers.parts import Said
from deepen_ext.fusers.search_bound import SearchBound
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.loading import load_member, load_members
from deepen_ext.members.member import Member
from deepen_ext.text.token_bytes import BYTE_TO_CHAR
from deepen_ext.text.vocabulary import Vocabulary

PROMPT = "The capital of France is"
# What draws and what writes spans is tried by itself (tests/test_draw.py, tests/test_spans.py).
EVERY = [name for name, one in FUSERS.items() if not one.draws and not one.spans and one.fewest_members > 1]


def peaked(batch: int, vocab: int, seed: int) -> torch.Tensor:
    """Logits [batch, vocab] with a handful of tokens that matter."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, vocab, generator=generator)
    for row in logits:
        row[torch.randperm(vocab, generator=generator)[:40]] += 10 + 12 * torch.rand(40, generator=generator)
    return logits


@pytest.fixture
def said(smollm2: Member, gemma: Member) -> list[torch.Tensor]:
    """Three positions of both members; the second has tokens in common on top, the third ends the text."""
    logits = [peaked(3, smollm2.vocab_size, 1), peaked(3, gemma.vocab_size, 2)]
    for i, text in enumerate((" Paris", " the", " Antarctica", "\n")):
        logits[0][1, smollm2.vocabulary.encode(text)[0]] = 25.0 - i
        logits[1][1, gemma.vocabulary.encode_part(text, 0)[0][0]] = 24.5 + i
    logits[0][2, smollm2.eos_ids[0]] = 26.0
    logits[1][2, gemma.eos_ids[0]] = 26.0
    return logits


@lru_cache(maxsize=2)
def ids_by_text(tokens: tuple[bytes | None, ...]) -> dict[bytes | None, int]:
    return {text: i for i, text in reversed(list(enumerate(tokens)))}


def first_token(member: Member, data: bytes) -> int:
    """The member's token of these bytes, or the first of their tokenisation."""
    ids = ids_by_text(tuple(member.vocabulary.tokens))
    own = member.vocabulary.encode_part(data.decode(), 0)[0]
    # Of `<0x31>` and `1` the tokenizer's own; bytes that it never gives for their text have one token only.
    return ids[data] if data in ids and len(own) > 1 else own[0]


@pytest.mark.parametrize("recipe", ["bytes", "calibrated", "paper"])
def test_only_the_papers_recipe_searches_on_logits_as_they_are(smollm2, gemma, recipe) -> None:
    fuser = Ensemble([smollm2, gemma], fuser="deepen", recipe=recipe, cache=False).fuser
    assert isinstance(fuser, DeepenFuser)
    assert fuser.log_probs == (recipe != "paper")
    assert fuser.search_bound() == SearchBound.of(
        fuser.learning_rate, fuser.steps, log_probs=recipe != "paper"
    )


class TestAverage:
    def test_is_the_weighted_sum_of_dense_relative_representations(self) -> None:
        logits = [random_logits(2, 300, seed=0), random_logits(2, 400, seed=1), random_logits(2, 350, seed=2)]
        maps = [
            RelativeMap.from_embedding(
                random_embedding(v, 16, seed=v), torch.arange(120), temperature=4, entries=12
            )
            for v in (300, 400, 350)
        ]
        anchor_ids, weights = torch.randperm(300)[:120], [0.5, 0.3, 0.2]
        step = AverageFuser(maps, anchor_ids, candidates=10_000).step(logits, weights)
        want = weights[0] * torch.softmax(logits[0].double(), -1)
        for weight, one, relative in zip(weights[1:], logits[1:], maps[1:], strict=True):
            want[:, anchor_ids] += weight * (torch.softmax(one.double(), -1) @ relative.to_dense().double())
        assert (want - torch.softmax(logits[0].double(), -1)).abs().max() > 0.01
        assert all(one.rows.rest[one.table.known].mean() > 0.2 for one in maps[1:])  # beside the entries
        torch.testing.assert_close(step.logits.double().exp(), want, atol=1e-6, rtol=1e-4)
        assert torch.equal(step.chosen.long(), want.argmax(-1))

    def test_of_rows_it_is_silent_on_nothing_is_read(self) -> None:
        """Its map has no rows but those it was asked for: the others hold whatever was in memory."""
        logits = [random_logits(2, 300, seed=0), random_logits(1, 400, seed=1), random_logits(1, 350, seed=2)]
        maps = [
            RelativeMap.from_embedding(random_embedding(v, 16, seed=v), torch.arange(120), entries=12)
            for v in (300, 400, 350)
        ]
        for one in maps:
            one.rows.columns.fill_(1 << 30)
            one.rows.values.fill_(float("nan"))
        fuser = AverageFuser(maps, torch.arange(120), min_probability=0.01)
        step = fuser.step(logits, [0.5, 0.3, 0.2], rows=[None, [0], [1]])
        assert step.logits.isfinite().all()
        for row, given in enumerate(([logits[1], None], [None, logits[2]])):
            alone = fuser.step([logits[0][row : row + 1], *given], [0.5, 0.3, 0.2])
            torch.testing.assert_close(step.logits[row : row + 1], alone.logits)

    def test_improbable_tokens_go_to_the_tail(self) -> None:
        """The tail is shared evenly. The most probable token counts however improbable it is."""
        logits = [random_logits(2, 300, seed=0), random_logits(2, 400, seed=1)]
        logits[1][1] *= 0.01
        maps = [
            RelativeMap.from_embedding(random_embedding(v, 16, seed=v), torch.arange(120)) for v in (300, 400)
        ]
        step = AverageFuser(maps, torch.arange(120), min_probability=0.01).step(logits, [0.5, 0.5])
        assert 1 < maps[1].rows_known < 128
        main, other = (one.double().softmax(-1) for one in logits)
        counts = other >= 0.01
        assert counts.sum(1).tolist()[1:] == [0] < counts.sum(1).tolist()[:1]
        counts[1, other[1].argmax()] = True
        tail = (other * ~counts).sum(1, keepdim=True) / 120
        main[:, :120] += (other * counts) @ maps[1].to_dense().double() + tail
        torch.testing.assert_close(step.logits.double().exp(), main / 2, atol=1e-6, rtol=1e-4)

    def test_dense_maps_are_refused(self) -> None:
        with pytest.raises(InputError, match="sparse rows"):
            AverageFuser([RelativeMap.from_dense(torch.full((5, 4), 0.25))], torch.arange(4))


class TestUnionVocab:
    def test_is_the_sum_over_the_union_by_main_token(self, smollm2, gemma, said) -> None:
        step = Ensemble([smollm2, gemma], fuser="union-vocab").fuser.step(said, [0.6, 0.4])
        probs = [torch.softmax(one.double(), -1) for one in said]
        moved = 0
        for row in range(3):
            want = defaultdict(float, {i: 0.6 * p for i, p in enumerate(probs[0][row].tolist())})
            for token in torch.nonzero(probs[1][row] > 1e-5).flatten().tolist():
                share = 0.4 * float(probs[1][row, token])
                if token in gemma.eos_ids:
                    want[smollm2.eos_ids[0]] += share
                    continue
                data = gemma.vocabulary.tokens[token]
                if not data:
                    continue
                try:
                    main = first_token(smollm2, data)
                except UnicodeDecodeError:
                    continue
                moved += smollm2.vocabulary.tokens[main] != data
                want[main] += share
            fused = torch.softmax(step.logits[row].double(), -1)
            for token, value in sorted(want.items(), key=lambda one: -one[1])[:20]:
                assert float(fused[token]) == pytest.approx(value, abs=2e-3)
        assert moved > 5  # tokens that SmolLM2 has to spell in several

    def test_the_table_is_the_single_look_ups(self, smollm2, gemma) -> None:
        bridge = TokenBridge([smollm2.vocabulary, gemma.vocabulary], [smollm2.eos_ids, gemma.eos_ids])
        table = bridge.table(1, 0)
        tokens = [*gemma.eos_ids, *range(0, gemma.vocab_size, 997)]
        assert [int(table[token]) for token in tokens] == [bridge.first(1, token, 0) for token in tokens]
        assert (table >= 0).float().mean() > 0.95

    def test_of_equal_tokens_the_one_that_the_tokenizer_gives(self, smollm2, gemma) -> None:
        """Gemma has `1` and the byte token <0x31>, which no text of its own ever holds."""
        bridge = TokenBridge([gemma.vocabulary, smollm2.vocabulary], [gemma.eos_ids, smollm2.eos_ids])
        for text in ("1", "a", "\n", ","):
            (theirs,), (ours,) = smollm2.vocabulary.encode(text), gemma.vocabulary.encode(text)
            assert gemma.vocabulary.tokens.count(text.encode()) == 2
            assert bridge.first(1, theirs, 0) == ours == int(bridge.table(1, 0)[theirs])

    @pytest.mark.parametrize("spaces", [3, 5, 8, 17])
    def test_a_run_of_spaces_is_what_the_other_begins_the_text_with(
        self, smollm2, gemma, spaces: int
    ) -> None:
        """SmolLM2 leaves the last space to the word after it, Gemma does not."""
        bridge = TokenBridge([smollm2.vocabulary, gemma.vocabulary], [smollm2.eos_ids, gemma.eos_ids])
        text = "x" + " " * spaces + "y"
        left, whole = (member.vocabulary.encode(text)[1] for member in (smollm2, gemma))
        assert smollm2.vocabulary.bytes_of(left) == b" " * (spaces - 1)
        assert gemma.vocabulary.bytes_of(whole) == b" " * spaces
        assert bridge.first(0, left, 1) == whole == int(bridge.table(0, 1)[left])
        assert bridge.first(1, whole, 0) == left == int(bridge.table(1, 0)[whole])

    def test_spaces_by_their_bytes_between_tokenizers_of_one_kind(self, smollm2, tiny_smollm2, gemma) -> None:
        bridge = TokenBridge([smollm2.vocabulary, tiny_smollm2.vocabulary, gemma.vocabulary], [[], [], []])
        run, one = (smollm2.vocabulary.encode(text)[1] for text in ("x     y", "x  y"))
        assert tiny_smollm2.vocabulary.bytes_of(bridge.first(0, run, 1)) == b"    "
        assert gemma.vocabulary.bytes_of(bridge.first(0, one, 2)) == b" "  # may stand before a digit

    def test_bytes_that_are_no_character(self, smollm2, gemma) -> None:
        bridge = TokenBridge([smollm2.vocabulary, gemma.vocabulary], [smollm2.eos_ids, gemma.eos_ids])
        byte = gemma.vocabulary.tokens.index(b"\xf0")
        found = bridge.first(1, byte, 0)
        assert smollm2.vocabulary.bytes_of(found) == b"\xf0"
        for data, begins in ((b"\xe2\x80", b"\xe2"), (b"\xd0\xbe\xd0", b"\xd0\xbe")):
            part = smollm2.vocabulary.tokens.index(data)
            assert data not in gemma.vocabulary.tokens
            assert gemma.vocabulary.bytes_of(bridge.first(0, part, 1)) == begins

    def test_the_longest_beginning_of_bytes_that_are_no_character(self) -> None:
        whole = "".join(BYTE_TO_CHAR[byte] for byte in "🙂".encode())
        members = []
        for longest in (3, 2):
            tokenizer = one_byte_tokens()
            vocab = tokenizer.get_vocab() | {whole[:n]: 300 + n for n in range(2, longest + 1)}
            tokenizer.model = BPE(vocab, [(whole[: n - 1], whole[n - 1]) for n in range(2, longest + 1)])
            members.append(Vocabulary.from_tokenizer(tokenizer, name="parts"))
        assert members[0].bytes_of(303) == "🙂".encode()[:3]
        assert TokenBridge(members, [[], []]).first(0, 303, 1) == 302

    def test_other_runs_than_of_spaces_by_their_bytes(self, smollm2, gemma) -> None:
        bridge = TokenBridge([smollm2.vocabulary, gemma.vocabulary], [[], []])
        for run in (b"\n\n", b"\n\n\n", b"\t\t"):
            theirs, ours = (one.vocabulary.tokens.index(run) for one in (smollm2, gemma))
            assert gemma.vocabulary.bytes_of(bridge.first(0, theirs, 1)) == run
            assert smollm2.vocabulary.bytes_of(bridge.first(1, ours, 0)) == run

    def test_every_end_of_text_is_the_others_first_one(self, smollm2, gemma) -> None:
        vocabularies = [smollm2.vocabulary, gemma.vocabulary]
        bridge = TokenBridge(vocabularies, [[2, 0], [1, 106]])
        assert [bridge.first(1, token, 0) for token in (1, 106)] == [2, 2]
        assert bridge.table(1, 0)[[1, 106]].tolist() == [2, 2]
        for ends in ([[2], []], [[], [1]]):  # the table is kept, but not whose ends were in it
            other = TokenBridge(vocabularies, ends)
            assert other.first(1, 1, 0) == int(other.table(1, 0)[1]) == -1

    def test_between_any_two_of_three(self, smollm2, gemma) -> None:
        """The same ids are other texts of other members."""
        bytes_alone = Vocabulary.from_tokenizer(one_byte_tokens(), name="bytes")
        vocabularies = [smollm2.vocabulary, gemma.vocabulary, bytes_alone]
        bridge = TokenBridge(vocabularies, [[], [], []])
        tokens = range(40, 60)
        for source, target in itertools.permutations(range(3), 2):
            pair = TokenBridge([vocabularies[source], vocabularies[target]], [[], []])
            want = [pair.first(0, token, 1) for token in tokens]
            assert [bridge.first(source, token, target) for token in tokens] == want
            assert bridge.table(source, target)[40:60].tolist() == want


class TestMapped:
    """What is made of an assistant's distribution in the main model's tokens, in float64 by the table."""

    @pytest.fixture
    def spread(self, smollm2, gemma, said) -> list[torch.Tensor]:
        """The two distributions over SmolLM2's tokens; one token is impossible for SmolLM2."""
        said[0][:, smollm2.vocabulary.encode("\n")[0]] = -torch.inf
        table = TokenBridge([smollm2.vocabulary, gemma.vocabulary], [smollm2.eos_ids, gemma.eos_ids]).table(
            1, 0
        )
        main, other = (one.double().softmax(-1) for one in said)
        return [main, torch.zeros_like(main).index_add_(1, table[table >= 0], other[:, table >= 0])]

    def test_product(self, smollm2, gemma, said, spread) -> None:
        main, other = spread
        fuser = Ensemble([smollm2, gemma], fuser="product").fuser
        step = fuser.step(said, [0.6, 0.4])
        want = (0.6 * main.log() + 0.4 * (other + 1e-4 * main).log()).log_softmax(-1)
        forbidden = main == 0
        assert float(other[1, forbidden[1]].sum()) > 0.5  # what Gemma says there is lost
        assert int((other[~forbidden] < 1e-5 * main[~forbidden]).sum()) > 100  # of which the floor is most
        found = step.logits.double().log_softmax(-1)
        assert bool((found[forbidden] == -torch.inf).all())
        torch.testing.assert_close(found[~forbidden], want[~forbidden], atol=2e-3, rtol=0)
        assert torch.equal(step.chosen.long(), want.argmax(-1))
        assert bool((fuser.step(said, [0.0, 1.0]).logits[forbidden] == -torch.inf).all())

    def test_consistent(self, smollm2, gemma, said, spread) -> None:
        """The mean is of who has a weight."""
        main, other = spread
        fuser = Ensemble([smollm2, gemma, gemma], fuser="consistent").fuser
        step = fuser.step([*said, said[1]], [[0.5, 0.3, 0.2], [0.625, 0.375, 0.0], [0.625, 0.375, 0.0]])
        for row, weights in enumerate(([0.5, 0.5], [0.625, 0.375], [0.625, 0.375])):
            members = 3 if row == 0 else 2
            mean = (main[row] + (members - 1) * other[row]) / members
            near = ((-2 * (other[row] - mean).abs()).exp() - math.exp(-2)) / (1 - math.exp(-2))
            want = weights[0] * main[row] + weights[1] * near * other[row]
            assert float((near * other[row]).sum()) < 0.95
            torch.testing.assert_close(
                step.logits[row].double().softmax(-1), want / want.sum(), atol=1e-4, rtol=0
            )


def test_a_product_with_a_silent_member_and_a_main_model_that_is_sure(one_byte_folders) -> None:
    """What is left of the main model's smallest probabilities is too small a number: 0 times -inf is NaN."""
    first, second = load_members(one_byte_folders)
    fuser = Ensemble([first, second, second], fuser="product", cache=False).fuser
    main, other = torch.zeros(2, first.vocab_size), torch.zeros(1, first.vocab_size)
    main[:, 70] = 97.0
    step = fuser.step([main, other.repeat(2, 1), other], [0.4, 0.3, 0.3], rows=[None, None, [0]])
    assert not bool(step.logits.isnan().any())
    assert step.chosen.tolist() == [70, 70]


@pytest.mark.parametrize("name", ["union-vocab", "consistent", "follow"])
def test_what_the_main_model_has_no_token_for(one_byte_folders, name) -> None:
    """The member with the only say would write a special token of its own."""
    first, second = load_members(one_byte_folders)
    vocabulary = copy(second.vocabulary)
    vocabulary.tokens = [None if i == 70 else text for i, text in enumerate(vocabulary.tokens)]
    pair = Ensemble([first, replace(second, vocabulary=vocabulary)], fuser=name, cache=False)
    main, other = torch.zeros(2, first.vocab_size), torch.zeros(2, first.vocab_size)
    other[1, 70] = 200.0
    with pytest.raises(InputError, match=r"row 1: \S+ has no token for what .*give \S+ a weight of its own"):
        pair.fuser.step([main, other], [0.0, 1.0])
    assert pair.fuser.step([main[:1], other[:1]], [0.0, 1.0]).logits.isfinite().any()


@pytest.mark.parametrize("candidates", [1, 128])
def test_union_topk_with_a_member_that_names_nothing_but_a_special_token(
    one_byte_folders: list[Path], candidates: int
) -> None:
    """It has nothing of the union, which is empty where it alone has a say and names one token."""
    first, second = load_members(one_byte_folders)
    vocabulary = copy(second.vocabulary)
    vocabulary.tokens = [None if i == 70 else text for i, text in enumerate(vocabulary.tokens)]
    members = [first, replace(second, vocabulary=vocabulary)]
    fuser = Ensemble(members, fuser="union-topk", cache=False, candidates=candidates).fuser
    main, other = torch.zeros(1, first.vocab_size), torch.full((1, first.vocab_size), -torch.inf)
    main[0, 20], other[0, 70] = 9.0, 0.0
    step = fuser.step([main, other], [0.5, 0.5])
    torch.testing.assert_close(step.logits, main)
    assert step.chosen.tolist() == [20]
    if candidates == 1:
        assert torch.equal(fuser.step([main, other], [0.0, 1.0]).logits, main)
    else:  # the others that it names it finds impossible
        with pytest.raises(InputError, match="has no token"):
            fuser.step([main, other], [0.0, 1.0])


def test_indents_of_python(gemma: Member) -> None:
    """They came out a space short: 11, 7 and 3."""
    qwen = load_member("demo:qwen2.5-coder-0.5b-instruct", backend="transformers")
    pair = Ensemble([gemma, qwen], fuser="union-vocab")
    prompt = "def count(words):\n    found = {}\n    for word in words:\n        if word in found:"
    for weights in ([0.5, 0.5], [0.05, 0.95]):
        text = pair.variant(weights=weights).generate(prompt, max_new_tokens=24).text
        indents = [len(line) - len(line.lstrip(" ")) for line in text.split("\n")[1:]]
        assert indents[:3] == [12, 8, 12]


class TestUnionTopk:
    def oracle(self, members, logits, weights) -> dict[int, float]:
        """UniTE, section 4, for one row: the union's distribution by main token."""
        ends = object()

        def key(member, token):
            return ends if token in member.eos_ids else member.vocabulary.tokens[token]

        union = []
        for member, one in zip(members, logits, strict=True):
            for token in one.topk(10).indices.tolist():
                if key(member, token) not in [*union, None, b""]:
                    union.append(key(member, token))
        average = dict.fromkeys(range(len(union)), 0.0)
        for member, one, weight in zip(members, logits, weights, strict=True):
            taken, scores = set(), []
            for text in union:
                token = member.eos_ids[0] if text is ends else first_token(member, text)
                scores.append(-math.inf if token in taken else float(one[token]))
                taken.add(token)
            for i, share in enumerate(torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()):
                average[i] += weight * share
        by_main: dict[int, float] = defaultdict(float)
        for i, text in enumerate(union):
            by_main[members[0].eos_ids[0] if text is ends else first_token(members[0], text)] += average[i]
        return by_main

    def test_is_unite(self, smollm2, gemma, said) -> None:
        """Also of two texts that are one token of SmolLM2, and of a special token, which is none of them."""
        members, weights = [smollm2, gemma], [0.6, 0.4]
        special = next(i for i, one in enumerate(gemma.vocabulary.tokens) if one is None)
        assert special not in gemma.eos_ids
        assert first_token(smollm2, b" soiled") == first_token(smollm2, b" soil")
        said[0][0, first_token(smollm2, b" soil")] = 24.0
        for i, token in enumerate((first_token(gemma, b" soiled"), first_token(gemma, b" soil"), special)):
            said[1][0, token] = 23.0 + i
        step = Ensemble(members, fuser="union-topk").fuser.step(said, weights)
        for row in range(3):
            try:
                want = self.oracle(members, [one[row] for one in said], weights)
            except UnicodeDecodeError:
                pytest.fail("choose another seed: a top token is part of a character")
            ids = torch.tensor(sorted(want))
            fused, own = step.logits[row].double(), said[0][row].double()
            shares = torch.softmax(fused[ids], 0)
            torch.testing.assert_close(
                shares, torch.tensor([want[i] for i in ids.tolist()], dtype=torch.float64), atol=1e-5, rtol=0
            )
            # The union's mass is the main model's, and everything else stays as it is.
            assert float(fused[ids].logsumexp(0)) == pytest.approx(float(own[ids].logsumexp(0)), abs=1e-4)
            rest = torch.ones_like(own, dtype=torch.bool).index_fill(0, ids, False)
            assert torch.equal(fused[rest], own[rest])
            assert int(step.chosen[row]) == max(want, key=want.__getitem__)
            assert (shares - torch.softmax(own[ids], 0)).abs().max() > 0.01

    def test_what_a_member_without_weight_says_is_not_in_the_union(self, smollm2, gemma, said) -> None:
        pair, three = (Ensemble([smollm2, *[gemma] * n], fuser="union-topk").fuser for n in (1, 2))
        want = pair.step(said, [0.6, 0.4])
        found = three.step([*said, said[1].roll(1, dims=0)], [0.6, 0.4, 0.0])
        assert torch.equal(found.logits, want.logits)


class TestSingle:
    def test_is_the_main_model_alone(self, smollm2, gemma) -> None:
        alone = Ensemble([gemma], fuser="single")
        result = alone.generate(PROMPT, max_new_tokens=8)
        ids = torch.tensor([gemma.vocabulary.prefix_ids + gemma.vocabulary.encode(PROMPT)])
        want = gemma.model.generate(
            ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        assert result.token_ids == want[0, ids.shape[1] :].tolist()
        assert result.changed_tokens == 0
        assert set(result.timings.members_ms) == {gemma.name}
        assert Ensemble([gemma, smollm2], fuser="single").members == [gemma]

    def test_others_need_two(self, gemma) -> None:
        with pytest.raises(InputError, match="two or more members, not 1"):
            Ensemble([gemma], fuser="average")


class TestFunction:
    def test_is_called_with_what_the_members_say(self, smollm2, gemma, said) -> None:
        seen = []

        def mine(logits, parts, weights):
            seen.append((logits.shape, [one.name for one in parts], weights.tolist()))
            probs = [one.probabilities() for one in parts]
            assert [tuple(one.shape) for one in probs] == [(2, smollm2.vocab_size), (2, gemma.vocab_size)]
            torch.testing.assert_close(probs[1][1], torch.softmax(said[1][2], -1))
            assert float(probs[1][0].sum()) == pytest.approx(1, abs=1e-3)
            return torch.where(torch.arange(logits.shape[1]) == 7, 99.0, logits)

        ensemble = Ensemble([smollm2, gemma], fuser=mine)
        assert ensemble.method.endswith("mine")
        step = ensemble.fuser.step([said[0], said[1][[1, 2]]], [0.7, 0.3], rows=[None, [1, 2]])
        ((shape, names, weights),) = seen
        assert shape == (2, smollm2.vocab_size)
        assert names == [f"logits of {smollm2.name}", f"logits of {gemma.name}"]
        assert weights == [[pytest.approx(0.7), pytest.approx(0.3)]] * 2
        assert step.chosen[1:].tolist() == [7, 7]
        assert torch.equal(step.logits[0], said[0][0])  # no assistant spoke

    def test_on_main(self, smollm2, gemma, said) -> None:
        """A weighted sum of what they say on the main model's tokens is the fuser `union-vocab`."""

        def mean(logits, said, weights):
            return sum(one.on_main() * weights[:, [i]] for i, one in enumerate(said)).log()

        ensemble = Ensemble([smollm2, gemma], fuser=mean)
        given = {"weights": [[0.8, 0.2], [0.4, 0.6], [0.5, 0.5]], "rows": [None, [0, 2]]}
        step = ensemble.fuser.step([said[0], said[1][[0, 2]]], **given)
        want = ensemble.variant(fuser="union-vocab").fuser.step([said[0], said[1][[0, 2]]], **given)
        torch.testing.assert_close(step.logits, want.logits)
        assert not torch.equal(step.logits[0], said[0][0])

    def test_may_write_to_its_weights(self, one_byte_folders: list[Path]) -> None:
        """The second step had what the first had made of them."""
        seen = []

        def mine(logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
            seen.append(weights.tolist())
            weights[:, 1] /= 2
            return logits

        fuser = Ensemble(load_members(one_byte_folders), fuser=mine).fuser
        logits = [torch.zeros(1, size) for size in fuser.vocab_sizes]
        steps = [fuser.step(logits, [0.5, 0.5]) for _ in range(2)]
        assert seen == [[[0.5, 0.5]]] * 2
        assert [one.shares for one in steps] == [[(0.5, 0.5)]] * 2

    def test_on_main_in_a_class(self, smollm2, gemma, said) -> None:
        """Who makes a class of a function is told what stands in its place."""
        fuser = Ensemble([smollm2, gemma], fuser="union-vocab").fuser
        one = fuser.part(0, Distribution(smollm2.name, smollm2.vocab_size, 8, said[0]))
        with pytest.raises(InputError, match=r"make the class a MappedFuser, with mapped\(one\)"):
            Said(0, smollm2.name, one.topk, one, None).on_main()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (lambda z, *_: z[:, :5], r"gave \[2, 5\]; it must return logits of shape \[2, 30\]"),
            (lambda *_: None, "gave NoneType"),
            (lambda z, *_: z * float("nan"), "gave NaN"),
        ],
    )
    def test_what_it_gives_is_checked(self, given, message) -> None:
        fuser = FunctionFuser(given, [30, 40], TokenBridge([], []), torch.device("cpu"))
        with pytest.raises(InputError, match=message):
            fuser.step([torch.randn(2, 30), torch.randn(2, 40)], [0.5, 0.5])


@pytest.mark.parametrize("fuser", EVERY)
class TestEvery:
    def test_rows_are_fused_as_they_are_alone(self, smollm2, gemma, said, fuser) -> None:
        """Each with its own weights, and with an assistant that speaks for some of them."""
        one = Ensemble([smollm2, gemma], fuser=fuser, recipe="bytes").fuser
        weights = [[0.8, 0.2], [0.4, 0.6], [0.5, 0.5]]
        step = one.step([said[0], said[1][[0, 2]]], weights, rows=[None, [0, 2]])
        assert [len(shares) for shares in step.shares] == [2, 0, 2]
        for row in (0, 2):
            alone = one.step([logits[row : row + 1] for logits in said], weights[row])
            torch.testing.assert_close(step.logits[row], alone.logits[0], atol=1e-4, rtol=1e-5)
            assert int(step.chosen[row]) == int(alone.chosen) == int(step.logits[row].argmax())
            assert not torch.equal(step.logits[row], said[0][row])
        assert torch.equal(step.logits[1], said[0][1])
        assert torch.equal(said[0], said[0].clone())

    def test_writes_a_text(self, smollm2, gemma, fuser) -> None:
        result = Ensemble([smollm2, gemma], fuser=fuser, recipe="bytes").generate(PROMPT, max_new_tokens=6)
        assert "Paris" in result.text

    def test_surer_members_count_more(self, smollm2, gemma, said, fuser) -> None:
        """With confidence a step is the plain one with the weights scaled by hand."""
        base = Ensemble([smollm2, gemma], fuser=fuser, recipe="bytes")
        said[1][1] /= 4  # Gemma is not sure of anything there
        step = base.variant(confidence=0.7).fuser.step(said, [0.6, 0.4])
        entropies = []
        for one in said:
            probs = torch.softmax(one.double(), -1).topk(128).values
            each = (1 - probs.sum(-1, keepdim=True)).expand(-1, 128) / 128  # the tail, as 128 tokens
            spread = torch.cat([probs, each], 1)
            entropies.append(-(spread * spread.log()).sum(-1))
        raised = torch.tensor([0.6, 0.4]) * torch.exp(-0.7 * torch.stack(entropies, 1))
        weights = (raised / raised.sum(1, keepdim=True)).tolist()
        assert weights[1][1] < 0.1 < weights[0][1]
        assert torch.allclose(torch.tensor(step.shares), torch.tensor(weights).float(), atol=1e-4)
        want = base.fuser.step(said, weights)
        torch.testing.assert_close(step.logits, want.logits, atol=1e-3, rtol=1e-3)

    def test_weight_on_the_main_model_alone(self, smollm2, gemma, said, fuser) -> None:
        one = Ensemble([smollm2, gemma], fuser=fuser, recipe="bytes").fuser
        assert torch.equal(one.step(said, [1.0, 0.0]).logits, said[0])


def test_weights_that_a_graph_reads_are_kept(one_byte_folders, monkeypatch) -> None:
    """As long as the fuser, also where they are captured again; those of other steps come and go."""
    fuser = Ensemble(load_members(one_byte_folders), fuser="union-vocab").fuser
    own = ((0.25, 0.75),)
    kept = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("deepen_ext.fusers.base._in_a_graph", lambda _: True)
            kept.append(fuser._share(own))
        for i in range(600):
            fuser._share(((i / 1000, 1 - i / 1000),))
    assert kept[0] is kept[1] is fuser._share(own)
    assert len(fuser._shares) < 300


def test_three_members(smollm2, gemma, said) -> None:
    members = [smollm2, gemma, smollm2]
    logits = [*said, peaked(3, smollm2.vocab_size, 5)]
    trio = Ensemble(members, recipe="bytes")
    for fuser in EVERY:
        one = trio.variant(fuser=fuser).fuser
        step = one.step(logits, [0.4, 0.3, 0.3])
        assert step.logits.isfinite().all()
        assert not torch.equal(step.logits, one.step(logits, [0.4, 0.6, 0.0]).logits)


def test_the_certified_skip_is_of_the_inverse_search(smollm2, gemma) -> None:
    with pytest.raises(InputError, match=r"certified_skip bounds the inverse search, which average has not"):
        Ensemble([smollm2, gemma], fuser="average").generate(PROMPT, certified_skip=True)


def test_by_name(tmp_path, monkeypatch) -> None:
    assert parse_fuser("deepen", "paper") == ("deepen", "paper")
    assert parse_fuser("deepen:bytes", "paper") == ("deepen", "bytes")
    assert parse_fuser("average", "paper") == ("average", "paper")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_fusers_xyz.py").write_text(
        "def keep(logits, said, weights):\n    return logits\nnumber = 3\n"
    )
    (tmp_path / "my_broken_xyz.py").write_text("ensemble = ensemble.variant(fuser=keep)\n")
    function, _ = parse_fuser("my_fusers_xyz:keep", "bytes")
    assert callable(function)
    for spec, message in (
        ("no-such", "use one of auto, deepen, average"),
        ("my_fusers_xyz:missing", "no attribute 'missing'"),
        ("no_such_module_xyz:f", "No module named"),
        ("my_fusers_xyz:number", "is 3; name a function"),
        ("my_broken_xyz:f", "my_broken_xyz cannot be imported: NameError: name 'ensemble'"),
    ):
        with pytest.raises(InputError, match=message):
            parse_fuser(spec, "bytes")


def test_a_function_that_takes_other_arguments() -> None:
    paths = ["/no/such/main", "/no/such/assistant"]  # it is said before they are looked for
    with pytest.raises(InputError, match=r"takes \(logits\), but is called with \(logits, said, weights\)"):
        Ensemble.from_pretrained(paths, fuser=lambda logits: logits)
    for fitting in (lambda *parts: parts[0], lambda logits, said, weights, more=1: logits):
        with pytest.raises(InputError, match="no such file"):
            Ensemble.from_pretrained(paths, fuser=fitting)


def test_confidence_out_of_range(smollm2, gemma) -> None:
    with pytest.raises(InputError, match="confidence is -1; choose 0 to 10"):
        Ensemble([smollm2, gemma], recipe="bytes", confidence=-1)


def test_names_that_are_none(smollm2, gemma) -> None:
    with pytest.raises(InputError, match="fuser is 'mean'; use one of auto, deepen, average"):
        Ensemble([smollm2, gemma], fuser="mean")
    with pytest.raises(InputError, match="union-topk has no relative space"):
        _ = Ensemble([smollm2, gemma], fuser="union-topk").anchors


def test_a_variant_shares_what_stays_the_same(smollm2, gemma) -> None:
    base = Ensemble([smollm2, gemma], recipe="bytes")
    before = base.weights
    slower = base.variant(learning_rate=0.4, weights=[0.7, 0.3])
    assert isinstance(slower.fuser, DeepenFuser)
    assert (slower.fuser.learning_rate, slower.weights) == (0.4, [0.7, 0.3])
    maps = list(map(id, base.maps))  # `maps` is a list of its own at each call
    assert list(map(id, slower.maps)) == maps
    assert list(map(id, base.variant(fuser="average").maps)) == maps
    assert not {id(one) for one in base.variant(entries=16).maps} & set(maps)
    without = base.variant(fuser="union-topk")
    assert isinstance(without.fuser, UnionTopkFuser)
    assert without.maps == []
    with pytest.raises(InputError, match="union-topk has no relative space"):
        _ = without.anchors
    assert list(map(id, without.variant(fuser="deepen").maps)) == maps
    assert base.weights == before
    with pytest.raises(InputError, match="speed: no setting of an ensemble; there are weights"):
        base.variant(speed=3)
