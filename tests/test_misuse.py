"""What a program that uses the package may hand over by mistake, and lists that it changes later."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepen_ext import Ensemble, InputError, fuse_logits
from deepen_ext.adapters import DeepenLogitsProcessor
from deepen_ext.adapters.lm_eval_args import ensemble_from
from deepen_ext.decoding.choice_error import ChoiceError
from deepen_ext.measure.evaluation.headers import configuration_header
from deepen_ext.measure.evaluation.runner import evaluate
from deepen_ext.measure.tuning.dev_items import DevSet
from deepen_ext.measure.tuning.tune import tune
from deepen_ext.members.loading import load_member, load_members
from deepen_ext.members.member import Member
from deepen_ext.members.source import find_adapter
from deepen_ext.ops.fuse import MOST_MEMBERS
from deepen_ext.presets import load_preset


@pytest.fixture(scope="module")
def members(one_byte_folders: list[Path]) -> list[Member]:
    return load_members(one_byte_folders)


@pytest.fixture(scope="module")
def ensemble(members: list[Member]) -> Ensemble:
    return Ensemble(members, fuser="deepen", cache=False)


class TestGenerate:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"certified_skip": "no"}, "certified_skip is 'no'; give True or False"),
            ({"without_template": "x"}, "without_template is 'x'; use 'error' or 'plain'"),
            ({"stop_strings": 5}, "stop_strings must be non-empty strings, not 5"),
            ({"stop_strings": False}, "stop_strings must be non-empty strings, not False"),
            ({"stop_strings": b"ab"}, "stop_strings must be non-empty strings, not b'ab'"),
            ({"prefix_allowed_tokens_fn": "x"}, "prefix_allowed_tokens_fn is 'x'; give a function"),
            ({"exponential_decay_length_penalty": (1,)}, "transformers refuses a setting: .*index"),
            ({"on_text": "x"}, "on_text is 'x'; give a function"),
            ({"streamer": 5}, "streamer is 5; give an object with put and end"),
            ({"shared": True}, "shared is True; give a SharedForwards"),
        ],
    )
    def test_a_wrong_value(self, ensemble: Ensemble, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            ensemble.generate("some words", max_new_tokens=2, **settings)

    @pytest.mark.parametrize(
        ("given", "what"),
        [
            (lambda scores: scores[:, :5], r"\[1, 5\]"),  # would leave the first five tokens, without a word
            (lambda scores: scores[0], r"\[257\]"),
            (lambda _: None, "NoneType"),
        ],
    )
    def test_a_processor_that_gives_no_scores(
        self, ensemble: Ensemble, given: Callable[[torch.Tensor], Any], what: str
    ) -> None:
        def own(ids: torch.Tensor, scores: torch.Tensor) -> Any:
            return given(scores)

        with pytest.raises(InputError, match=rf"processor .*own gave {what}; it must return .* \[1, 257\]"):
            ensemble.generate("some words", max_new_tokens=2, logits_processor=[own])

    @pytest.mark.parametrize("best", [math.nan, math.inf, -math.inf])
    def test_the_error_of_a_processor_can_be_pickled(self, best: float) -> None:
        """One that cannot be read again never arrives from a worker process, which then seems to hang."""
        error = ChoiceError(3, best)
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.text) == (str(error), 3)
        assert str(error).startswith("text 3: the processors")


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"boundary_aware": "no"}, "boundary_aware is 'no'; give True or False"),
            ({"cache": "False"}, "cache is 'False'; give True or False"),
            ({"weights": {0.4, 0.6}}, "give a list of numbers, one for each member"),
            ({"weights": {0.4: "a", 0.6: "b"}}, "give a list of numbers, one for each member"),
            ({"weights": b"ab"}, "give a list of numbers, one for each member"),
            ({"on_failure": np.array(["stop", "x"])}, "on_failure is .*; use 'stop' or 'continue'"),
            ({"recipe": np.array(["bytes"])}, "recipe is .*; use one of bytes"),
        ],
    )
    def test_a_wrong_value(self, members: list[Member], settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Ensemble(members, **settings)

    def test_weights_that_can_be_read_once(self, one_byte_folders: list[Path]) -> None:
        """They are looked at before the models are loaded, after that, and by each variant."""

        def weights() -> Iterator[float]:
            yield from (0.4, 0.6)

        ensemble = Ensemble.from_pretrained(one_byte_folders, weights=weights())
        assert ensemble.weights == ensemble.variant(confidence=0.5).weights == [0.4, 0.6]

    @pytest.mark.parametrize("name", ["weights", "gate"])
    def test_a_list_that_the_caller_changes_later(self, members: list[Member], name: str) -> None:
        own = {"weights": [0.4, 0.6], "gate": [-0.5, 0.0, 0.0, 0.5]}
        ensemble = Ensemble(members, weighing="gate", **own)
        before = ensemble.fuser.weighing
        own[name][:] = [7.0] * len(own[name])
        again = ensemble.variant(margin=0.5)
        assert again.weights == [0.4, 0.6]
        assert again.fuser.weighing == before

    @pytest.mark.parametrize("number", [np.float32, torch.tensor])
    def test_numbers_of_other_libraries_are_floats_in_records(
        self, members: list[Member], number: Callable[[float], Any]
    ) -> None:
        """A header that could not be written, or had no such setting, was seen after the models' work."""
        for settings in ({"sharpness": 0.125}, {"fuser": "spans", "margin": 0.5}):
            own = {
                name: value if isinstance(value, str) else number(value) for name, value in settings.items()
            }
            headers = [
                configuration_header("a", Ensemble(members, **one), certified_skip=False, share_forwards=True)
                for one in (own, settings)
            ]
            assert json.dumps(headers[0]) == json.dumps(headers[1])

    def test_maps_are_not_the_ensembles_own_list(self, ensemble: Ensemble) -> None:
        ensemble.maps.clear()
        assert len(ensemble.maps) == 2


