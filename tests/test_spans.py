"""AdaFuse's spans: against the rule written out over whole forward passes, and what ends a text."""

from __future__ import annotations

import codecs
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import changed, on_fixed_buffers
from tiny_models import one_byte_tokens, save_model

from deepen_ext import Ensemble, InputError
from deepen_ext.decoding.generation import BatchGeneration
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.decoding.spans.next_word import LONGEST, NextWord
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.measure.tuning.tune import tune
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

PROMPTS = [
    "The capital of France is",
    "日本の",
    "Once",
    "🙂🙃 and 🦙",
    "Antarctica's straw",
]
NEW: dict[str, Any] = {"max_new_tokens": 14}


def ending(member: Member, prompt: str) -> Member:
    """The same, but it finds the end of this text a little more probable than any word."""
    model = copy.deepcopy(member.model)
    ids = torch.tensor([member.vocabulary.prefix_ids + member.vocabulary.encode(prompt)])
    head = model.get_output_embeddings().weight.data
    head[member.eos_ids[0]] = 1.02 * head[int(model(ids).logits[0, -1].argmax())]
    return changed(member, model=model)


@pytest.fixture(scope="module")
def members(tiny_smollm2: Member, tiny_gemma: Member) -> tuple[Member, Member]:
    return tiny_smollm2, tiny_gemma


@pytest.fixture(scope="module")
def pair(members: tuple[Member, Member]) -> Ensemble:
    return Ensemble(members, fuser="spans", weights=[0.4, 0.6])


class Oracle:
    """The rule over whole forward passes: no caches, no batches, every text encoded anew."""

    def __init__(self, ensemble: Ensemble, margin: float) -> None:
        self.ensemble = ensemble
        self.margin = margin
        self.said: dict[Any, torch.Tensor] = {}
        self.ends = 0  # times that somebody proposed to end the text, and somebody else to go on
        self.taken = [0] * len(ensemble.members)  # words that only one member, or a later one, had

    def log_probs(self, member: Member, ids: Sequence[int], count: int = 1) -> torch.Tensor:
        """After each of the last ids."""
        key = id(member), tuple(ids), count
        if key not in self.said:
            logits = member.model(torch.tensor([list(ids)]), logits_to_keep=count).logits[0]
            self.said[key] = logits.index_fill(1, member.unwritable(), -math.inf).log_softmax(-1)
        return self.said[key]

    def word(self, member: Member, ids: Sequence[int]) -> tuple[list[int], bytes] | None:
        new: list[int] = []
        pieces = member.vocabulary
        while len(new) < LONGEST:
            token = int(self.log_probs(member, [*ids, *new])[-1].argmax())
            if token in member.eos_ids:
                if not new:
                    return None
                break
            before, after = (pieces.decode(own, continues=True) for own in (new, [*new, token]))
            if before.strip() and pieces.bytes_of(token)[:1].isspace():
                break
            new.append(token)
            if len(after.split()) > 1 or (after.strip() and after[-1:].isspace()):
                break
        while new:
            try:
                pieces.decode(new, continues=True).decode()
                break
            except UnicodeDecodeError:
                new.pop()
        return new, pieces.decode(new, continues=True)

    def read(self, member: Member, text: str) -> list[int]:
        return member.vocabulary.prefix_ids + member.vocabulary.encode(text)

    def write(self, prompt: str, count: int) -> tuple[list[int], str]:
        main = self.ensemble.members[0]
        start = self.read(main, prompt)
        ids, data = list(start), prompt.encode()
        while len(ids) - len(start) < count:
            own = self.log_probs(main, ids)[-1]
            first, second = own.exp().topk(2).values.tolist()
            new = [int(own.argmax())]
            if first - second < self.margin and not self.unfinished(data):
                new = self.span(ids, data.decode(errors="replace"), own) or new
            for token in new[: count - len(ids) + len(start)]:
                ids.append(token)
                if token in main.eos_ids:
                    return ids[len(start) :], "eos"
                data += main.vocabulary.bytes_of(token)
        return ids[len(start) :], "length"

    def unfinished(self, data: bytes) -> bool:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(data)
        return bool(decoder.getstate()[0])

    def span(self, ids: list[int], text: str, own: torch.Tensor) -> list[int] | None:
        main, *others = self.ensemble.members
        words = [self.word(main, ids), *(self.word(one, self.read(one, text)) for one in others)]
        if words[0] is not None and not words[0][0]:
            return None
        proposals: list[str | None] = []  # None: the end
        for word in words:
            proposed = None if word is None else word[1].decode()
            if proposed not in proposals and proposed != "":
                proposals.append(proposed)
        self.ends += None in proposals and len(proposals) > 1
        spelt = []
        for i, proposed in enumerate(proposals):
            if proposed is None:
                spelt.append([main.eos_ids[int(own[list(main.eos_ids)].argmax())]])
            elif i == 0:
                assert words[0] is not None
                spelt.append(words[0][0])
            else:
                spelt.append(main.vocabulary.encode_part(proposed, 1)[0])
        totals = [0.0] * len(proposals)
        for member, weight in zip(self.ensemble.members, self.ensemble.weights, strict=True):
            before = ids if member is main else self.read(member, text)
            after = []
            for proposed, new in zip(proposals, spelt, strict=True):
                longer = [*ids, *new] if member is main else self.read(member, text + (proposed or ""))
                end = proposed is None and member is not main
                after.append([*longer, member.eos_ids[0]] if end else longer)
            same = min(
                next(
                    (i for i, pair in enumerate(zip(before, one, strict=False)) if pair[0] != pair[1]),
                    len(before),
                )
                for one in after
            )
            same = max(same, 1)
            for i, one in enumerate(after):
                said = self.log_probs(member, one[:-1], len(one) - same)
                each = [float(said[at - same, one[at]]) for at in range(same, len(one))]
                if one[-1] in member.eos_ids:
                    each[-1] = float(said[-1, list(member.eos_ids)].logsumexp(-1))
                totals[i] += weight * sum(each) / len(each)
        best = totals.index(max(totals))
        self.taken[min(best, len(self.taken) - 1)] += len(proposals) > 1
        return spelt[best]


