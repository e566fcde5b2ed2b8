"""`deepen_ext.fuse_logits`: the authors' outputs, the reference on the same rows, and bad input."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from golden_cases import golden_case, golden_names
from oracle import random_embedding, random_logits

from deepen_ext import InputError, RelativeMap, fuse_logits
from deepen_ext.fusers import DeepenFuser, reference
from deepen_ext.ops.copy import plain_copy


@pytest.mark.parametrize("name", golden_names())
def test_golden_with_dense_maps(name):
    case = golden_case(name)
    maps = [RelativeMap.from_dense(matrix) for matrix in case.each("relative")]
    logits = case.each("logits")
    fused = fuse_logits(
        logits,
        maps,
        case.weights,
        learning_rate=case.learning_rate,
        steps=case.steps,
        candidates=max(one.shape[1] for one in logits),
    )
    torch.testing.assert_close(fused, case.tensors["fused_logits"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", golden_names())
@pytest.mark.parametrize("recipe", ["calibrated", "paper"])
def test_sparse_maps_equal_the_reference_on_the_same_rows(name, recipe):
    case = golden_case(name)
    maps = [
        RelativeMap.from_embedding(embedding, anchors, recipe, entries=12)
        for embedding, anchors in zip(case.each("embedding"), case.each("anchors"), strict=True)
    ]
    logits = case.each("logits")
    settings = {"learning_rate": case.learning_rate, "steps": case.steps}
    fused = fuse_logits(logits, maps, case.weights, candidates=10_000, **settings)
    dense = [one.to_dense().double() for one in maps]
    want = reference.fuse_logits([one.double() for one in logits], dense, case.weights, **settings)
    torch.testing.assert_close(fused.double(), want, atol=1e-3, rtol=0)


@pytest.fixture
def pair():
    logits = [random_logits(2, 300, seed=0), random_logits(2, 400, seed=1)]
    maps = [
        RelativeMap.from_embedding(random_embedding(vocab, 16, seed=vocab), torch.arange(120), temperature=20)
        for vocab in (300, 400)
    ]
    return logits, maps


def test_inputs_are_left_as_they_are(pair):
    logits, maps = pair
    before = [one.clone() for one in logits]
    fused = fuse_logits(logits, maps, [0.5, 0.5], learning_rate=0.2)
    assert not torch.equal(fused, logits[0])
    assert all(torch.equal(a, b) for a, b in zip(logits, before, strict=True))


@pytest.mark.parametrize("constant", [100.0, 1000.0, -100.0])
@pytest.mark.parametrize("dense", [True, False])
def test_a_constant_in_the_main_models_logits_changes_nothing(pair, constant, dense):
    logits, maps = pair
    logits = [(one * 1024).round() / 1024 for one in logits]  # exact in float32 with the constant
    if dense:
        maps = [RelativeMap.from_dense(one.to_dense()) for one in maps]
    settings = {"learning_rate": 0.2, "candidates": 32}
    plain = fuse_logits(logits, maps, [0.5, 0.5], **settings)
    moved = fuse_logits([logits[0] + constant, logits[1]], maps, [0.5, 0.5], **settings)
    torch.testing.assert_close(moved.softmax(1), plain.softmax(1), atol=1e-5, rtol=0)
    assert torch.equal(moved.argmax(1), plain.argmax(1))


def test_log_probabilities_are_as_good_as_logits(pair):
    logits, maps = pair
    fused = fuse_logits([logits[0].log_softmax(1), logits[1]], maps, [0.5, 0.5], learning_rate=0.2)
    want = fuse_logits(logits, maps, [0.5, 0.5], learning_rate=0.2)
    torch.testing.assert_close(fused.softmax(1), want.softmax(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", ["calibrated", "paper"])
@pytest.mark.parametrize("candidates", [32, 300])
def test_the_papers_recipe_searches_on_logits_as_they_are(pair, recipe, candidates, tmp_path):
    """Also with a map from a file; and where all tokens are candidates, the new logits are the paper's."""
    logits, maps = pair
    maps = [
        RelativeMap.from_embedding(random_embedding(one.vocab_size, 16, seed=i), torch.arange(120), recipe)
        for i, one in enumerate(maps)
    ]
    settings = {"learning_rate": 0.2, "candidates": candidates}
    fused = fuse_logits(logits, maps, [0.5, 0.5], **settings)
    by_choice = [
        fuse_logits(logits, maps, [0.5, 0.5], log_probs=choice, **settings) for choice in (False, True)
    ]
    assert not torch.equal(*by_choice)
    assert torch.equal(fused, by_choice[recipe == "calibrated" and candidates == 32])
    maps[0].save(tmp_path / "map")
    maps[0] = RelativeMap.load(tmp_path / "map")
    assert torch.equal(fused, fuse_logits(logits, maps, [0.5, 0.5], **settings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_result_has_the_main_models_dtype(pair, dtype):
    logits, maps = pair
    fused = fuse_logits([logits[0].to(dtype), logits[1]], maps, [0.5, 0.5], learning_rate=0.2)
    assert fused.dtype == dtype


def test_logits_made_under_inference_mode(pair):
    logits, maps = pair
    with torch.inference_mode():
        frozen = [one.clone() for one in logits]
    fused = fuse_logits(frozen, maps, [0.5, 0.5], learning_rate=0.2)
    assert torch.equal(fused, fuse_logits(logits, maps, [0.5, 0.5], learning_rate=0.2))


def test_a_member_may_sit_out(pair):
    logits, maps = pair
    three = DeepenFuser([*maps, maps[1]], learning_rate=0.2)
    two = fuse_logits(logits, maps, [0.625, 0.375], learning_rate=0.2)
    assert torch.equal(three.step([*logits, None], [0.5, 0.3, 0.2]).logits, two)
    alone = three.step([logits[0], None, None], [0.5, 0.3, 0.2])
    assert torch.equal(alone.logits, logits[0])
    assert torch.equal(alone.chosen.long(), logits[0].argmax(dim=1))


def test_improbable_tokens_need_no_row(pair):
    logits, maps = pair
    fuser = DeepenFuser(maps, learning_rate=0.2, min_probability=0.01)
    fuser.step(logits, [0.5, 0.5])
    for one, relative in zip(logits, maps, strict=True):
        counted = (torch.softmax(one, dim=-1) >= 0.01).any(dim=0).sum()
        assert 0 < relative.rows_known == counted < 128


def test_the_result_does_not_depend_on_rows_known_before(pair):
    logits, maps = pair
    cold = DeepenFuser(maps, learning_rate=0.2, min_probability=0.01).step(logits, [0.5, 0.5]).logits
    for relative in maps:
        relative.to_dense()  # computes every row
    warm = DeepenFuser(maps, learning_rate=0.2, min_probability=0.01).step(logits, [0.5, 0.5]).logits
    assert torch.equal(cold, warm)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5], "1 weights for 2 members"),
        ([0.5, 0.3, 0.2], "3 weights for 2 members"),
        ([0.5, 0.4], "sum to 0.9"),
        ([1.5, -0.5], "negative"),
        ([float("nan"), 0.5], "NaN"),
        ([float("inf"), 0.5], "infinite"),
    ],
)
def test_bad_weights(pair, weights, message):
    with pytest.raises(InputError, match=message):
        fuse_logits(*pair, weights, learning_rate=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"learning_rate": -0.1}, "learning_rate is -0.1"),
        ({"learning_rate": 11.0}, "learning_rate is 11"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 65}, "steps is 65"),
        ({"candidates": 0}, "candidates is 0"),
    ],
)
def test_settings_out_of_range(pair, settings, message):
    with pytest.raises(InputError, match=message):
        fuse_logits(*pair, [0.5, 0.5], **({"learning_rate": 0.2} | settings))


