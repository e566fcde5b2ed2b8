"""Weights: given ones, and those from how well each member reads the prompt."""

from __future__ import annotations

import json
import math
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import open_session, sync
from tiny_models import one_byte_tokens, save_model
from torch.multiprocessing.reductions import StorageWeakRef
from typer.testing import CliRunner

from deepen_ext import Ensemble, InputError, load_members
from deepen_ext.commands.cli import app
from deepen_ext.commands.loading import load_ensembles, named_members
from deepen_ext.decoding import prompt_weights as prompt_weights_module
from deepen_ext.decoding.make_team import main_first
from deepen_ext.decoding.prompt_weights import (
    LEAST_WEIGHT,
    PROMPT_TOKENS,
    PromptScore,
    last_prompts,
    prompt_weights,
    read_prompts,
    tell_of_unequal,
)
from deepen_ext.decoding.shared_forwards import SharedForwards
from deepen_ext.decoding.watched_session import WatchedSession
from deepen_ext.fusers import FusionSettings
from deepen_ext.fusers.weights import main_by_size, weights_by_size
from deepen_ext.measure.doctor.diagnose import diagnose
from deepen_ext.members.member import Member
from deepen_ext.members.top_k_only import TopKOnly

CODE = (
    "def mean(values):\n    return sum(values) / len(values)\n\n\ndef median(values):\n    ordered = sorted("
)
FRENCH = "Il était une fois, dans un petit village au bord de la mer, un vieux pêcheur qui ne parlait"


class TestPromptScore:
    def test_counts_from_the_end_and_cuts_tokens(self) -> None:
        score = PromptScore([4, 2, 6], [-8.0, -1.0, -3.0])
        assert score.nbytes == 12
        assert score.nats(12) == pytest.approx(12)
        assert score.nats(8) == pytest.approx(4)
        assert score.nats(3) == pytest.approx(1.5)
        assert score.nats(10) == pytest.approx(3 + 1 + 4)


class TestPromptWeights:
    def test_better_readers_weigh_more(self) -> None:
        good, bad = PromptScore([10], [-5.0]), PromptScore([5, 5], [-5.0, -5.0])
        weights = prompt_weights([good, bad], [0.5, 0.5], sharpness=0.2)
        assert weights == pytest.approx([1 / (1 + math.exp(-1)), 1 - 1 / (1 + math.exp(-1))])
        assert prompt_weights([good, bad], [0.2, 0.8], sharpness=0) == pytest.approx([0.2, 0.8])
        assert sum(prompt_weights([good, bad, bad], [0.2, 0.4, 0.4], 8.0)) == pytest.approx(1)

    def test_an_assistant_below_the_least_weight_has_none(self) -> None:
        """The main model, whose tokens are written, keeps what it has."""
        good, fair, bad = (PromptScore([10], [-nats]) for nats in (1.0, 2.0, 6.0))
        assert prompt_weights([good, bad], [0.5, 0.5], 1.0) == [1.0, 0.0]
        main, assistant = prompt_weights([bad, good], [0.5, 0.5], 1.0)
        assert main == pytest.approx(1 / (1 + math.exp(5)))
        assert main + assistant == pytest.approx(1)
        three = prompt_weights([good, bad, fair], [0.2, 0.4, 0.4], 1.0)
        assert three == pytest.approx([1 / (1 + 2 / math.e), 0, 1 / (1 + math.e / 2)])
        just = 1.0 + math.log(0.99 / 0.011)
        assert prompt_weights([good, PromptScore([10], [-just])], [0.5, 0.5], 1.0)[1] > LEAST_WEIGHT

    def test_only_bytes_that_all_have_scored_count(self) -> None:
        """A member whose first token is not scored is compared on the rest."""
        long, short = PromptScore([10, 10], [-100.0, -5.0]), PromptScore([10], [-5.0])
        assert prompt_weights([long, short], [0.5, 0.5], 8.0) == pytest.approx([0.5, 0.5])

    def test_nothing_to_tell_by(self) -> None:
        assert prompt_weights([PromptScore([], []), PromptScore([3], [-1.0])], [0.3, 0.7], 8.0) == [0.3, 0.7]
        impossible = PromptScore([3], [-math.inf])
        assert prompt_weights([impossible, impossible], [0.3, 0.7], 8.0) == [0.3, 0.7]
        assert prompt_weights([impossible, PromptScore([3], [-9.0])], [0.3, 0.7], 8.0) == [0.0, 1.0]

    def test_who_starts_with_next_to_nothing_has_no_say_without_a_prompt_too(self) -> None:
        nothing = PromptScore([], [])
        assert prompt_weights([nothing] * 3, [0.5, 0.495, 0.005], 8.0) == pytest.approx(
            [0.5 / 0.995, 0.495 / 0.995, 0]
        )
        assert prompt_weights([nothing] * 2, [0.001, 0.999], 8.0) == [0.001, 0.999]  # the main model speaks