@pytest.mark.parametrize(("order", "margin"), [((0, 1), 0.7), ((1, 0), 1.0), ((0, 1, 0), 0.7)], ids=str)
def test_is_the_rule(members: tuple[Member, Member], order: tuple[int, ...], margin: float) -> None:
    weights = [0.35, 0.65] if len(order) == 2 else [0.3, 0.5, 0.2]
    ensemble = Ensemble(
        [members[i] for i in order], fuser="spans", weights=weights, margin=margin, boundary_aware=False
    )
    oracle = Oracle(ensemble, margin)
    found = ensemble.generate(PROMPTS, **NEW)
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids, reason = oracle.write(prompt, NEW["max_new_tokens"])
        assert one.token_ids == ids, prompt
        assert one.finish_reason == reason
    assert min(oracle.taken[:2]) > 3  # both members' words were taken
    alone = Ensemble([members[order[0]]], fuser="single").generate(PROMPTS, **NEW)
    assert [one.token_ids for one in found] != [one.token_ids for one in alone]


def test_the_end_of_the_text_is_proposed_like_a_word(members: tuple[Member, Member]) -> None:
    ended = set()
    for which in range(2):
        own = [ending(one, "Once") if i == which else one for i, one in enumerate(members)]
        for weights in ([0.9, 0.1], [0.1, 0.9]):
            ensemble = Ensemble(own, fuser="spans", weights=weights, boundary_aware=False)
            oracle = Oracle(ensemble, 0.7)
            found = ensemble.generate("Once", max_new_tokens=6)
            assert (found.token_ids, found.finish_reason) == oracle.write("Once", 6)
            assert oracle.ends > 0
            ended.add(len(found.token_ids) == 1)
    assert ended == {True, False}


