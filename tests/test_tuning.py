"""Tuning: the search and the choice on numbers, then the whole on the embedded pair and small dev splits."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from deepen_ext.commands.cli import app
from deepen_ext.decoding.prompt_weights import PromptScore, prompt_weights
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.fusers import FusionSettings
from deepen_ext.fusers.weights import check_weights
from deepen_ext.measure.evaluation.tasks import TASKS, Item
from deepen_ext.measure.likelihood import readings
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.measure.tuning.configurations import (
    Configuration,
    OutOfTime,
    Space,
    choose,
    from_likelihood,
    paired_difference,
    proportional,
    rounded,
    search,
)
from deepen_ext.measure.tuning.dev_items import DevItem, DevSet
from deepen_ext.measure.tuning.dev_measurements import Measurements
from deepen_ext.measure.tuning.tune import tune
from deepen_ext.members.loading import load_members
from deepen_ext.members.member import Member
from deepen_ext.presets import Preset, load_preset
from deepen_ext.space.recipes import RECIPES

QUESTIONS = {
    "what is the capital of france": "Paris",
    "who wrote the play romeo and juliet": "William Shakespeare",
    "how many days are there in a week": "seven",
    "what is the largest planet of the solar system": "Jupiter",
    "who was the first president of the united states": "George Washington",
    "what colour is the sky on a clear day": "blue",
    "in which year did the second world war end": "1945",
    "what is the chemical symbol of gold": "Au",
    "which ocean lies between europe and america": "the Atlantic Ocean",
    "what do bees make": "honey",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Benchmark data of two tasks with dev items and demos alone, and of one that has a test split alone."""
    rows = [{"question": question, "answer": [answer]} for question, answer in QUESTIONS.items()]
    letters = [
        {
            "question": f"What comes after {n}?",
            "A": str(n + 2),
            "B": str(n + 1),
            "C": "0",
            "D": "9",
            "answer": "B",
        }
        for n in range(1, 7)
    ]
    files = {
        "nq/demos": [one | {"answer": one["answer"][0]} for one in rows[:2]],
        "nq/dev": rows[2:],
        "arc_challenge/dev": [*letters, letters[0] | {"A": "", "B": "", "C": "", "D": "", "answer": "2"}],
        "piqa/test": [{"question": "ice", "A": "cold", "B": "hot", "answer": "A"}],
    }
    for name, lines in files.items():
        file = tmp_path / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tmp_path / "data"