class TestAStepOfOnesOwn:
    @pytest.fixture
    def logits(self) -> list[torch.Tensor]:
        return [torch.randn(2, 257), torch.randn(1, 257)]

    @pytest.mark.parametrize(
        "weights",
        [[], [1.0], [0.5, 0.3, 0.2], None, "ab", np.array([0.5, 0.5]), [[0.5, 0.5], [1.0]], ["a", "b"]],
        ids=str,
    )
    def test_weights(self, ensemble: Ensemble, logits: list[torch.Tensor], weights: Any) -> None:
        with pytest.raises(InputError, match="weight"):
            ensemble.fuser.step(logits, weights, rows=[None, [1]])

    @pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
    @pytest.mark.parametrize("fuser", ["deepen", "average", "product"])
    def test_a_weight_that_is_none(
        self, members: list[Member], logits: list[torch.Tensor], fuser: str, weight: float
    ) -> None:
        step = Ensemble(members, fuser=fuser, cache=False).fuser.step
        with pytest.raises(InputError, match=r"weight is .*choose a number of 0 or more"):
            step(logits, [0.5, weight], rows=[None, [1]])

    @pytest.mark.parametrize(
        "rows", [[None], [None, 5], 5, [None, [2]], [None, [-1]], [None, [True]], [[0], [1]]], ids=str
    )
    def test_rows(self, ensemble: Ensemble, logits: list[torch.Tensor], rows: Any) -> None:
        with pytest.raises(InputError, match="rows"):
            ensemble.fuser.step(logits, [0.5, 0.5], rows=rows)

    def test_rows_in_rising_order(self, ensemble: Ensemble) -> None:
        with pytest.raises(InputError, match="in rising order"):
            ensemble.fuser.step([torch.randn(2, 257)] * 2, [0.5, 0.5], rows=[None, [1, 0]])

    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_weights_that_are_numbers_of_another_kind(
        self, ensemble: Ensemble, logits: list[torch.Tensor], batch: int
    ) -> None:
        given = [one[:1].expand(batch, -1).contiguous() for one in logits]
        want = ensemble.fuser.step(given, [0.5, 0.5]).logits
        for half in (np.float32(0.5), torch.tensor(0.5)):
            assert torch.equal(ensemble.fuser.step(given, [half, half]).logits, want)

    @pytest.mark.parametrize("fuser", ["deepen", "follow"])
    def test_more_members_than_the_search_takes(self, members: list[Member], fuser: str) -> None:
        header = (Path(__file__).parents[1] / "csrc" / "ops" / "fuse.h").read_text()
        assert f"constexpr int kMaxMembers = {MOST_MEMBERS};" in header
        many = [members[0], *members[1:2] * MOST_MEMBERS]
        assert Ensemble(many[:-1], fuser=fuser, cache=False).generate("a", max_new_tokens=1).token_ids
        with pytest.raises(InputError, match="there are 17 members, and the search fuses at most 16"):
            Ensemble(many, fuser=fuser, cache=False)

    @pytest.mark.parametrize("maps", ["ab", [1, 2]])
    def test_maps(self, maps: Any) -> None:
        with pytest.raises(InputError, match="maps"):
            fuse_logits([torch.randn(1, 257)] * 2, maps, [0.5, 0.5], learning_rate=0.1)