def test_the_end_of_a_word() -> None:
    def word(*tokens: bytes) -> bytes:
        own = NextWord()
        for i, token in enumerate(tokens):
            if not own.add(i, token):
                break
        return own.data

    assert word(b" straw", b"berries", b" are") == b" strawberries"
    assert word(b"\n", b"\n", b"The", b" end") == b"\n\nThe"
    assert word(b"done", b".\n", b"Next") == b"done.\n"
    assert word(b" a b", b"c") == b" a b"
    assert word(*[b"x"] * 20) == b"x" * LONGEST
    assert word(b"no", b"") == b"no"
    assert word("日".encode()[:2], "日".encode()[2:], b" ") == "日".encode()


def test_equal_members_write_what_one_writes(tmp_path: Path) -> None:
    """Of a tokenizer with one way to spell a text: otherwise an assistant reads its own spelling."""
    one = load_member(save_model(tmp_path, one_byte_tokens(), seed=3))
    head = one.model.get_output_embeddings().weight.data
    head[[i for i, data in enumerate(one.vocabulary.tokens) if data and data[0] > 127]] = (
        0  # no half characters
    )
    prompts = ["The capital of France is", "Once", "def f(x):"]
    want = Ensemble([one], fuser="single").generate(prompts, max_new_tokens=40)
    records: list[dict[str, Any]] = []
    twins = Ensemble([one, changed(one, name="twin")], fuser="spans")
    found = twins.generate(prompts, max_new_tokens=40, trace=records.append)
    assert [each.token_ids for each in found] == [each.token_ids for each in want]
    assert sum(each.changed_tokens for each in found) == 0
    assert sum(each["draft"] == "stood" for each in records) > 20


def test_without_a_margin_the_main_model_writes_alone(members: tuple[Member, Member]) -> None:
    want = Ensemble(members[:1], fuser="single").generate(PROMPTS, **NEW)
    found = Ensemble(members, fuser="spans", margin=0.0).generate(PROMPTS, **NEW)
    assert [one.token_ids for one in found] == [one.token_ids for one in want]
    assert found.timings.members_ms[members[1].name] == 0


def test_a_batch_is_each_text_alone(pair: Ensemble) -> None:
    want = [pair.generate(one, **NEW) for one in PROMPTS]
    as_on_cuda = Ensemble(list(map(on_fixed_buffers, pair.members)), fuser="spans", weights=pair.weights)
    with SharedForwards() as shared:
        batches: list[BatchGeneration] = [
            pair.generate(PROMPTS, **NEW),
            pair.generate(PROMPTS, batch_size=2, **NEW),
            pair.generate(PROMPTS, shared=shared, **NEW),
            as_on_cuda.generate(PROMPTS, **NEW),
        ]
    for batch in batches:
        for one, alone in zip(batch, want, strict=True):
            assert (one.token_ids, one.text, one.changed_tokens) == (
                alone.token_ids,
                alone.text,
                alone.changed_tokens,
            )


def test_what_ends_a_text_ends_it_inside_of_a_word(pair: Ensemble) -> None:
    main = pair.members[0]
    inside = 0
    for prompt in PROMPTS:
        records: list[dict[str, Any]] = []
        whole = pair.generate(prompt, trace=records.append, **NEW)
        drafted = [one["draft"] == "stood" for one in records]
        for at in range(1, len(whole.token_ids), 4):
            before = main.vocabulary.decode(whole.token_ids[: at + 1], continues=True)
            stop = before.decode(errors="ignore")[-4:]
            if stop and before.decode(errors="replace").endswith(stop):
                found = pair.generate(prompt, stop_strings=[stop], **NEW)
                first = next(
                    i
                    for i in range(len(whole.token_ids))
                    if stop
                    in main.vocabulary.decode(whole.token_ids[: i + 1], continues=True).decode(
                        errors="replace"
                    )
                )
                assert found.token_ids == whole.token_ids[: first + 1]
                assert found.finish_reason == "stop_string"
                inside += drafted[first]
            length = pair.generate(prompt, max_new_tokens=at + 1)
            assert length.token_ids == whole.token_ids[: at + 1]
            assert whole.text.startswith(length.text.rstrip("\ufffd"))
    assert inside > 3
    token = next(one["token"]["id"] for one in records if one["draft"] == "stood")
    found = pair.generate(PROMPTS[-1], eos_token_id=[token], **NEW)
    assert found.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]
    assert found.finish_reason == "eos"


