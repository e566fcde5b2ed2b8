"""The preflight, on real models: the demo pair, and pairs that should not be fused."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from command_line import run
from gguf_files import write_tiny_model
from sessions import changed
from tiny_models import one_byte_tokens, save_model
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

from deepen_ext.decoding.drafts.draft_settings import LOOKUP, MAIN
from deepen_ext.decoding.observed.acceptance import expected_tokens
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.measure.doctor import draft_times
from deepen_ext.measure.doctor.coverage import coverage, mean_distribution, row_shapes
from deepen_ext.measure.doctor.diagnose import MOST_CHARACTERS, diagnose
from deepen_ext.measure.doctor.diagnosis import Diagnosis, Fused, MemberFacts, give_verdict
from deepen_ext.measure.doctor.draft_model import (
    Acceptance,
    ForwardTimes,
    best_length,
    cycle_ms,
    ms_per_token,
)
from deepen_ext.measure.doctor.draft_times import acceptance, forward_times, what_it_allows
from deepen_ext.measure.doctor.member_facts import is_same_model
from deepen_ext.measure.doctor.sample_text import SAMPLE_TEXT
from deepen_ext.measure.doctor.tokenizer_traps import tokenizer_traps
from deepen_ext.members.gguf.facts import read_facts
from deepen_ext.members.llama_cpp.backend import LlamaBackend
from deepen_ext.members.llama_cpp.library import load_library
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.members.llama_cpp.threads import Threads
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.space.anchors import PrefixColumns, shared_anchors
from deepen_ext.space.row_sources import PrefixRows, SimilarityRows
from deepen_ext.text.vocabulary import PROBES

SHORT = SAMPLE_TEXT[:500]


# ---------------------------------------------------------------- real, tiny models


def characters_only() -> Tokenizer:
    """SentencePiece without merges whose byte tokens are special, so that no text has them.

    It shares the single characters of ASCII with other tokenizers and little else. (Any two tokenizers that
    carry every text have the bytes in common, which is more than 100 anchors.)
    """
    characters = sorted({one for probe in PROBES for one in probe if one not in " ▁"} | set(SHORT) - {" "})
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    names = ["<unk>", "<eos>", *of_bytes, "▁", *characters]
    tokenizer = Tokenizer(
        BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    of_the_mark = {f"<0x{byte:02X}>" for byte in "▁".encode()}
    special = ["<unk>", "<eos>", *(name for name in of_bytes if name not in of_the_mark)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def learn(member: Member, text: str) -> None:
    """Some steps on one text."""
    ids = torch.tensor([member.vocabulary.encode(text)])
    member.model.requires_grad_(True)
    optimiser = torch.optim.AdamW(member.model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        member.model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    member.model.requires_grad_(False)


@pytest.fixture(scope="module")
def bytes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "bytes", one_byte_tokens(), seed=1)


@pytest.fixture(scope="module")
def characters_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "characters", characters_only(), seed=2)


@pytest.fixture(scope="module")
def demo_pair(smollm2: Member, gemma: Member) -> Diagnosis:
    """Its times are of one forward of each kind: no test is about how long one takes.

    Its drafts are tried on the fewest tokens; what becomes of them is tested on tiny models.
    """
    with pytest.MonkeyPatch.context() as patch:
        few = partial(draft_times.draft_times, tokens=8)
        patch.setattr("deepen_ext.measure.doctor.diagnose.draft_times", few)
        patch.setattr(draft_times, "_WARM_UP", 0)
        patch.setattr(draft_times, "_REPETITIONS", 1)
        return diagnose([smollm2, gemma], new_tokens=3)


# ---------------------------------------------------------------- the demo pair


def test_demo_pair_members(demo_pair: Diagnosis) -> None:
    small, gemma = demo_pair.members
    assert (small.name, gemma.name) == ("SmolLM2-135M-Instruct", "Gemma-3-270M")
    assert (small.architecture, small.tokenizer, gemma.tokenizer) == ("llama", "byte_level", "sentencepiece")
    assert small.parameters == pytest.approx(135e6, rel=0.01)
    assert [one.non_embedding_parameters for one in demo_pair.members] == [106_203_456, 100_326_016]
    assert small.weights_bytes == pytest.approx(4 * small.parameters, rel=1e-3)
    assert (
        small.cache_bytes == 30 * 2 * 3 * 64 * 4 * 1024
    )  # layers, keys and values, heads, size, float32, slots
    assert (small.context_length, gemma.context_length) == (8192, 32768)
    assert gemma.end_tokens == ("<eos>",)
    assert [trap.name for trap in small.traps] == ["lost bytes", "no BOS"]
    assert [trap.name for trap in gemma.traps] == ["no chat template", "BOS"]
    (memory,) = demo_pair.memory
    assert memory.weights_bytes == small.weights_bytes + gemma.weights_bytes
    assert memory.cache_bytes == small.cache_bytes + gemma.cache_bytes
    assert 0 < memory.rows_bytes < 150e6
    for one in demo_pair.members:
        assert one.coverage.anchors > 0.9
        assert one.coverage.anchors + one.coverage.prefixes + one.coverage.rest == pytest.approx(1, abs=1e-6)


def test_demo_pair_rows(demo_pair: Diagnosis) -> None:
    """The paper's recipe is all but uniform on today's small models, the others are not."""
    assert demo_pair.anchors.end
    assert demo_pair.anchors.with_main == (demo_pair.anchors.shared,)
    assert demo_pair.anchors.shared > 40_000
    assert len(demo_pair.rows) == 6
    for row in demo_pair.rows:
        assert row.anchors.own is not None
        assert row.uniform == (row.recipe == "paper")
        if row.uniform:
            assert row.anchors.own < 0.1
            assert row.anchors.effective > 0.5 * demo_pair.anchors.shared
        else:
            assert row.anchors.own > 0.95
            assert 1 <= row.anchors.effective < 2
    (warning,) = demo_pair.warnings
    assert warning.startswith("the paper recipe degenerates here")


def test_demo_pair_gain(demo_pair: Diagnosis, smollm2: Member) -> None:
    assert demo_pair.obstacle is None
    assert demo_pair.same == ()
    single = demo_pair.best_single
    named, *_ = demo_pair.fused
    assert [one.as_named for one in demo_pair.fused] == [True, False, False, False]
    assert [one.main for one in demo_pair.fused[1:]] == [smollm2.name, single.name, single.name]
    assert single.name == "Gemma-3-270M"
    assert demo_pair.fused[3].weights == pytest.approx((0.2, 0.8))
    for one in demo_pair.fused:
        assert one.gain == pytest.approx(single.bits_per_byte - one.bits_per_byte, abs=1e-9)
        assert one.gain_error > 0
    best = min(demo_pair.fused, key=lambda one: one.bits_per_byte)
    assert best.main == single.name
    assert best.gains
    assert not named.harms
    assert demo_pair.verdict.outcome == "worth fusing"
    assert "Gemma-3-270M as the main model" in demo_pair.verdict.text
    assert f"{best.bits_per_byte:.3f}" in demo_pair.verdict.text


def test_demo_pair_speed_and_dictionary(demo_pair: Diagnosis) -> None:
    speed = demo_pair.speed
    assert speed is not None
    assert speed.tokens == 3
    assert list(speed.members_ms) == [one.name for one in demo_pair.members]
    parts = sum(speed.members_ms.values()) + speed.fusion_ms + speed.handoff_ms
    assert 0 < parts <= speed.ms_per_token
    again = json.loads(json.dumps(demo_pair.as_dict()))
    assert again["verdict"]["outcome"] == "worth fusing"
    assert again["members"][0]["traps"][0]["name"] == "lost bytes"
    assert again["characters"] == again["characters_given"] == len(SAMPLE_TEXT)


# ---------------------------------------------------------------- pairs that are hopeless


def test_model_with_itself(tiny_smollm2: Member, tiny_smollm2_dir: Path) -> None:
    found = diagnose([tiny_smollm2, load_member(tiny_smollm2_dir)], text=SHORT, new_tokens=2)
    names = ("tiny-smollm2#0", "tiny-smollm2#1")
    assert found.same == (names,)
    assert found.verdict.outcome == "not worth fusing"
    assert "are the same model" in found.verdict.text
    assert "nothing to gain" in found.verdict.text
    assert abs(found.fused[0].gain) < 0.02
    assert found.obstacle is None
    assert found.memory[0].weights_bytes == pytest.approx(2 * found.members[0].weights_bytes, rel=1e-6)


def test_too_few_anchors(bytes_dir: Path, characters_dir: Path) -> None:
    members = [load_member(bytes_dir), load_member(characters_dir)]
    shared = shared_anchors([one.vocabulary for one in members], [one.eos_ids for one in members], minimum=0)
    assert 30 < len(shared) < 100
    found = diagnose(members, text=SHORT)
    assert found.anchors.shared == len(shared)
    assert found.obstacle is not None
    assert found.verdict.outcome == "not worth fusing"
    assert f"share only {len(shared)} tokens, and at least 100 are needed" in found.verdict.text
    assert found.rows == found.fused == ()
    assert found.speed is None
    assert found.characters < len(SHORT)  # what their context of 400 bytes holds
    for one in found.members:
        assert one.parameters > 10_000
        assert one.bits_per_byte == pytest.approx(
            8, abs=1.5
        )  # random weights: of 257 tokens of a byte, none known
    assert [trap.name for trap in found.members[1].traps] == ["dummy prefix", "no chat template", "no BOS"]


def test_a_weak_main_model(bytes_dir: Path) -> None:
    """Random weights in front of a model that has learned the text: harm, by measure."""
    weak, able = load_member(bytes_dir), load_member(bytes_dir)
    learn(able, SHORT)
    found = diagnose([weak, able], text=SHORT, new_tokens=2)
    first, second = found.members
    assert second.bits_per_byte < 0.6 * first.bits_per_byte
    assert found.best_single is second
    assert found.same == ()
    assert found.fused[0].harms
    assert found.verdict.outcome == "not worth fusing"
    assert "Use bytes#1 alone" in found.verdict.text
    other_way = diagnose([able, weak], text=SHORT, new_tokens=2)
    assert {one.main for one in other_way.fused} == {"bytes#0"}  # the weak one is no main model
    assert other_way.verdict.outcome != "worth fusing"


def test_assistant_of_single_bytes(tiny_smollm2: Member, bytes_dir: Path) -> None:
    found = diagnose([tiny_smollm2, load_member(bytes_dir)], text=SHORT[:250], new_tokens=2)
    assert 200 < found.anchors.shared < 300
    assert found.best_single.name == tiny_smollm2.name
    assert found.verdict.outcome != "worth fusing"
    assert found.members[0].coverage.anchors < 0.2
    assert any(warning.startswith("only ") and tiny_smollm2.name in warning for warning in found.warnings)


def test_three_members_of_which_two_are_one(bytes_dir: Path, tmp_path: Path) -> None:
    one, other = load_member(bytes_dir), load_member(save_model(tmp_path, one_byte_tokens(), seed=5))
    found = diagnose([one, one, other], text=SHORT[:200], new_tokens=2)
    assert found.same == (("bytes#0", "bytes#1"),)
    assert "same model" not in found.verdict.text
    assert found.warnings[0].startswith("bytes#0 and bytes#1 are the same model")
    assert found.anchors.with_main == (257, 257)
    assert len(found.fused) == 6
    assert found.fused[1].weights == pytest.approx((0.8, 0.1, 0.1))
    assert found.memory[0].weights_bytes == found.members[0].weights_bytes + found.members[2].weights_bytes


# ---------------------------------------------------------------- parts


def of_text(member: Member, text: str) -> SimpleNamespace:
    """As much of a likelihood as `is_same_model` looks at."""
    ids = torch.tensor([member.vocabulary.encode(text)])
    with torch.inference_mode():
        logprobs = member.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return SimpleNamespace(logprobs=logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())


@pytest.mark.parametrize(
    ("change", "same"),
    [("none", True), ("bfloat16", True), ("one weight", False), ("rope", False), ("tokenizer", False)],
)
def test_same_model(bytes_dir: Path, tmp_path: Path, change: str, same: bool) -> None:
    model = load_member(bytes_dir)
    other = load_member(bytes_dir, dtype="bfloat16" if change == "bfloat16" else "float32")
    if change == "one weight":  # of a token that the text has not
        (unseen,) = other.vocabulary.encode("~")
        other.embedding[unseen, 3] += 0.25
    if change == "rope":
        config = LlamaConfig.from_pretrained(bytes_dir)
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1.5}
        turning = LlamaForCausalLM(config).eval()
        turning.load_state_dict(other.model.state_dict())
        other = changed(other, model=turning)
        for one in (model, other):  # attention that is sharp enough for positions to count
            for name, weight in one.model.named_parameters():
                if "self_attn" in name:
                    weight.data.mul_(100)
    if change == "tokenizer":
        tokenizer = one_byte_tokens()
        tokenizer.add_special_tokens([AddedToken("<extra>", special=True)])
        other = load_member(save_model(tmp_path / "other", tokenizer, seed=1))
    assert is_same_model(model, other, of_text(model, SHORT), of_text(other, SHORT)) == same


def test_traps_of_a_padded_vocabulary_with_nfc(tmp_path: Path) -> None:
    tokenizer = one_byte_tokens()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<start>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", tokenizer.token_to_id("<start>"))]
    )
    folder = save_model(tmp_path, tokenizer, seed=4, padding=7)
    ends = {"eos_token_id": [tokenizer.token_to_id(name) for name in ("<eos>", "<end>")]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    traps = {trap.name: trap.text for trap in tokenizer_traps(load_member(folder))}
    assert set(traps) == {"several EOS", "NFC left out", "no chat template", "BOS", "padding rows"}
    assert traps["padding rows"].startswith("7 of its 266 logits")
    assert "<eos>, <end>" in traps["several EOS"]
    assert traps["BOS"].startswith("<start> stands before")


def test_no_end_of_text_is_serious(tmp_path: Path, bytes_dir: Path) -> None:
    endless = load_member(save_model(tmp_path / "endless", one_byte_tokens(), seed=3, eos=None))
    assert endless.eos_ids == ()
    found = diagnose([endless, load_member(bytes_dir)], text=SHORT, new_tokens=2)
    assert found.obstacle is None  # same tokens, other weights
    assert found.same == ()
    assert not found.anchors.end
    first = found.members[0].traps[0]
    assert (first.name, first.serious) == ("no EOS", True)
    assert any(warning.startswith("endless: no token ends its text") for warning in found.warnings)


def test_rows_against_full_rows(bytes_dir: Path, tiny_smollm2: Member) -> None:
    """With all entries kept, the shapes are those of the whole matrix; with few, nearly."""
    member = load_member(bytes_dir)
    members = [member, tiny_smollm2]
    anchors = shared_anchors([one.vocabulary for one in members], [one.eos_ids for one in members])
    mean = torch.rand(member.vocab_size, dtype=torch.float64)
    mean /= mean.sum()
    tokens = torch.topk(torch.where(anchors.columns[0] >= 0, mean, 0.0), 128).indices
    embedding, ids = member.embedding.double(), anchors.token_ids[0]
    unit = torch.nn.functional.normalize(embedding, dim=1)
    cosine = unit[tokens] @ unit[ids].T
    full = (100 * cosine / cosine.norm(dim=1, keepdim=True)).softmax(1)
    own = full.gather(1, anchors.columns[0][tokens].long()[:, None]).mean()
    entropy = -torch.xlogy(full, full).sum(1).mean()
    for entries, tolerance in ((len(anchors), 1e-4), (32, 0.05)):
        source = SimilarityRows(member.embedding, ids, recipe="paper", entries=entries)
        shape, _ = row_shapes(anchors, source, 0, mean)
        assert shape.tokens == 128
        assert shape.own == pytest.approx(float(own), rel=1e-3)
        assert shape.effective == pytest.approx(math.exp(float(entropy)), rel=tolerance)
        kept = full.topk(entries).values.sum(1).mean()
        assert shape.largest == pytest.approx(float(kept), rel=1e-3)


def test_coverage_by_hand(tiny_smollm2: Member, bytes_dir: Path) -> None:
    members = [tiny_smollm2, load_member(bytes_dir)]
    vocabularies = [one.vocabulary for one in members]
    anchors = shared_anchors(vocabularies, [one.eos_ids for one in members])
    prefixes = PrefixColumns(anchors, vocabularies)
    logits = torch.full((2, tiny_smollm2.vocab_size), -torch.inf)
    (word,), (letter,) = tiny_smollm2.vocabulary.encode(" world"), tiny_smollm2.vocabulary.encode("a")
    special = tiny_smollm2.tokenizer.convert_tokens_to_ids("<|im_start|>")
    logits[0, letter] = 0.0
    logits[1, word], logits[1, special] = math.log(3), 0.0
    mean = mean_distribution([logits[:1], logits[1:]])
    found = coverage(anchors, prefixes, 0, mean)
    assert (found.anchors, found.prefixes, found.rest) == pytest.approx((0.5, 0.375, 0.125))
    of_anchors, of_others = row_shapes(anchors, PrefixRows(anchors, prefixes, 0), 0, mean)
    assert (of_anchors.tokens, of_anchors.own, of_anchors.effective) == (1, 1.0, 1.0)
    assert of_others is not None
    assert (of_others.tokens, of_others.own, of_others.largest) == (2, None, 0.5)
    assert of_others.effective == pytest.approx(math.sqrt(len(anchors)))  # one anchor, and all of them


@pytest.fixture(scope="module")
def facts(tiny_smollm2: Member, tiny_gemma: Member) -> tuple[MemberFacts, MemberFacts]:
    """Of a pair of which A is the better one."""
    one, other = diagnose([tiny_smollm2, tiny_gemma], text=SHORT[:100], new_tokens=2).members
    return replace(one, name="A", bits_per_byte=1.0), replace(other, name="B", bits_per_byte=1.2)


@pytest.mark.parametrize(
    ("named", "swapped", "outcome", "says"),
    [
        (
            (0.05, 0.01, False),
            (0.04, 0.01, False),
            "worth fusing",
            "0.950 bits a byte, 0.050 ± 0.010 fewer than A",
        ),
        ((0.05, 0.01, False), (0.09, 0.01, True), "worth fusing", "Better than as named, at 0.910: B as"),
        (
            (0.00, 0.01, False),
            (0.05, 0.01, True),
            "worth fusing",
            "As named it is 1.000, 0.000 ± 0.010 fewer.",
        ),
        ((0.05, 0.04, False), (0.01, 0.04, False), "little to gain", "0.050 ± 0.040 fewer than A alone"),
        ((0.005, 0.001, False), (0.0, 0.001, False), "little to gain", "0.005 ± 0.001 fewer"),
        ((-0.01, 0.02, False), (-0.02, 0.02, False), "little to gain", "0.010 ± 0.020 more"),
        ((-0.04, 0.04, False), (0.03, 0.02, True), "little to gain", "Better than as named, at 0.970: B as"),
        ((-0.05, 0.01, False), (-0.02, 0.02, False), "not worth fusing", "Use A alone."),
        # Better than as named, and worse than A alone, which the advice is.
        ((-0.10, 0.02, False), (-0.05, 0.02, True), "not worth fusing", "Use A alone."),
        (
            (-0.10, 0.02, False),
            (0.009, 0.002, True),
            "not worth fusing",
            "Use A alone. A little better still, at 0.991: B as the main model and weights of 0.5 for A and "
            "0.5 for B.",
        ),
    ],
)
def test_verdicts(
    facts: tuple[MemberFacts, MemberFacts],
    named: tuple[float, float, bool],
    swapped: tuple[float, float, bool],
    outcome: str,
    says: str,
) -> None:
    fused = [
        Fused(main, (0.5, 0.5), None, main == "A", 1.0 - gain, gain, error, beats)
        for main, (gain, error, beats) in (("A", named), ("B", swapped))
    ]
    verdict = give_verdict(facts, fused, [], None)
    assert verdict.outcome == outcome
    assert verdict.text.endswith(says) if says.endswith(".") else says in verdict.text


def test_wrong_input(tiny_smollm2: Member) -> None:
    pair = [tiny_smollm2, tiny_smollm2]
    for arguments, says in (
        ({"members": [tiny_smollm2]}, "needs two or more members"),
        ({"members": pair, "new_tokens": 1}, "choose 2 or more"),
        ({"members": pair, "batch": 0}, "batch is 0; choose 1 or more"),
        (
            {"members": pair, "batch": 10**12},
            r"1,000,000,000,000 texts side by side need about .*; choose a smaller batch",
        ),
        ({"members": pair, "text": ""}, "fewer than two words"),
        ({"members": pair, "text": "  word\n"}, "fewer than two words"),
        ({"members": ["models/x"] * 2}, "'models/x' is no loaded member"),
        ({"members": None}, "None is no loaded member"),
        ({"members": tiny_smollm2}, "one member; give a list"),
        ({"members": pair, "text": b"a b"}, "text is b'a b'; give a text"),
        ({"members": pair, "text": 3}, "text is 3; give a text"),
        ({"members": pair, "new_tokens": "4"}, "^new_tokens is '4'; give a whole number, 2 or more"),
        ({"members": pair, "new_tokens": 2.5}, "^new_tokens is 2.5; give a whole number, 2 or more"),
    ):
        with pytest.raises(InputError, match=says):
            diagnose(**arguments)


# ---------------------------------------------------------------- drafts

# Milliseconds of 1, 2, 4 and 8 tokens of each text; the last one cannot go back for nothing.
TIMES = [
    ForwardTimes("main", (10.0, 12.0, 16.0, 24.0), 0.0, reads_anew=False),
    ForwardTimes("A", (4.0, 5.0, 7.0, 11.0), 0.0, reads_anew=False),
    ForwardTimes("B", (2.0, 3.0, 5.0, 9.0), 6.0, reads_anew=True),
]


def test_forwards_between_measured_widths() -> None:
    assert [TIMES[0].of(width) for width in (1, 2, 3, 4, 5, 8)] == [10, 12, 14, 16, 18, 24]


@pytest.mark.parametrize(
    ("drafter", "length", "ms"),
    [
        (MAIN, 0, 10 + 4 + 2 + 1),
        (MAIN, 3, 4 * 10 + 7 + 5 + 4 + (1 - 0.8**3) * 6),
        (MAIN, 2, 3 * 10 + 6 + 4 + 3 + (1 - 0.8**2) * 6),
        (2, 3, 4 * 2 + 16 + 7 + 4 + (1 - 0.8**3) * 6),
        (LOOKUP, 3, 16 + 7 + 5 + 4 + (1 - 0.8**3) * 6),
    ],
)
def test_a_cycle_by_hand(drafter: int, length: int, ms: float) -> None:
    """Of a place the fusion takes 1 ms; tokens stand with a chance of 0.8."""
    asked = {"drafter": drafter, "length": length, "acceptance": 0.8}
    assert cycle_ms(TIMES, 1.0, **asked) == pytest.approx(ms)
    tokens = {0: 1.0, 2: 1 + 0.8 + 0.64, 3: 1 + 0.8 + 0.64 + 0.512}[length]
    assert expected_tokens(0.8, length) == pytest.approx(tokens)
    assert ms_per_token(TIMES, 1.0, **asked) == pytest.approx(ms / tokens)


def test_a_cycle_of_two_texts_by_hand() -> None:
    """Prompt lookup has a token at every second place: at 3 of 4 for one of the two texts."""
    asked = {"drafter": LOOKUP, "length": 1, "acceptance": 0.8, "lanes": 2, "reach": 0.5}
    drafted = 12 + 5 + 3 + 2 + (1 - 0.8**2) * 6
    assert ms_per_token(TIMES, 1.0, **asked) == pytest.approx((0.75 * drafted + 0.25 * 17) / 1.4)


def test_best_lengths() -> None:
    plain = ms_per_token(TIMES, 1.0, drafter=MAIN, length=0, acceptance=1.0)
    length, ms = best_length(TIMES, 1.0, drafter=MAIN, found=Acceptance(0, 50))
    assert (length, ms > plain) == (1, True)  # nothing stands: the shortest draft costs least, and too much
    length, ms = best_length(TIMES, 1.0, drafter=2, found=Acceptance(50, 50))
    assert (length, ms) == (7, pytest.approx((8 * 2 + 24 + 11 + 8) / 8))
    length, ms = best_length(TIMES, 1.0, drafter=MAIN, found=Acceptance(25, 50))
    by_hand = [
        ((g + 1) * 11 + TIMES[1].of(g + 1) + TIMES[2].of(g + 1) + (1 - 0.5**g) * 6) / (2 - 0.5**g)
        for g in range(1, 8)
    ]
    assert (length, ms) == (1 + by_hand.index(min(by_hand)), pytest.approx(min(by_hand)))


def in_llama_cpp(member: Member, folder: Path, family: str) -> Member:
    """The member's tokens with a model of this family in llama.cpp behind them."""
    path = write_tiny_model(
        folder / f"{family}.gguf", family, vocab_size=member.vocab_size, context_length=400
    )
    model = LlamaModel(load_library(), path, family, torch.device("cpu"))
    backend = LlamaBackend(family, model, path, read_facts(path), threads=Threads(1, fixed=True))
    return replace(member, name=family, backend=backend)


