"""What callers give by mistake in place of a number, a tensor or a list: each is named, and what to do."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from sessions import open_session

from deepen_ext import Ensemble, InputError, fuse_logits
from deepen_ext.decoding.setting_rules import check_seed
from deepen_ext.fusers.weights import check_weights
from deepen_ext.ground.numbers import real_number, whole_number
from deepen_ext.measure.likelihood.text_pieces import pieces
from deepen_ext.members.chat import chat_texts
from deepen_ext.members.member import Member
from deepen_ext.space.relative_map import RelativeMap
from deepen_ext.space.row_sources import SimilarityRows

VOCAB, ANCHORS = 30, 12


@pytest.fixture(scope="module")
def maps() -> list[RelativeMap]:
    draw = torch.Generator().manual_seed(0)
    return [RelativeMap.from_dense(torch.rand(VOCAB, ANCHORS, generator=draw).softmax(-1)) for _ in range(2)]


@pytest.fixture(scope="module")
def pair(tiny_smollm2: Member, tiny_gemma: Member) -> Ensemble:
    return Ensemble([tiny_smollm2, tiny_gemma], cache=False)


def logits() -> list[torch.Tensor]:
    return [torch.randn(1, VOCAB) for _ in range(2)]


def test_whole_numbers() -> None:
    assert whole_number("steps", np.int64(3), 1, 64) == 3
    for value in (2.5, 3.0, True, "3", None, float("nan"), torch.tensor(3)):
        with pytest.raises(InputError, match=r"steps is .*; give a whole number, 1 to 64"):
            whole_number("steps", value, 1, 64)
    with pytest.raises(InputError, match="steps is 65; choose 1 to 64"):
        whole_number("steps", 65, 1, 64)
    with pytest.raises(InputError, match="entries is 0; choose 1 or more"):
        whole_number("entries", 0, 1)


def test_numbers() -> None:
    for value in (np.float32(0.5), torch.tensor(0.5), 0.5):
        assert real_number("rate", value, "above 0", lambda x: x > 0) == 0.5
    for value in ("0.5", True, None, [0.5]):
        with pytest.raises(InputError, match=r"rate is .*; give a number, above 0"):
            real_number("rate", value, "above 0", lambda x: x > 0)
    for value in (float("nan"), -1, 10**400):
        with pytest.raises(InputError, match=r"rate is .*; choose 0 to 1"):
            real_number("rate", value, "0 to 1", lambda x: 0 <= x <= 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "0.5"}, "learning_rate is '0.5', a str; give a number"),
        ({"learning_rate": True}, "learning_rate is True"),
        ({"steps": 2.5}, "steps is 2.5; give a whole number, 1 to 64"),
        ({"steps": True}, "steps is True"),
        ({"candidates": 2.5}, "candidates is 2.5; give a whole number, 1 or more"),
        ({"candidates": "8"}, "candidates is '8'"),
        ({"weights": ["0.5", "0.5"]}, "weight is '0.5'"),
        ({"weights": 0.5}, "weights is 0.5; give a list"),
    ],
)
def test_settings_of_a_step(maps: list[RelativeMap], settings: dict[str, object], message: str) -> None:
    given = {"weights": [0.5, 0.5], "learning_rate": 0.2} | settings
    with pytest.raises(InputError, match=message):
        fuse_logits(logits(), maps, **given)


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy])
def test_logits_that_are_no_tensors(maps: list[RelativeMap], member: int, convert) -> None:
    given = logits()
    given[member] = convert(given[member])
    name = type(given[member]).__name__
    with pytest.raises(InputError, match=rf"logits of member {member} must be a torch.Tensor .* not {name}"):
        fuse_logits(given, maps, [0.5, 0.5], learning_rate=0.2)


def test_logits_in_one_array(maps: list[RelativeMap]) -> None:
    with pytest.raises(InputError, match="the logits are a ndarray; give a list"):
        fuse_logits(np.zeros((2, 1, VOCAB)), maps, [0.5, 0.5], learning_rate=0.2)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0.0, 1.7]), "anchor_ids is float32; give whole numbers"),
        (torch.ones(VOCAB, dtype=torch.bool), r"anchor_ids is a mask .*nonzero"),
        ([0, 1], "anchor_ids must be a torch.Tensor of ids, not list"),
    ],
)
def test_anchors_that_are_no_ids(ids, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SimilarityRows(torch.randn(VOCAB, 4), ids)
    relative = RelativeMap.from_embedding(torch.randn(VOCAB, 4), torch.arange(8))
    with pytest.raises(InputError, match=message.replace("anchor_ids", "ids")):
        relative.ensure(ids)


@pytest.mark.parametrize("value", [1.5, True, "2"])
def test_counts_elsewhere(pair: Ensemble, tiny_smollm2: Member, value) -> None:
    with pytest.raises(InputError, match=f"the batch size is {value!r}; give a whole number"):
        pair.generate(["One", "Two"], batch_size=value)
    with pytest.raises(InputError, match=f"max_new_tokens is {value!r}; give a whole number"):
        pair.generate("One", max_new_tokens=value)
    with pytest.raises(InputError, match=f"entries is {value!r}"):
        SimilarityRows(torch.randn(VOCAB, 4), torch.arange(8), entries=value)
    with pytest.raises(InputError, match=f"number of lanes is {value!r}"):
        open_session(tiny_smollm2, value)
    with pytest.raises(InputError, match=f"length is {value!r}"):
        pieces("a text", length=value)


@pytest.mark.parametrize("name", ["confidence_gate", "temperature"])
def test_numbers_elsewhere(pair: Ensemble, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is '0.5', a str"):
        pair.generate("One", do_sample=True, **{name: "0.5"})
    with pytest.raises(InputError, match=r"min_probability is '0.5', a str"):
        pair.variant(min_probability="0.5")


def test_seeds() -> None:
    for seed in (2**62, -(2**62), 0, None):
        assert check_seed(seed) == seed
    for seed in (2**62 + 1, 2**80, -(2**62) - 1):
        with pytest.raises(
            InputError, match=f"seed is {seed}; choose -4611686018427387904 to 4611686018427387904"
        ):
            check_seed(seed)


def test_weights_as_a_tensor() -> None:
    assert check_weights(torch.tensor([0.25, 0.75]), 2) == [0.25, 0.75]


def test_prompts_that_are_no_list(pair: Ensemble) -> None:
    with pytest.raises(InputError, match=r"the prompt is a generator; .*list\(...\)"):
        pair.generate(text for text in ["One", "Two"])


def test_two_readers_of_one_stream(pair: Ensemble) -> None:
    """The second is told; the first goes on to the end, and closing the stream in a step frees it later."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert go_on.wait(60)
        return scores

    found: list[str] = []
    stream = pair.stream("One two three", max_new_tokens=3, logits_processor=[wait])
    reader = threading.Thread(target=lambda: found.extend(stream))
    reader.start()
    assert inside.wait(60)
    try:
        for own in (stream, stream._run):
            with pytest.raises(InputError, match="is being read already"):
                next(iter(own))
    finally:
        go_on.set()
        reader.join()
    assert len(stream.result.token_ids) == 3
    assert "".join(found) == stream.result.text