def test_the_trace_and_the_counts(pair: Ensemble) -> None:
    records: list[dict[str, Any]] = []
    found = pair.generate(PROMPTS, trace=records.append, **NEW)
    differ = [one for one in records if one["token"]["id"] != one["main_choice"]["id"]]
    assert 0 < len(differ) == sum(one.changed_tokens for one in found)
    assert all(one["not_asked"] is None for one in differ)
    assert {"sure", None} <= {one["not_asked"] for one in records}
    assert found.timings.stood <= found.timings.drafted
    assert all(ms > 0 for ms in found.timings.members_ms.values())
    pieces: list[str] = []
    text = pair.generate(PROMPTS[1], on_text=pieces.append, **NEW).text
    assert "".join(pieces) == text == found[1].text


def test_contexts_that_end(members: tuple[Member, Member]) -> None:
    """An assistant that needs more tokens for the text than the main model reaches its end first."""
    for i, j in ((0, 1), (1, 0)):
        narrow = []
        for one in (members[i], members[j]):
            longest = max(len(one.vocabulary.prefix_ids + one.vocabulary.encode(p)) for p in PROMPTS)
            narrow.append(changed(one, context_length=longest + NEW["max_new_tokens"]))
        wide = Ensemble([members[i], members[j]], fuser="spans", margin=1.0).generate(PROMPTS, **NEW)
        found = Ensemble(narrow, fuser="spans", margin=1.0).generate(PROMPTS, **NEW)
        for one, other in zip(found, wide, strict=True):
            assert one.finish_reason in ("context", "length", "eos")
            if one.finish_reason != "context":
                assert len(one.token_ids) == len(other.token_ids)


def test_a_word_may_end_where_the_main_models_context_does(tmp_path: Path) -> None:
    """Its last token is written and never read. So a text that just fits is the same as with room."""
    main, other = (
        load_member(save_model(tmp_path / str(seed), one_byte_tokens(), seed=seed)) for seed in (1, 2)
    )
    settings: dict[str, Any] = {"fuser": "spans", "margin": 1.0, "weights": [0.5, 0.5]}
    wide, changes = Ensemble([main, other], **settings), 0
    for prompt in ("hellos", "Xyz 12"):
        for count in range(8, 12):
            narrow = Ensemble([changed(main, context_length=len(prompt) + count), other], **settings)
            found, want = (
                one.generate(prompt, max_new_tokens=count, eos_token_id=[]) for one in (narrow, wide)
            )
            assert (found.token_ids, found.finish_reason) == (want.token_ids, "length"), (prompt, count)
            changes += found.changed_tokens
    assert changes > 5  # rivals of the main model's words were taken


def test_what_it_cannot_do_is_refused(pair: Ensemble) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"do_sample": True}, "and do_sample picks single tokens in another way"),
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor picks single tokens"),
        ({"draft": 3}, "fuser='spans' writes words, and has no drafts beside; set draft=0"),
        ({"draft": "auto"}, "set draft=0"),
        ({"certified_skip": True}, "which spans has not"),
    ]
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            pair.generate("Once", **settings)
    with pytest.raises(InputError, match=r"leave out confidence 0.5"):
        pair.variant(confidence=0.5)
    with pytest.raises(InputError, match="margin"):
        pair.variant(margin=1.5)
    with pytest.raises(InputError, match="has no likelihood to tune by"):
        tune(pair.members, [], fuser="spans")
    with (
        TextReading(pair.members, "Once", " upon a time.") as reading,
        pytest.raises(InputError, match="there is no likelihood"),
    ):
        reading.fused(pair)