def test_nan_names_the_member(pair):
    logits, maps = pair
    logits[1][1, 7] = float("nan")
    with pytest.raises(InputError, match=r"logits of member 1: row 1 has no softmax.*NaN"):
        fuse_logits(logits, maps, [0.5, 0.5], learning_rate=0.2)
    named = DeepenFuser(maps, learning_rate=0.2, names=["smollm2", "gemma"])
    with pytest.raises(InputError, match="logits of gemma: row 1"):
        named.step(logits, [0.5, 0.5])


def test_tensors_that_do_not_fit(pair):
    logits, maps = pair
    weights, settings = [0.5, 0.5], {"learning_rate": 0.2}
    with pytest.raises(InputError, match="1 logits for 2 members"):
        fuse_logits(logits[:1], maps, weights, **settings)
    with pytest.raises(InputError, match=r"logits of member 1 have shape \[1, 400\]; expected \[2, 400\]"):
        fuse_logits([logits[0], logits[1][:1]], maps, weights, **settings)
    with pytest.raises(InputError, match=r"logits of member 0 have shape \[2, 400\]; expected \[2, 300\]"):
        fuse_logits(logits[::-1], maps, weights, **settings)
    with pytest.raises(InputError, match="logits of member 1 is float64"):
        fuse_logits([logits[0], logits[1].double()], maps, weights, **settings)
    with pytest.raises(InputError, match="logits of member 0 is not contiguous"):
        fuse_logits([logits[0].T.contiguous().T, logits[1]], maps, weights, **settings)
    with pytest.raises(InputError, match="no meta kernel"):
        fuse_logits([one.to("meta") for one in logits], maps, weights, **settings)
    other = RelativeMap.from_embedding(torch.randn(400, 8), torch.arange(121))
    with pytest.raises(InputError, match=r"\[120, 121\] anchors"):
        fuse_logits(logits, [maps[0], other], weights, **settings)
    with pytest.raises(InputError, match="no relative maps"):
        fuse_logits([], [], [], **settings)
    with pytest.raises(InputError, match="main model cannot sit out"):
        DeepenFuser(maps, **settings).step([None, logits[1]], weights)