class TestNames:
    @pytest.mark.parametrize(
        "name", ["~nobody-of-this-name/a", "a/" + "b" * 5000 + "/c", "~nobody-of-this-name@a/b/c"]
    )
    def test_a_model_that_is_no_path(self, name: str) -> None:
        with pytest.raises(InputError, match="no such file or folder"):
            load_member(name)

    def test_an_adapter(self) -> None:
        with pytest.raises(InputError, match="no folder of an adapter"):
            find_adapter("a/" + "b" * 5000 + "/c")

    def test_other_files(self, ensemble: Ensemble) -> None:
        """`~` of nobody's home is a folder of that name, as in a shell."""
        file = "~nobody-of-this-name/file"
        with pytest.raises(InputError, match=f"{file}: cannot be read"):
            load_preset(file)
        with pytest.raises(InputError, match=f"cannot be written to {file}: No such file"):
            ensemble.generate("some words", max_new_tokens=1, trace=file)


class TestLmEval:
    @pytest.mark.parametrize("weights", [[True, False], np.array([0.5, 0.5]), [0.5, None]], ids=str)
    def test_weights(self, one_byte_folders: list[Path], weights: Any) -> None:
        with pytest.raises(InputError, match="weight is "):
            ensemble_from([str(one) for one in one_byte_folders], {"weights": weights})


class TestMeasuring:
    @pytest.mark.parametrize("name", ["fresh", "share_forwards", "certified_skip"])
    def test_switches_of_an_evaluation(self, ensemble: Ensemble, tmp_path: Path, name: str) -> None:
        """What the folder holds would be dropped by fresh="no"."""
        switch: dict[str, Any] = {name: "no"}
        with pytest.raises(InputError, match=f"{name} is 'no'; give True or False"):
            evaluate({"a": ensemble}, "nq", tmp_path, out=tmp_path, **switch)

    @pytest.mark.parametrize(
        ("named", "message"),
        [
            (lambda member, own: {"a": own, "b": member}, r"b is a Member; give Ensemble\(\[member"),
            (lambda member, own: {"a": own, "b": "org/b"}, "b is a str; give an Ensemble, or a Poll"),
            (lambda member, own: {"a": own, "b": None}, "b is a NoneType; give an Ensemble, or a Poll"),
            (lambda member, own: {1: own}, "1 is no name of a configuration; give a text"),
            (lambda member, own: {"a": own, None: own}, "None is no name of a configuration"),
            (lambda member, own: {"": own}, "'' is no name of a configuration"),
        ],
    )
    def test_what_an_evaluation_compares(
        self,
        members: list[Member],
        ensemble: Ensemble,
        tmp_path: Path,
        named: Callable[[Member, Ensemble], Any],
        message: str,
    ) -> None:
        """A member would be left out of the results without a word."""
        with pytest.raises(InputError, match=message):
            evaluate(named(members[0], ensemble), "nq", tmp_path, out=tmp_path)

    def test_the_switch_of_tuning(self, members: list[Member], tmp_path: Path) -> None:
        text = tmp_path / "words.txt"
        text.write_text("some words. " * 300)
        with pytest.raises(InputError, match="gate is 'no'; give True or False"):
            tune(members, DevSet.from_text(text), gate="no")  # type: ignore[arg-type]


class TestLogitsProcessor:
    @pytest.mark.parametrize("given", [np.int64(5), torch.tensor(5)], ids=str)
    def test_eos_ids(self, ensemble: Ensemble, given: Any) -> None:
        with DeepenLogitsProcessor(ensemble, eos_token_id=given) as fused:
            scores = fused(torch.tensor([[70, 71, 72]]), torch.randn(1, 257))
        assert torch.isfinite(scores).any()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"eos_token_id": True}, "eos_token_id is True; token ids .* lie in 0..256"),
            ({"eos_token_id": [257]}, r"eos_token_id is \[257\]; token ids .* lie in 0..256"),
            ({"pad_token_id": "0"}, "pad_token_id is '0'; token ids .* lie in 0..256"),
            ({"pad_token_id": [1, 2]}, r"pad_token_id is \[1, 2\]; give one token id"),
            ({"without_template": "x"}, "without_template is 'x'"),
            ({"messages": 5}, "messages is 5; give a chat, or a list of chats"),
        ],
    )
    def test_a_wrong_value(self, ensemble: Ensemble, given: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            DeepenLogitsProcessor(ensemble, **given)