class TestSearch:
    """The coordinate search, on functions whose minimum is known."""

    def valley(self, lowest: Configuration) -> Callable[[Configuration], float]:
        """Rises from its lowest point in every setting, and remembers what was asked for."""
        self.asked: list[Configuration] = []

        def bits(one: Configuration) -> float:
            self.asked.append(one)
            found = 10 * sum((a - b) ** 2 for a, b in zip(one.weights, lowest.weights, strict=True))
            found += abs(math.log(one.learning_rate / lowest.learning_rate)) if one.learning_rate else 0
            found += abs((one.temperature or 0) - (lowest.temperature or 0)) / 100
            found += abs(one.confidence - lowest.confidence)
            return found + (one.recipe != lowest.recipe) + (one.main != lowest.main)

        return bits

    @pytest.mark.parametrize(
        "lowest",
        [
            Configuration(1, (0.9, 0.1), "calibrated", 0.6, 10.0, 0.25),
            Configuration(0, (0.3, 0.7), "bytes", 0.05, None, 1.0),
            Configuration(1, (0.5, 0.5), "paper", 0.25, 100.0),
        ],
    )
    def test_finds_the_lowest_point_and_measures_each_once(self, lowest: Configuration) -> None:
        space = Space(2)
        bits = self.valley(lowest)
        start = space.default(0)
        assert bits(start) > 0
        self.asked.clear()
        assert search(start, space, {}, bits) == lowest
        assert len(self.asked) == len(set(self.asked)) < 60

    def test_informed_weights_come_first_and_may_lie_off_the_grid(self) -> None:
        space = Space(3, ())
        lowest = Configuration(2, (0.123, 0.321, 0.556))
        bits = self.valley(lowest)
        found = search(
            space.default(0), space, {"accuracy": (1.0, 0.0, 0.0), "likelihood": lowest.weights}, bits
        )
        assert found == lowest
        assert found.source == "likelihood"
        assert [one.source for one in self.asked[:3]] == ["uniform", "accuracy", "likelihood"]

    def test_three_members_share_out_the_weight(self) -> None:
        lowest = Configuration(1, (0.1, 0.1, 0.8))
        found = search(Space(3, ()).default(0), Space(3, ()), {}, self.valley(lowest))
        assert found.main == 1
        assert found.source == "grid"
        assert sum(found.weights) == pytest.approx(1, abs=1e-9)
        assert found.weights == pytest.approx(lowest.weights, abs=0.07)
        assert found.recipe is found.learning_rate is found.temperature is None

    @pytest.mark.parametrize("members", [3, 6])
    def test_all_weights_are_those_of_an_ensemble(self, members: int) -> None:
        """Uniform weights such as 1/3 have no end; what is made of them must sum to 1 all the same."""
        space = Space(members, ())
        for leader in range(members):
            lowest = [0.2 / (members - 1)] * members
            lowest[leader] = 0.8
            bits = self.valley(Configuration(leader, tuple(lowest)))
            search(space.default(leader), space, {}, bits)
            assert len(self.asked) > 10
            for one in self.asked:
                check_weights(one.ordered_weights(), members)  # raises for 0.9999

    def test_one_recipe_only(self) -> None:
        space = Space(2, ("bytes",))
        found = search(space.default(0), space, {}, self.valley(Configuration(0, (0.7, 0.3), "paper", 0.15)))
        assert found == Configuration(0, (0.7, 0.3), "bytes", 0.15)
        assert {one.recipe for one in self.asked} == {"bytes"}

    def test_out_of_time(self) -> None:
        bits = self.valley(Configuration(0, (0.9, 0.1), "bytes", 0.6))

        def for_a_while(one: Configuration) -> float:
            if len(self.asked) == 5:
                raise OutOfTime
            return bits(one)

        with pytest.raises(OutOfTime):
            search(Space(2).default(0), Space(2), {}, for_a_while)
        assert len(self.asked) == 5