@pytest.mark.parametrize("shorten", ["message['content'].split() | join(' ')", "message['content'] | trim"])
def test_a_template_that_collapses_spaces_leaves_nothing_out(tiny_smollm2: Member, shorten: str) -> None:
    member = copy.copy(tiny_smollm2)
    member.tokenizer = copy.deepcopy(tiny_smollm2.tokenizer)
    member.tokenizer.chat_template = "{% for message in messages %}{{ " + shorten + " }}{% endfor %}"
    chat = [{"role": "user", "content": "  def f(x):\n\n    return  x\n"}]
    (text,) = chat_texts([member], chat)
    assert "return" in text.text
    member.tokenizer.chat_template = "{% for message in messages %}{{ message['content'][:9] }}{% endfor %}"
    with pytest.raises(InputError, match="leaves out the user message"):
        chat_texts([member], chat)


@pytest.mark.parametrize("arguments", ["generate --demo --prompt One --max-new-tokens 1", "doctor --demo"])
def test_standard_output_closed(arguments: str) -> None:
    """By the caller, as a service may do; said before any model is loaded."""
    command = f"{sys.executable} -m deepen_ext.commands.cli {arguments} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stderr == "error: standard output is closed; send it to a file, or to /dev/null\n"
    assert done.returncode == 2