@pytest.mark.parametrize(("family", "anew"), [("mamba", True), ("llama", False)])
def test_going_back(
    bytes_dir: Path, tmp_path: Path, family: str, anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 300 tokens: states that cannot be cut are made again, others stay.

    By this process's own time: other processes must not decide.
    """
    monkeypatch.setattr(draft_times, "perf_counter", time.process_time)
    member = in_llama_cpp(load_member(bytes_dir), tmp_path, family)
    times = forward_times(member, family, [SAMPLE_TEXT[:300], SAMPLE_TEXT[300:600]])
    assert all(ms > 0 for ms in times.ms)
    assert times.reads_anew == anew
    assert (times.back_ms > 2 * times.ms[0]) == anew
    words = what_it_allows(member, times)
    assert words.startswith("drafts change no token; ")
    assert ("it seems to read the whole text again" in words) == anew


def test_acceptance_against_the_texts(tiny_smollm2: Member, tiny_gemma: Member) -> None:
    """The main model's tokens fall where the ensemble changed them; looked up is what stood there before."""
    ensemble = Ensemble([tiny_smollm2, tiny_gemma], fuser="deepen")
    prompts = [SAMPLE_TEXT[:200], SAMPLE_TEXT[700:900]]
    found = acceptance(ensemble, prompts, 24)
    written = ensemble.generate(prompts, max_new_tokens=24, draft=0)
    changed = sum(one.changed_tokens for one in written)
    assert 0 < changed == found[MAIN].seen - found[MAIN].stood
    assert 0 < found[1].stood < found[1].seen <= found[MAIN].seen
    offered = stood = places = 0
    for prompt, one in zip(prompts, written, strict=True):
        ids = tiny_smollm2.vocabulary.encode(prompt)
        for token in one.token_ids:
            earlier = [at for at in range(3, len(ids)) if ids[at - 3 : at] == ids[-3:]]
            places, offered = places + 1, offered + bool(earlier)
            stood += bool(earlier) and ids[earlier[-1]] == token
            ids.append(token)
    if offered:
        lookup = found[LOOKUP]
        assert (lookup.stood, lookup.seen, lookup.reach) == (stood, offered, offered / places)
    else:
        assert LOOKUP not in found


def test_drafts_in_the_diagnosis(tiny_smollm2: Member, tiny_gemma: Member) -> None:
    """The better reader assists; the other way round it would write alone, and there would be no drafts."""
    found = diagnose([tiny_gemma, tiny_smollm2], text=SAMPLE_TEXT[:700], new_tokens=3, batch=2)
    assert found.speed is not None
    assert (found.speed.texts, found.speed.tokens) == (2, 6)
    drafts = found.drafts
    assert drafts is not None
    names = [tiny_gemma.name, tiny_smollm2.name]
    assert (drafts.lanes, drafts.widths, [one.name for one in drafts.forwards]) == (2, (1, 2, 4, 8), names)
    assert drafts.place_ms == pytest.approx(found.speed.fusion_ms + found.speed.handoff_ms)
    assert drafts.without_ms == pytest.approx(sum(one.ms[0] for one in drafts.forwards) + drafts.place_ms)
    assert [one.name for one in drafts.drafters][:2] == names
    fastest = min(drafts.drafters, key=lambda one: one.ms_per_token)
    assert drafts.best == (fastest if fastest.ms_per_token < drafts.without_ms else None)
    again = json.loads(json.dumps(found.as_dict()))["drafts"]
    assert set(again) == {
        *("lanes", "context", "widths", "forwards", "place_ms", "without_ms", "drafters", "best", "allows")
    }
    assert set(again["forwards"][0]) == {"name", "ms", "back_ms", "reads_anew"}
    assert set(again["drafters"][0]) == {*("name", "acceptance", "seen", "reach", "length", "ms_per_token")}
    assert set(again["allows"]) == set(names)


def test_members_that_are_alike_draft_what_stands(bytes_dir: Path) -> None:
    """Beside itself a member that knows the text loses no token; one of two bytes is named."""
    one, coarse = load_member(bytes_dir), load_member(bytes_dir, dtype="bfloat16")
    learn(one, SHORT)
    drafts = diagnose([one, one], text=SHORT[:200], new_tokens=2).drafts
    assert drafts is not None
    assert [entry.acceptance for entry in drafts.drafters[:2]] == [1.0, 1.0]
    assert drafts.allows["bytes#0"].startswith("drafts change no token")
    assert drafts.allows["bytes#1"].startswith("drafts change no token")
    drafts = diagnose([one, coarse], text=SHORT[:200], new_tokens=2).drafts
    assert drafts is not None
    assert drafts.allows["bytes#0"].startswith("drafts change no token")
    assert drafts.allows["bytes#1"].startswith("not repeatable: among near-ties a draft may give another")
    assert "(draft='auto')" in drafts.allows["bytes#1"]


# ---------------------------------------------------------------- the command


def test_command(bytes_dir: Path, characters_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE_TEXT * 3)
    assert len(SAMPLE_TEXT * 3) > MOST_CHARACTERS
    pair = ["--model", str(bytes_dir), "--model", str(characters_dir)]
    done = run("doctor", *pair, "--text", str(text), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"]["outcome"] == "not worth fusing"
    assert {one["backend"] for one in report["members"]} == {f"transformers {transformers.__version__}"}
    assert report["characters_given"] == len(SAMPLE_TEXT * 3)
    assert report["drafts"] is None
    readable = run("doctor", "--model", str(bytes_dir), "--model", str(bytes_dir), "--batch", "2")
    assert readable.returncode == 0, readable.stderr
    shown = " ".join(readable.stdout.split())
    for part in (
        "Members, main model first",
        "257",
        f"run by transformers {transformers.__version__}",
        "Relative rows",
        "32 tokens of 2 texts side by side, without drafts and certified skip",
        "Drafts: expected milliseconds a token of each of 2 texts, context 300",
        "nobody",
        "Forward passes in milliseconds",
        "bytes#1: drafts change no token; it goes back without reading the text again.",
        "Memory on cpu",
        "no BOS",
    ):
        assert part in shown
    assert shown.endswith("are the same model (same tokenizer, same weights), so there is nothing to gain.")


def test_command_with_wrong_input(bytes_dir: Path, tmp_path: Path) -> None:
    one = ["--model", str(bytes_dir)]
    (tmp_path / "word.txt").write_text("  word\n")
    for arguments, says in (
        ([], "name the models with --model"),
        (one, "two or more models"),
        ([*one, *one, "--text", str(tmp_path / "none.txt")], "none.txt: cannot be read"),
        (["--model", "/no/such", "--model", "/no/other", "--text", str(tmp_path / "word.txt")], "two words"),
    ):
        done = run("doctor", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