class TestChoice:
    """Which of the configurations is recommended."""

    SPACE = Space(2)
    UNIFORM = SPACE.default(0)
    OTHER = SPACE.default(1)
    SIZES = (10,) * 6

    def choose(self, tried: dict[Configuration, Sequence[float]]) -> Configuration:
        return choose(tried, self.SPACE, self.SIZES)

    def test_a_clear_gain_counts_and_luck_does_not(self) -> None:
        base = [20.0, 22, 18, 25, 19, 21]
        weighted = replace(self.UNIFORM, weights=(0.7, 0.3))
        clear = [one - 2 + noise for one, noise in zip(base, (0.2, -0.1, 0, 0.1, -0.2, 0.1), strict=True)]
        lucky = [one + noise for one, noise in zip(base, (-9, 3, 2, 1, 1, 1), strict=True)]
        assert sum(clear) < sum(base) > sum(lucky)
        others = {self.UNIFORM: base, self.OTHER: [one + 5 for one in base]}
        assert self.choose({**others, weighted: clear}) == weighted
        assert self.choose({**others, weighted: lucky}) == self.UNIFORM

    def test_of_two_that_are_as_good_the_one_nearer_to_the_defaults(self) -> None:
        base = [20.0, 22, 18, 25, 19, 21]
        near = replace(self.UNIFORM, weights=(0.7, 0.3))
        far = replace(near, weights=(0.9, 0.1))
        more = replace(near, learning_rate=0.4)
        good = [one - 2 for one in base]
        best = [one + noise for one, noise in zip(good, (-1, 1, -1, 1, -1, 0.9), strict=True)]
        others = {self.UNIFORM: base, self.OTHER: base}
        assert self.choose({**others, far: best, near: good}) == near
        assert self.choose({**others, more: best, near: good}) == near
        assert self.choose({**others, more: good, near: good, far: good}) == near

    def test_never_worse_than_uniform_with_the_better_main_model(self) -> None:
        base = [20.0, 22, 18, 25, 19, 21]
        slightly = [one + noise for one, noise in zip(base, (3, -3, 3, -3, 0.1, 0), strict=True)]
        tried = {self.UNIFORM: slightly, self.OTHER: base}
        assert self.choose(tried) == self.OTHER
        assert self.choose({self.UNIFORM: base, self.OTHER: slightly}) == self.UNIFORM
        one_item = {self.UNIFORM: [3.0], self.OTHER: [2.5], replace(self.OTHER, weights=(0.9, 0.1)): [1.0]}
        assert choose(one_item, self.SPACE, (4,)) == self.OTHER

    def test_paired_difference(self) -> None:
        one, other = [9.0, 7.0, 8.5, 12.0], [8.0, 7.5, 8.0, 10.0]
        differences = [a - b for a, b in zip(one, other, strict=True)]
        mean, error = paired_difference(one, other, (4, 4, 4, 4))
        assert mean == pytest.approx(statistics.mean(differences) / 4)
        assert error == pytest.approx(statistics.stdev(differences) / 2 / 4)
        # Twice the bits on twice the bytes is the same figure, without any error.
        assert paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], (10, 20, 30)) == (0.1, pytest.approx(0))
        assert paired_difference([2.0], [1.0], (10,)) == (0.1, math.inf)

    def test_weights_from_scores(self) -> None:
        assert proportional([0.2, 0.6]) == (0.25, 0.75)
        assert proportional([0.0, 0.5]) == (0.0, 1.0)
        assert proportional([0.0, 0.0]) is None
        assert proportional([]) is None
        assert sum(rounded([1 / 3] * 3)) == pytest.approx(1, abs=1e-12)
        assert rounded([1 / 3] * 3) == (0.334, 0.333, 0.333)

    def test_weights_from_likelihood_are_those_of_one_item(self) -> None:
        """Of 200 short answers, members that are nearly alike count nearly alike."""
        bits = [[2.23 * 15] * 200, [2.33 * 15] * 200]
        found = from_likelihood(bits, sharpness=1 / 16)
        odds = math.exp(0.1 * 15 * math.log(2) / 16)
        assert found == pytest.approx((odds / (1 + odds), 1 / (1 + odds)), abs=1e-3)
        assert from_likelihood(bits[::-1], sharpness=1 / 16) == found[::-1]
        # The geometric mean of what `prompt_weights` gives for each item, as the prompt.
        several = [[20.0, 70.0, 3.0], [50.0, 40.0, 8.0]]
        each = []
        for pair in zip(*several, strict=True):
            scores = [PromptScore([9], [-one * math.log(2)]) for one in pair]
            each.append(prompt_weights(scores, [0.5, 0.5], 1 / 16))
        means = [math.prod(own) ** (1 / 3) for own in zip(*each, strict=True)]
        by_hand = [one / sum(means) for one in means]
        assert from_likelihood(several, sharpness=1 / 16) == pytest.approx(by_hand, abs=1e-3)
        # Who finds an item impossible counts for nothing, unless all do.
        assert from_likelihood([[1.0, math.inf], [9.0, 9.0]], sharpness=1 / 16) == (0.0, 1.0)
        assert from_likelihood([[math.inf], [math.inf]], sharpness=1 / 16) is None

    def test_the_defaults_are_the_ensembles(self) -> None:
        settings = FusionSettings()
        default = Space(2).default(0)
        assert default.learning_rate == settings.learning_rate
        assert default.recipe == RECIPES[0] == settings.recipe
        assert default.confidence == settings.confidence
        assert Space(2).distance(default) == (0, 0)
        assert Space(2, ()).default(1) == Configuration(1, (0.5, 0.5))