class TestReadPrompts:
    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_logits_without_a_softmax_are_named(self, tiny_smollm2: Member, wrong: float) -> None:
        """They are not taken for a member that reads badly, and no later prompt takes them over."""

        def spoilt(_module: object, _given: object, logits: torch.Tensor) -> torch.Tensor:
            logits[..., ids[0]] = wrong
            return logits

        ids, last = tiny_smollm2.vocabulary.encode(CODE), last_prompts()
        hook = tiny_smollm2.model.lm_head.register_forward_hook(spoilt)
        try:
            with open_session(tiny_smollm2) as session, pytest.raises(InputError, match=r"tiny-smollm2.*NaN"):
                read_prompts(session, tiny_smollm2, {0: ids}, last)
        finally:
            hook.remove()
        with open_session(tiny_smollm2) as session:
            found = read_prompts(session, tiny_smollm2, {0: ids}, last)
        assert all(map(math.isfinite, found[0].logprobs))

    def test_the_logits_of_a_block_are_gone_before_the_next_forward(self, tiny_smollm2: Member) -> None:
        """With a vocabulary of 262,144 tokens each block has 67 MB of them."""
        blocks: list[StorageWeakRef] = []
        alive: list[int] = []

        def before(_module: object, _given: object) -> None:
            alive.append(sum(not one.expired() for one in blocks))

        def after(_module: object, _given: object, logits: torch.Tensor) -> None:
            blocks.append(StorageWeakRef(logits.untyped_storage()))

        head = tiny_smollm2.model.lm_head
        hooks = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
        try:
            with open_session(tiny_smollm2) as session:
                read_prompts(session, tiny_smollm2, {0: tiny_smollm2.vocabulary.encode(CODE * 20)})
        finally:
            for hook in hooks:
                hook.remove()
        assert alive == [0, 0, 0, 0, 0]

    def test_what_prompts_begin_with_alike_is_scored_once(self, tiny_smollm2: Member) -> None:
        """And gives each of them the same scores as by itself."""
        demos = "Question: 2 + 3?\nAnswer: 5\n\n" * 12
        texts = [demos + end for end in ("Question: 7 + 1?\nAnswer:", "Question: Who?\nAnswer:", "")] + [CODE]
        prompts = dict(enumerate(map(tiny_smollm2.vocabulary.encode, texts)))
        with open_session(tiny_smollm2, len(texts)) as session:
            together = read_prompts(session, tiny_smollm2, prompts)
            fed = session.tokens_fed
        alone = 0
        for lane, ids in prompts.items():
            with open_session(tiny_smollm2, 1) as session:
                one = read_prompts(session, tiny_smollm2, {0: ids})[0]
                alone += session.tokens_fed
            assert together[lane].sizes == one.sizes
            assert together[lane].logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert fed < alone / 2

    @pytest.mark.parametrize("seed", range(3))
    def test_scores_of_earlier_prompts_give_those_of_a_fresh_session(
        self, tiny_smollm2: Member, seed: int
    ) -> None:
        """Prompts of any length that begin like others or do not, in lanes that held another one."""
        draw = random.Random(seed)
        vocabulary = tiny_smollm2.vocabulary
        heads = [vocabulary.encode(text * 40)[: draw.randrange(5, 400)] for text in (CODE, FRENCH, "a b c ")]
        last = last_prompts()
        with open_session(tiny_smollm2, 3) as session:
            for _ in range(12):
                prompts = {}
                for lane in draw.sample(range(3), draw.randrange(1, 4)):
                    head = draw.choice(heads)
                    tail = vocabulary.encode(FRENCH * 3)[: draw.choice([1, 7, 40, 150])]
                    prompts[lane] = head[: draw.choice([len(head), len(head) - 3])] + tail
                found = read_prompts(session, tiny_smollm2, prompts, last)
                assert list(found) == list(prompts)
                for lane, ids in prompts.items():
                    with open_session(tiny_smollm2, 1) as fresh:
                        want = read_prompts(fresh, tiny_smollm2, {0: ids})[0]
                        logits = sync(fresh, {0: ids})
                    assert found[lane].sizes == want.sizes
                    assert found[lane].logprobs == pytest.approx(want.logprobs, abs=1e-4)
                    torch.testing.assert_close(sync(session, {lane: ids}), logits, atol=1e-4, rtol=0)

    def test_scores_are_those_of_a_plain_forward(self, tiny_smollm2: Member, tiny_gemma: Member) -> None:
        for member in (tiny_smollm2, tiny_gemma):
            vocabulary = member.vocabulary
            prompts = {0: vocabulary.prefix_ids + vocabulary.encode(CODE), 1: vocabulary.encode(FRENCH)}
            with open_session(member, 2) as session:
                scores = read_prompts(session, member, prompts)
                fed = session.tokens_fed
                logits = sync(session, prompts)
                assert session.tokens_fed == fed  # the rows hold their prompts
            for row, ids in prompts.items():
                with torch.inference_mode():
                    want = member.model(torch.tensor([ids])).logits[0].double()
                known = want.index_fill(1, member.unwritable(ids), -math.inf).log_softmax(-1)
                found = [float(known[i, token]) for i, token in enumerate(ids[1:])]
                assert scores[row].logprobs == pytest.approx(found, abs=1e-4)
                torch.testing.assert_close(logits[row].double(), want[-1], atol=1e-4, rtol=0)
            assert scores[1].nbytes == len(FRENCH.encode()) - len(vocabulary.bytes_of(prompts[1][0]))

    def test_of_a_long_prompt_the_end(self, tiny_smollm2: Member) -> None:
        ids = tiny_smollm2.vocabulary.encode("One two three. " * 100)
        assert len(ids) > PROMPT_TOKENS + 50
        with open_session(tiny_smollm2) as session:
            score = read_prompts(session, tiny_smollm2, {0: ids})[0]
        assert len(score.logprobs) == PROMPT_TOKENS