def test_assistants_may_speak_for_some_rows_only():
    """Each row of such a step is the row as it is fused alone, with the members that speak for it."""
    logits = [random_logits(5, 300, seed=0), random_logits(5, 400, seed=1), random_logits(5, 350, seed=2)]
    maps = [
        RelativeMap.from_embedding(random_embedding(vocab, 16, seed=vocab), torch.arange(120), temperature=20)
        for vocab in (300, 400, 350)
    ]
    speaks = {1: [0, 2, 3], 2: [2, 4]}
    weights = [0.5, 0.3, 0.2]
    fuser = DeepenFuser(maps, learning_rate=0.2)
    rows = [None, speaks[1], speaks[2]]
    step = fuser.step([logits[0], logits[1][speaks[1]], logits[2][speaks[2]]], weights, rows=rows)
    for row in range(5):
        present = [logits[i][row : row + 1] if i == 0 or row in speaks[i] else None for i in range(3)]
        alone = fuser.step(present, weights)
        torch.testing.assert_close(step.logits[row : row + 1], alone.logits, atol=1e-5, rtol=0)
        assert int(step.chosen[row]) == int(alone.chosen)
        assert torch.equal(step.logits[row], logits[0][row]) == (row == 1)
    logits[2][4, 3] = float("nan")
    with pytest.raises(InputError, match="logits of member 2: row 4 has no softmax"):
        fuser.step([logits[0], logits[1][speaks[1]], logits[2][speaks[2]]], weights, rows=rows)


def test_threads_may_share_a_fuser(pair):
    logits, maps = pair
    want = fuse_logits(logits, maps, [0.5, 0.5], learning_rate=0.2)
    cold = [RelativeMap.from_source(one.source) for one in maps]
    fuser = DeepenFuser(cold, learning_rate=0.2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fuser.step(logits, [0.5, 0.5]).logits, range(16)))
    assert all(torch.equal(one, want) for one in found)


_COUNTS_THREADS = """
import os, torch
from deepen_ext import RelativeMap
from deepen_ext.fusers import DeepenFuser

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
rows = torch.full((50_000, 2), 0.5)
maps = [RelativeMap.from_dense(rows), RelativeMap.from_dense(rows.clone())]
logits = [torch.linspace(0, 9, 50_000)[None].contiguous() for _ in maps]
fuser = DeepenFuser(maps, learning_rate=0.1)
torch.set_num_threads(2)
before = threads()
fuser.step(logits, [0.5, 0.5])
after = threads()
logits[0].clone()  # that does: torch's threads stay
print(before, after, threads())
"""


def test_a_step_of_one_row_starts_no_thread():
    """Beside a busy process, waiting for another thread costs a slice of the scheduler's."""
    done = subprocess.run([sys.executable, "-c", _COUNTS_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, pool = map(int, done.stdout.split())
    assert pool == before + 1, "torch has no threads of its own here: this shows nothing"
    assert after == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 40_000), (3, 7), (0, 7), (2, 2**20 + 1)])
def test_plain_copy(dtype, shape):
    with torch.inference_mode():
        given = torch.randn(shape).to(dtype)
    found = plain_copy(given)
    assert torch.equal(found, given)
    assert not found.is_inference()
    found.fill_(1)
    assert shape[0] == 0 or not torch.equal(found, given)
    turned = torch.randn(5, 4, requires_grad=True).T
    assert torch.equal(plain_copy(turned), turned)
    assert not plain_copy(turned).requires_grad