class TestDevItems:
    """What settings are chosen on."""

    def test_a_tasks_dev_items(self, data: Path) -> None:
        dev = DevSet.from_task("nq", data)
        assert len(dev.items) == len(QUESTIONS) - 2
        answers = [one.text for one in dev.items]
        assert sorted(answers) == sorted(f"{answer}\n" for answer in list(QUESTIONS.values())[2:])
        assert answers != [f"{answer}\n" for answer in list(QUESTIONS.values())[2:]]  # mixed
        assert all(one.context.startswith("Answer this questions:\n") for one in dev.items)
        assert dev == DevSet.from_task("nq", data)
        assert len(DevSet.from_task("nq", data, 3).items) == 3

        letters = DevSet.from_task("arc_challenge", data)
        assert (len(letters.items), letters.left_out) == (6, 1)  # one has no options
        assert {one.text for one in letters.items} == {" B"}

    def test_a_test_split_cannot_be_named(self, data: Path) -> None:
        with pytest.raises(
            InputError, match=r"piqa has no dev split .* never chosen on a test split; .*--text"
        ):
            DevSet.from_task("piqa", data)
        with pytest.raises(InputError, match="is a test split"):
            DevSet.from_text(data / "piqa" / "test.jsonl")
        with pytest.raises(InputError, match=r"task is '../nq'; use one of gsm8k"):
            DevSet.from_task("../nq", data)
        with pytest.raises(InputError, match=r"there is no .*dev\.jsonl"):
            DevSet.from_task("nq", data / "elsewhere")

    def test_a_text(self, tmp_path: Path) -> None:
        text = "".join(f"The {n}th line says naïvely that {n} times {n} is {n * n}.\n" for n in range(60))
        file = tmp_path / "some.txt"
        file.write_text(text, encoding="utf-8")
        dev = DevSet.from_text(file)
        assert dev.task is None
        assert len(dev.items) > 4
        assert sum(len(one.text) for one in dev.items) == len(text)
        assert all(one.context + one.text in text for one in dev.items)
        few = DevSet.from_text(file, 2)
        assert len(few.items) == 2
        assert set(few.items) < set(dev.items)
        file.write_bytes(text.replace("\n", "\r\n").encode())
        written = "".join(one.text for one in DevSet.from_text(file).items)
        assert written.count("\r\n") == written.count("\n") == 60
        for wrong, message in ((b"\xff", "cannot be read"), (b" \n", "is empty")):
            file.write_bytes(wrong)
            with pytest.raises(InputError, match=message):
                DevSet.from_text(file)
        with pytest.raises(InputError, match="cannot be read"):
            DevSet.from_text(tmp_path / "none.txt")
        file.write_text(text[:300], encoding="utf-8")
        with pytest.raises(InputError, match="give a text of more than 400 characters, and a limit of 2"):
            DevSet.from_text(file)
        lines = tmp_path / "dev.jsonl"
        lines.write_text('{"question": "Who?"}\n', encoding="utf-8")
        with pytest.raises(InputError, match="lines of JSON would be read as they stand"):
            DevSet.from_text(lines)


DEMO = ["demo:smollm2-135m-instruct", "demo:gemma-3-270m"]


def remeasured(preset: Preset, dev: DevSet, smollm2: Member, gemma: Member) -> float:
    """Bits a byte of the dev items under a preset, with an ensemble made from it alone."""
    members = dict(zip(DEMO, (smollm2, gemma), strict=True))
    ensemble = Ensemble([members[name] for name in preset.members], **preset.settings())
    found = [
        TextReading(ensemble.members, one.context, one.text).fused(ensemble, ensemble.weights)
        for one in dev.items
    ]
    return -sum(one.total for one in found) / math.log(2) / sum(one.nbytes for one in found)