@pytest.fixture(scope="module")
def weighed(tiny_smollm2: Member, tiny_gemma: Member) -> Ensemble:
    """Where both members keep a say in the texts here."""
    return Ensemble([tiny_smollm2, tiny_gemma], recipe="bytes", weights="prompt", sharpness=1 / 128)


class TestEnsemble:
    def test_each_row_has_its_own(self, weighed: Ensemble) -> None:
        """The weights of a step are those of the prompts, and a row's text is that of these weights given."""
        seen: list[dict] = []
        batch = weighed.generate([CODE, FRENCH], max_new_tokens=6, trace=seen.append)
        used = {record["row"]: [one["weight"] for one in record["members"]] for record in seen[:2]}
        assert len(used[0]) == len(used[1]) == 2
        assert abs(used[0][0] - used[1][0]) > 0.02
        for row, prompt in enumerate([CODE, FRENCH]):
            fixed = weighed.variant(fuser="follow", weights=used[row])
            assert fixed.generate(prompt, max_new_tokens=6).text == batch[row].text

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_a_prompt_that_begins_like_the_last_one_is_not_scored_again(
        self, weighed: Ensemble, batch_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Samples of one prompt, and questions after the same demos, each when a lane is free."""
        scored: list[int] = []
        score = prompt_weights_module.ScoredPrompt.score

        def counted(prompt: Any, block: Any) -> None:
            before = len(prompt.logprobs)
            score(prompt, block)
            scored.append(len(prompt.logprobs) - before)

        monkeypatch.setattr(prompt_weights_module.ScoredPrompt, "score", counted)
        demos = "Question: 2 + 3?\nAnswer: 5\n\n" * 30  # longer than what is scored
        ends = ["Question: 7 + 1?"] * 3 + ["Who?", "Question: What is the sum of 7, 12 and 30?", "1 + 1?"]
        prompts = [*[demos + one + "\nAnswer:" for one in ends], FRENCH]
        seen: dict[int, list[float]] = {}

        def trace(record: dict) -> None:
            if record["position"] == 0:  # the boundary rule may change them at other tokens
                seen[record["row"]] = [one["weight"] for one in record["members"]]

        weighed.generate(prompts, max_new_tokens=3, batch_size=batch_size, trace=trace)
        once = sum(scored)
        scored.clear()
        for row, prompt in enumerate(prompts):
            alone: list[dict] = []
            weighed.generate(prompt, max_new_tokens=3, trace=alone.append)
            assert seen[row] == pytest.approx([one["weight"] for one in alone[0]["members"]], abs=1e-5)
        assert once < 0.4 * sum(scored)

    def test_shared_forwards_change_nothing(self, weighed: Ensemble) -> None:
        want = weighed.generate([CODE, FRENCH], max_new_tokens=6).texts
        with SharedForwards() as shared:
            weighed.variant(weights=None).generate([CODE, FRENCH], max_new_tokens=6, shared=shared)
            assert weighed.generate([CODE, FRENCH], max_new_tokens=6, shared=shared).texts == want

    @pytest.mark.parametrize(
        "how",
        [
            {},
            {"draft": 0},
            {"draft": 3},
            {"do_sample": True, "seed": 5},
            {"draft": 0, "do_sample": True, "seed": 5},
            {"certified_skip": True},
            {"draft": 0, "certified_skip": True},
        ],
    )
    def test_a_member_without_weight_is_not_asked(
        self, tiny_smollm2: Member, tiny_gemma: Member, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With this sharpness one member has all the weight: the text is the main model's own, or fused."""
        asked: list[int] = []
        ask = WatchedSession.ask

        def counted(session: WatchedSession, targets: Any, *more: Any) -> Any:
            asked.append(id(session))
            return ask(session, targets, *more)

        decided = 0
        for main, assistant in ((tiny_smollm2, tiny_gemma), (tiny_gemma, tiny_smollm2)):
            ensemble = Ensemble([main, assistant], fuser="deepen", weights="prompt", sharpness=10.0)
            single = Ensemble([main], fuser="single")
            own_way = {key: how[key] for key in how if key != "certified_skip"}
            for prompt in (CODE, FRENCH):
                own = single.generate(prompt, max_new_tokens=12, **own_way)
                records: list[dict] = []
                with monkeypatch.context() as patch:
                    patch.setattr(WatchedSession, "ask", counted)
                    asked.clear()
                    found = ensemble.generate(prompt, max_new_tokens=12, trace=records.append, **how)
                if records[0]["members"][0]["weight"] < 1:
                    assert {one["not_asked"] for one in records}.isdisjoint({"no weight"})
                    continue
                decided += 1
                assert {one["not_asked"] for one in records} <= {
                    "no weight",
                    "settled",
                    "unfinished character",
                }
                assert found.token_ids == own.token_ids
                if "draft" in how:  # else whoever is fastest by the clock writes drafts, also this member
                    assert len(asked) - asked.count(asked[0]) < 4  # its prompt; the main model is asked first
        assert decided == 2

    def test_other_words_are_refused(self, tiny_smollm2: Member, tiny_gemma: Member) -> None:
        with pytest.raises(InputError, match="weights is 'auto'; give a list of numbers, size or prompt"):
            Ensemble([tiny_smollm2, tiny_gemma], recipe="bytes", weights="auto")


def test_weights_by_size() -> None:
    assert weights_by_size([300, 100]) == [0.75, 0.25]
    assert weights_by_size([1, 1, 2]) == [0.25, 0.25, 0.5]
    assert weights_by_size([300, None]) == weights_by_size([300, 0]) == [0.5, 0.5]


def test_main_by_size() -> None:
    assert [main_by_size([100, one]) for one in (50, 100, 199, 200, 900)] == [0, 0, 0, 1, 1]
    assert main_by_size([100, 150, 300, 200]) == main_by_size([100, 150, 300, 300]) == 2
    assert main_by_size([100, 300, None]) == main_by_size([0, 300]) == main_by_size([100]) == 0


class TestDefault:
    """fuser="auto": weights from the members' sizes and the prompt, and who is followed."""

    def test_what_auto_is(self) -> None:
        default = FusionSettings()
        assert (default.resolved(logits=True).fuser, default.resolved(logits=True).weights) == (
            "follow",
            "size",
        )
        by_prompt = FusionSettings(weights="prompt")
        assert by_prompt.resolved(logits=True) == replace(by_prompt, fuser="follow")
        assert default.resolved(logits=False) == replace(default, fuser="deepen")
        given = FusionSettings(weights=[0.3, 0.7])
        assert given.resolved(logits=True) == replace(given, fuser="deepen")
        assert FusionSettings(fuser="average").resolved(logits=True).weights is None
        assert FusionSettings(fuser="follow").resolved(logits=True) == default.resolved(logits=True)
        equal = FusionSettings(fuser="follow", weights=[0.5, 0.5])
        assert equal.resolved(logits=True) == equal

    def test_a_far_larger_member_is_the_main_model(
        self, one_byte_folders: list[Path], tmp_path: Path
    ) -> None:
        """Where members are named and no more. With a fuser or weights the first one named is."""
        tokens, (one, two) = one_byte_tokens(), one_byte_folders
        larger = save_model(tmp_path / "larger", tokens, seed=3, layers=3)
        far_larger = save_model(tmp_path / "far-larger", tokens, seed=4, layers=5)
        ensemble = Ensemble.from_pretrained([one, far_larger, two])
        assert ensemble.names == ["far-larger", "tiny-1", "tiny-2"]
        assert ensemble.weights == pytest.approx([5 / 9, 2 / 9, 2 / 9], abs=0.01)
        assert Ensemble.from_pretrained([one, larger, two]).names == ["tiny-1", "larger", "tiny-2"]
        named = ["tiny-1", "far-larger"]
        for weights in ("size", [0.4, 0.6]):
            assert Ensemble.from_pretrained([one, far_larger], weights=weights).names == named
        assert Ensemble.from_pretrained([one, far_larger], fuser="average").names == named
        members = load_members([one, far_larger])
        assert Ensemble(members).names == named
        asked = {
            name: (named_members([str(one), str(far_larger)], demo=False), settings)
            for name, settings in (("default", {}), ("chosen", {"fuser": "follow"}))
        }
        found = load_ensembles(asked)
        assert found["default"].names == named[::-1]
        assert found["chosen"].names == named
        without_logits = replace(members[1], backend=TopKOnly(members[1].backend, 50))
        assert main_first([members[0], without_logits], {}) == [members[0], without_logits]

    def test_who_is_the_main_model_in_the_commands(
        self, one_byte_folders: list[Path], tmp_path: Path
    ) -> None:
        """The doctor examines what `generate` would do. Voters stand as named, alone too."""
        large = save_model(tmp_path / "large", one_byte_tokens(), seed=4, layers=5)
        members = load_members([one_byte_folders[0], large])
        assert [one.name for one in diagnose(members, text=CODE * 2, new_tokens=2).members] == [
            "large",
            "tiny-1",
        ]
        models = ["--model", str(one_byte_folders[0]), "--model", str(large)]
        (tmp_path / "arc_challenge").mkdir()
        item = {"question": "Which?", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "A"}
        (tmp_path / "arc_challenge" / "test.jsonl").write_text(json.dumps(item) + "\n")
        out = ["--data", str(tmp_path), "--json", str(tmp_path / "out")]
        for more in ([], ["--fuser", "average"]):
            command = ["eval", *models, "--task", "arc_challenge", *out, "--fuser", "vote", *more]
            done = CliRunner().invoke(app, command)
            assert done.exit_code == 0, done.output
        header = json.loads((tmp_path / "out" / "arc_challenge.vote.jsonl").read_text().splitlines()[0])
        assert [one["name"] for one in header["configuration"]["members"]] == ["tiny-1", "large"]
        for command in (["nll", "--text", __file__], ["eval", "--task", "arc_challenge", *out]):
            done = CliRunner().invoke(app, [*command, *models, "--fuser", "average", "--fuser", "auto"])
            assert done.exit_code == 2
            assert "--fuser auto beside others: by default the main model may be another one" in done.stderr

    def test_a_larger_member_counts_more(self, tiny_smollm2: Member, tiny_gemma: Member) -> None:
        """The weights that a prompt moves start in proportion to the sizes, embeddings left out."""
        members = [tiny_gemma, tiny_smollm2]
        sizes = [member.size for member in members]
        layers = [member.model.get_decoder().layers.parameters() for member in members]
        norms = [member.model.get_decoder().norm.weight.numel() for member in members]
        assert sizes == [n + sum(w.numel() for w in own) for n, own in zip(norms, layers, strict=True)]
        ensemble = Ensemble(members, recipe="bytes")
        assert ensemble.weights_or_rule == "size"
        assert ensemble.weights == pytest.approx([one / sum(sizes) for one in sizes])
        assert ensemble.variant(weights="prompt").weights == [0.5, 0.5]
        assert ensemble.variant(weights="prompt").weights_or_rule == "prompt"
        assert ensemble.variant(weights=[0.2, 0.8]).weights_or_rule == [0.2, 0.8]
        even = ensemble.variant(sharpness=0).generate(CODE, max_new_tokens=4)
        given = ensemble.variant(fuser="follow", weights=ensemble.weights).generate(CODE, max_new_tokens=4)
        assert even.token_ids == given.token_ids

    def test_a_member_of_unknown_size(
        self, tiny_smollm2: Member, tiny_gemma: Member, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody counts more for his size then, and that is told."""
        monkeypatch.setattr(tiny_gemma, "size", None)
        with pytest.warns(UserWarning, match=f"the size of {tiny_gemma.name} is not known") as warned:
            ensemble = Ensemble([tiny_smollm2, tiny_gemma], recipe="bytes")
        assert warned[0].filename == __file__
        assert ensemble.weights == [0.5, 0.5]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ensemble.variant(weights="prompt")

    def test_rows_follow_whoever_counts_most(self, tiny_smollm2: Member, tiny_gemma: Member) -> None:
        members = [tiny_smollm2, tiny_gemma, tiny_smollm2]
        logits = [torch.randn(5, one.vocab_size) * 3 for one in members]
        weights = [[0.7, 0.3, 0], [0.2, 0.8, 0], [0.5, 0.5, 0], [0.4, 0.3, 0.3], [0.3, 0.5, 0.2]]
        follow, search, average = (
            Ensemble(members, fuser=fuser).fuser.step(logits, weights)
            for fuser in ("follow", "deepen", "union-vocab")
        )
        for row, want in enumerate((search, average, search, search, average)):
            assert torch.equal(follow.logits[row], want.logits[row])
            assert follow.chosen[row] == want.chosen[row]

    def test_the_certified_skip_holds_where_the_main_model_leads(
        self, tiny_smollm2: Member, tiny_gemma: Member
    ) -> None:
        ensemble = Ensemble([tiny_smollm2, tiny_gemma], learning_rate=0.1)
        prompts = [CODE, FRENCH, "Hello", "One two three four"]
        plain = ensemble.generate(prompts, max_new_tokens=16)
        skipping = ensemble.generate(prompts, max_new_tokens=16, certified_skip=True)
        assert [one.token_ids for one in skipping] == [one.token_ids for one in plain]
        assert skipping.timings.settled > 0
        assert not ensemble.fuser.bounded([0.4, 0.6])
        assert ensemble.fuser.bounded([0.6, 0.4])
        assert ensemble.fuser.bounded([0.5, 0.5])
        assert ensemble.fuser.bounded([0.4, 0.3, 0.3])
        assert not ensemble.fuser.bounded([0.3, 0.5, 0.2])
        # Who leads by a rule is not known before all have spoken.
        assert not ensemble.variant(weighing="margin").fuser.bounded([0.6, 0.4])

    def test_members_that_count_unequally_are_told_of_once(
        self, tiny_smollm2: Member, tiny_gemma: Member
    ) -> None:
        """An assistant that counts far more is named, and so is one that has no say in the text."""
        said = []
        for members in ([tiny_smollm2, tiny_gemma], [tiny_gemma, tiny_smollm2]):
            ensemble = Ensemble(members, sharpness=10)  # any difference decides
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(2):
                    ensemble.generate([CODE], max_new_tokens=2)
            said += [str(one.message) for one in caught if "for a prompt than" in str(one.message)]
        better, worse = sorted(said, key=lambda one: "far less" in one)
        leader, other = sorted(ensemble.names, key=lambda name: not better.startswith(name))
        assert better.startswith(f"{leader} counts far more for a prompt than the main model, {other}:")
        assert worse.startswith(f"{other} counts far less for a prompt than {leader}:")

    @pytest.mark.parametrize(
        ("given", "weights", "told"),
        [
            ([0.5, 0.5], [0.5, 0.5], []),
            ([0.5, 0.5], [0.99, 0.01], []),
            ([0.5, 0.5], [0.11, 0.89], []),
            ([0.5, 0.5], [0.1, 0.9], ["B counts far more for a prompt than the main model, A"]),
            ([0.5, 0.5], [1.0, 0.0], ["B counts far less for a prompt than A"]),
            ([1.0, 0.0], [1.0, 0.0], []),  # who gave the weights knows
            ([0.5, 0.5], [0.0, 1.0], ["B counts far more for a prompt than the main model, A"]),
            (
                [0.4, 0.3, 0.3],
                [0.05, 0.95, 0.0],
                [
                    "B counts far more for a prompt than the main model, A",
                    "C counts far less for a prompt than B",
                ],
            ),
        ],
    )
    def test_what_is_told_of_weights(self, given: list[float], weights: list[float], told: list[str]) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seen: set[tuple[str, str]] = set()
            for _ in range(2):
                tell_of_unequal("ABC"[: len(given)], given, weights, seen)
        said = [str(one.message).partition(":")[0] for one in caught]
        assert said == told
        assert all("`deepen-ext tune`" in str(one.message) for one in caught)