def test_what_was_read_is_measured_again_without_the_caches(
    smollm2: Member, gemma: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`TextReading.release`: other weights and other fusers need no model."""
    ensemble = Ensemble([smollm2, gemma], recipe="bytes")
    reading = TextReading([smollm2, gemma], "The naïve café sells", " straw\u00adberries 🍓🍓 to Zürich.")
    first = reading.fused(ensemble)
    reading.release()
    with monkeypatch.context() as patch:
        patch.setattr(readings.Reading, "_opened", None)  # every use of a session begins with it
        assert reading.fused(ensemble) == first
        assert reading.fused(ensemble, [0.9, 0.1]).total != first.total
        assert reading.fused(ensemble.variant(fuser="average")).total != first.total
    swapped = Ensemble([gemma, smollm2], recipe="bytes")  # in whose tokens nobody has measured yet
    again = reading.fused(swapped)
    assert again.total == pytest.approx(
        TextReading([gemma, smollm2], reading.context, reading.text).fused(swapped).total, abs=1e-4
    )


class TestTune:
    """On the embedded pair; on members of a few weights where any would do."""

    def test_a_swapped_pair_and_never_worse_than_uniform(
        self, smollm2: Member, gemma: Member, data: Path
    ) -> None:
        """And the preset gives the likelihood that it says."""
        dev = DevSet.from_task("nq", data, 6)
        named = tune([smollm2, gemma], dev, recipes=("bytes",))
        swapped = tune([gemma, smollm2], dev, recipes=("bytes",))
        for one in (named, swapped):
            assert one.ended == "finished"
            assert len(one.tried) > 10
            assert len(one.sizes) == len(dev.items) == one.answered
            uniform = [one.bits_per_byte(one.space.default(main)) for main in range(2)]
            assert uniform[0] != uniform[1]
            assert one.bits_per_byte(one.chosen) <= min(uniform)
            assert one.baseline.main == uniform.index(min(uniform))
            assert all(0 < share <= 1 for share in one.accuracy)
        assert named.names[named.chosen.main] == swapped.names[swapped.chosen.main]
        assert named.chosen.ordered_weights() == swapped.chosen.ordered_weights()
        bits = swapped.bits_per_byte(swapped.chosen)
        assert named.bits_per_byte(named.chosen) == pytest.approx(bits, abs=1e-5)

        preset = named.preset(DEMO, dev, "deepen:bytes")
        assert {key: preset.measured[key] for key in ("task", "split", "items")} == {
            "task": "nq",
            "split": "dev",
            "items": 6,
        }
        assert remeasured(preset, dev, smollm2, gemma) == pytest.approx(bits, abs=1e-4)
        assert preset.measured["bits_per_byte"]["chosen"] == pytest.approx(bits, abs=1e-5)

    def test_recipe_and_temperature(self, one_byte_folders: list[Path], data: Path) -> None:
        members, dev = load_members(one_byte_folders), DevSet.from_task("nq", data, 2)
        for one in members:  # surer of their tokens, some of which are alike
            one.model.get_output_embeddings().weight.data *= 20
            one.model.get_input_embeddings().weight.data[:, 3:] *= 0.1
        tuning = tune(members, dev, recipes=("calibrated",))
        assert {one.recipe for one in tuning.tried} == {"calibrated"}
        assert len({one.temperature for one in tuning.tried}) > 2
        assert len({one.learning_rate for one in tuning.tried}) > 2
        assert len({one.confidence for one in tuning.tried}) > 1
        hot = next(one for one in tuning.tried if one.temperature == 20)
        sure = next(one for one in tuning.tried if one.confidence)
        for chosen, setting in ((hot, "relative_temperature"), (sure, "confidence")):
            preset = replace(tuning, chosen=chosen).preset(DEMO, dev, "deepen")
            assert preset.settings()["relative_temperature"] == chosen.temperature
            assert preset.settings().get("confidence", 0) == chosen.confidence
            bits = tuning.bits_per_byte(chosen)
            assert remeasured(preset, dev, *members) == pytest.approx(bits, abs=1e-4)
            others = {key: value for key, value in preset.given.items() if key != setting}
            without = remeasured(replace(preset, given=others), dev, *members)
            assert without != pytest.approx(bits, abs=2e-4)

    def test_no_time_for_a_search(self, smollm2: Member, gemma: Member, data: Path) -> None:
        tuning = tune([smollm2, gemma], DevSet.from_task("nq", data), minutes=1e-6, recipes=("bytes",))
        assert len(tuning.sizes) == 2  # as many as an error needs
        assert set(tuning.tried) == {tuning.space.default(0), tuning.space.default(1)}
        assert tuning.ended == "ended by the time"
        assert tuning.accuracy == ()
        assert tuning.chosen == tuning.baseline

    def test_interrupted(
        self, one_byte_folders: list[Path], data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The search ends, and what was tried counts; before anything was tried, it is the caller's."""
        members, dev = load_members(one_byte_folders), DevSet.from_task("nq", data)
        with monkeypatch.context() as patch:
            patch.setattr(Measurements, "measure", interrupting(Measurements.measure, 5))
            short = tune(members, dev, fuser="union-vocab", gate=True)
        with monkeypatch.context() as patch:
            patch.setattr(Measurements, "gate", interrupting(Measurements.gate, 0))
            whole = tune(members, dev, fuser="union-vocab", gate=True)
        assert short.ended == whole.ended == "interrupted"
        assert short.gate is whole.gate is None
        assert 2 < len(short.tried) < len(whole.tried)
        assert list(whole.tried)[: len(short.tried)] == list(short.tried)
        assert short.chosen in short.tried
        with monkeypatch.context() as patch:
            patch.setattr(Measurements, "save_rows", interrupting(Measurements.save_rows, 0))
            assert tune(members, dev, fuser="union-vocab").ended == "finished"  # that is a cache alone
        monkeypatch.setattr(Measurements, "_read", interrupting(Measurements._read, 1))
        with pytest.raises(KeyboardInterrupt):
            tune(members, dev)

    def test_another_fuser_and_a_text(self, smollm2: Member, gemma: Member, tmp_path: Path) -> None:
        file = tmp_path / "some.txt"
        file.write_text("A text in which nothing much happens, but it happens twice. " * 8, encoding="utf-8")
        tuning = tune([gemma, smollm2], DevSet.from_text(file), fuser="average")
        assert tuning.ended == "finished"
        assert {one.recipe for one in tuning.tried} == {None}
        assert tuning.accuracy == ()
        assert {one.source for one in tuning.tried} >= {"uniform", "likelihood", "grid"}
        assert all(one.main in (0, 1) and sum(one.weights) == pytest.approx(1) for one in tuning.tried)

    def test_an_item_that_is_impossible_whatever_is_chosen(
        self, smollm2: Member, gemma: Member, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dev = DevSet.from_task("nq", data, 2)
        monkeypatch.setattr(
            Measurements,
            "_bits",
            lambda self, reading, ensemble, one: math.inf if reading.text == dev.items[1].text else 8.0,
        )
        text = re.escape(repr(dev.items[1].text))
        with pytest.raises(InputError, match=f"some dev item has probability 0, such as {text}, so they"):
            tune([smollm2, gemma], dev, fuser="union-topk")

    @pytest.mark.parametrize("last", ["one", "two"])
    def test_an_item_that_cannot_be_read_is_told_before_anything_is_measured(
        self, one_byte_folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
    ) -> None:
        """It was told when it came to be read: what had been measured until then was lost."""
        monkeypatch.setattr(Measurements, "read", lambda _: pytest.fail("items were read"))
        members = load_members(one_byte_folders)  # of a context of 400 tokens
        dev = DevSet("nq", (DevItem("Question", " yes"), DevItem("Question" * 60, " no")))
        says = "nq, a piece that begins with ' no': .* 483 tokens, more than its context of 400"
        if last == "two":
            item = Item(7, "", ("no",), {})
            dev = DevSet("nq", (*dev.items[:1], replace(dev.items[1], item=item)), TASKS["nq"])
            says = says.replace("a piece that begins with ' no'", r"line 8 of dev\.jsonl")
        with pytest.raises(InputError, match=says):
            tune(members, dev)

    def test_looking_at_a_long_text_leaves_the_time_for_measuring(self, one_byte_folders: list[Path]) -> None:
        """10 s a megabyte: a text of 60 MB took the whole budget, without a word."""
        members = load_members(one_byte_folders)
        long = DevItem("Question" * 60, " no")
        said: list[str] = []
        for seconds, found in ((60.0, pytest.raises(InputError, match="483 tokens")), (1e-9, nullcontext())):
            work = Measurements(
                members, DevSet("text", (long, long)), Space(2, ()), "average", seconds, said.append
            )
            with found:
                work.check_items()
        assert said == ["Checking dev items"] * 2

    def test_wrong_input(self, smollm2: Member, gemma: Member, data: Path) -> None:
        dev = DevSet.from_task("nq", data, 2)
        with pytest.raises(InputError, match="a model alone has nothing to tune"):
            tune([smollm2], dev)
        with pytest.raises(InputError, match="a model alone has nothing to tune"):
            tune([smollm2, gemma], dev, fuser="single")
        with pytest.raises(InputError, match=r"fuser='auto' .* name the one to tune, such as deepen"):
            tune([smollm2, gemma], dev, fuser="auto")
        for minutes in (0, -1, math.inf, math.nan):
            with pytest.raises(InputError, match="choose a budget above 0"):
                tune([smollm2, gemma], dev, minutes=minutes)


def interrupting(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """A function that Ctrl-C comes into after so many calls."""
    numbers = count()

    def called(*arguments: Any, **options: Any) -> Any:
        if next(numbers) == calls:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return called


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The names of all files that this process opens meanwhile."""
    seen: list[str] = []
    listening = True
    # An audit hook cannot be taken away again.
    sys.addaudithook(
        lambda event, given: seen.append(str(given[0])) if listening and event == "open" else None
    )
    yield seen
    listening = False


NOWHERE = ["--model", "/no/such", "--model", "/no/other"]  # told of last, when models are loaded


class TestCommand:
    """`deepen-ext tune`."""

    def run(self, *arguments: str | Path) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["tune", *map(str, arguments)])
        return done.exit_code, done.output

    def test_writes_a_preset_from_dev_files_alone(self, data: Path, tmp_path: Path) -> None:
        out = tmp_path / "new" / "preset.yaml"
        (data / "arc_challenge" / "test.jsonl").write_text("not even JSON", encoding="utf-8")
        task = ["--demo", "--task", "arc_challenge", "--data", data, "--limit", 3]
        with opened_files() as seen:
            options = ["--backend", "transformers", "--dtype", "float32", "--dtype", "-"]
            code, printed = self.run(
                *task, *options, "--trust-remote-code", "--fuser", "deepen:bytes", "--out", out
            )
        assert code == 0, printed
        assert " right of 3 " in printed
        assert any("dev.jsonl" in one for one in seen)
        assert not any("test.jsonl" in one for one in seen)
        assert "3 of 3 dev items of arc_challenge" in printed
        assert f"Written to {out}; use it with --preset {out}" in printed
        preset = load_preset(out)
        assert sorted(preset.members) == ["demo:gemma-3-270m", "demo:smollm2-135m-instruct"]
        dtype = ["float32" if "smollm2" in name else None for name in preset.members]
        assert preset.load_options() == {"backend": "transformers", "dtype": dtype}
        assert set(preset.measured["backends"].values()) == {f"transformers {transformers.__version__}"}
        assert preset.settings()["fuser"] == "deepen"
        assert preset.settings()["recipe"] == "bytes"
        assert set(preset.measured) >= {"task", "split", "items", "bits_per_byte", "versions", "date"}
        assert preset.measured["bits_per_byte"]["single"].keys() == {"SmolLM2-135M-Instruct", "Gemma-3-270M"}

    def test_what_was_found_is_shown_where_it_cannot_be_written(
        self, one_byte_folders: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise InputError("the disk is full")

        monkeypatch.setattr("deepen_ext.presets.write_preset", refuse)
        members = [one for folder in one_byte_folders for one in ("--model", folder)]
        new = tmp_path / "new" / "preset.yaml"
        code, printed = self.run(*members, "--task", "nq", "--data", data, "--limit", 2, "--out", new)
        assert code == 2
        assert "the disk is full" in printed
        assert "Bits a byte on 2 of 2 dev items of nq" in printed
        assert not (tmp_path / "new").exists()

    def test_an_interrupted_search_is_written(
        self, one_byte_folders: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was lost, after minutes of measuring."""
        monkeypatch.setattr(Measurements, "measure", interrupting(Measurements.measure, 3))
        out = tmp_path / "preset.yaml"
        members = [one for folder in one_byte_folders for one in ("--model", folder)]
        code, printed = self.run(*members, "--task", "arc_challenge", "--data", data, "--out", out)
        assert code == 130
        assert "on 6 of 6 dev items of arc_challenge (1 without a right continuation left out)" in printed
        assert "Interrupted: this is the choice from what had been tried by then." in printed
        assert load_preset(out).measured["search"] == "interrupted"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--demo"], "say what to choose on: --task TASK with --data DIR, or --text FILE"),
            (["--demo", "--task", "nq", "--text", "a.txt"], "say what to choose on"),
            (["--demo", "--task", "nq"], "--task and --data go together"),
            (["--demo", "--text", "a.txt", "--data", "."], "--task and --data go together"),
            (["--demo", "--task", "piqa", "--data", "DATA"], "piqa has no dev split"),
            (["--demo", "--task", "nq", "--data", "DATA", "--out", "DATA"], "is a folder; name a file"),
            (
                ["--demo", "--task", "nq", "--data", "DATA", "--out", f"{__file__}/new/preset.yaml"],
                f"there is no folder {__file__}; make it first",
            ),
            (["--demo", "--task", "nq", "--data", "DATA", "--out", "/dev/null"], "is a pipe or a device"),
            (["--demo", "--task", "nq", "--data", "DATA", "--fuser", "mean"], "fuser 'mean'"),
            (["--demo", "--task", "nq", "--data", "DATA", "--fuser", "deepen:best"], "recipe is 'best'"),
            ([*NOWHERE, "--task", "nq", "--data", "DATA", "--fuser", "auto"], "fuser='auto' stands for"),
            ([*NOWHERE, "--task", "nq", "--data", "DATA", "--fuser", "spans"], "no likelihood to tune by"),
            ([*NOWHERE, "--task", "nq", "--data", "DATA", "--fuser", "draw"], "likelihood of union-vocab"),
            ([*NOWHERE, "--task", "nq", "--data", "DATA", "--limit", "1"], "equal to 2"),
            ([*NOWHERE, "--text", "DATA/short.txt"], "short.txt: one item alone cannot tell"),
            (["--task", "nq", "--data", "DATA"], "name the models with --model"),
            (["--model", "a", "--task", "nq", "--data", "DATA"], "a model alone has nothing to tune"),
        ],
    )
    def test_wrong_input(self, arguments: list[str], message: str, data: Path) -> None:
        (data / "short.txt").write_text("Too short to tell.", encoding="utf-8")
        code, printed = self.run(*[one.replace("DATA", str(data)) for one in arguments])
        assert code == 2
        assert message in printed
