"""What CUDA asks of the Python side, as far as a machine without a device shows; tests/gpu has the rest."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from library_cases import chooser, maps
from oracle import random_embedding, random_logits
from sessions import changed
from torch.utils._python_dispatch import TorchDispatchMode

from deepen_ext import Ensemble, InputError, RelativeMap, _core, fuse_logits
from deepen_ext.decoding import sampler
from deepen_ext.fusers import DeepenFuser, FusedStep, Part
from deepen_ext.ops import topk_softmax

without_cuda = pytest.mark.skipif(_core.cuda_compiled(), reason="this build has its CUDA part")


def test_fill_computes_what_is_missing_once():
    embedding, ids = random_embedding(5000, 12, seed=0), torch.arange(0, 5000, 50)
    filled = RelativeMap.from_embedding(embedding, ids, entries=6)
    filled.ensure(torch.tensor([4, 4999]))
    assert not filled.is_complete
    assert filled.fill() == 4998
    assert filled.fill() == filled.ensure(torch.arange(10)) == 0
    assert filled.is_complete
    assert filled.rows_known == filled.rows_computed == 5000
    on_demand = RelativeMap.from_embedding(embedding, ids, entries=6)
    on_demand.ensure(torch.arange(5000))
    assert torch.equal(filled.rows.values, on_demand.rows.values)
    assert torch.equal(filled.rows.columns, on_demand.rows.columns)
    assert torch.equal(filled.rows.rest, on_demand.rows.rest)


def test_fill_without_a_source(tmp_path):
    some = RelativeMap.from_embedding(random_embedding(60, 8, seed=0), torch.arange(20))
    some.ensure(torch.arange(40))
    some.save(tmp_path / "some.safetensors")
    with pytest.raises(InputError, match="no row for token 40 and no embedding"):
        RelativeMap.load(tmp_path / "some.safetensors").fill()


@pytest.mark.parametrize("dense", [False, True])
def test_a_map_on_another_device(dense):
    here = maps("cpu", dense=dense)[0]
    assert here.to("cpu") is here
    there = here.to("meta")
    assert there.device.type == "meta"
    assert (there.is_dense, there.is_complete, there.anchors) == (dense, True, here.anchors)
    with pytest.raises(InputError, match=r"maps are on cpu and meta; move them to one device with \.to\(\)"):
        DeepenFuser([here, there], learning_rate=0.2)


def test_a_row_source_on_another_device():
    """The rows come out where the map is, wherever they were computed."""
    relative = RelativeMap.from_embedding(random_embedding(60, 8, seed=0), torch.arange(20)).to("meta")
    assert relative.ensure(torch.tensor([3, 5])) == 2
    assert relative.fill() == 58
    assert relative.rows.values.device.type == "meta"


class _NoQuestions(TorchDispatchMode):
    """Refuses what waits for a device: values read on the host, and results whose shape depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert "_local_scalar_dense" not in name, name
        assert "nonzero" not in name, name
        assert "unique" not in name, name
        if name in ("aten::index.Tensor", "aten::index_put_"):
            assert not any(one is not None and one.dtype == torch.bool for one in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 1}])
def test_a_step_on_filled_maps_asks_nothing_of_the_data(dense, sampling, monkeypatch):
    # As on CUDA: on the CPU top-p looks at the rows to spare itself a sort.
    monkeypatch.setattr(sampler, "top_p", lambda warper, scores: warper(torch.LongTensor(), scores))
    fuser = DeepenFuser(maps("cpu", dense=dense), learning_rate=0.2, min_probability=1e-3)
    logits = [random_logits(3, one.vocab_size, seed=i) for i, one in enumerate(fuser.maps)]
    choose = chooser(rows=3, vocab_size=fuser.maps[0].vocab_size, **sampling)
    with _NoQuestions():
        fused = fuser.step(logits, [0.5, 0.5])
        choose(fused.logits, fused.chosen)
    assert not torch.equal(fused.logits, logits[0])


def test_the_weights_are_put_on_the_device_once():
    fuser = DeepenFuser(maps("cpu"), learning_rate=0.2)
    logits = [random_logits(3, one.vocab_size, seed=i) for i, one in enumerate(fuser.maps)]
    one, other = (fuser.step(logits, weights).logits for weights in ([0.9, 0.1], [0.2, 0.8]))
    assert not torch.equal(one, other)
    kept = dict(fuser._shares)
    assert len(kept) == 2
    assert torch.equal(fuser.step(logits, [0.9, 0.1]).logits, one)
    assert fuser._shares == kept
    for step in range(400):  # weights that change at every step do not pile up
        fuser.step(logits, [step / 400, 1 - step / 400])
    assert len(fuser._shares) <= 256
    assert torch.equal(one, fuse_logits(logits, fuser.maps, [0.9, 0.1], learning_rate=0.2))


def test_what_a_step_reads_back():
    logits = random_logits(3, 200, seed=0)
    top = topk_softmax(logits, 5)
    step = FusedStep(
        logits, top.ids[:, 1], top.ids[:, 0], (Part(0, "logits of main", top, range(3), logits),)
    )
    step.check()
    assert step.read(step.chosen) == (top.ids[:, 1].tolist(), top.ids[:, 0].tolist())
    broken = top._replace(status=torch.tensor([0, 0, 2], dtype=torch.int32))
    bad = dataclasses.replace(step, parts=(Part(1, "logits of gemma", broken, [0, 1, 4], logits),))
    with pytest.raises(InputError, match="logits of gemma: row 4 has no softmax, there is nothing but -inf"):
        bad.check()


def test_a_device_without_kernels(tiny_smollm2, tiny_gemma):
    moved = [changed(one, device=torch.device("meta")) for one in (tiny_smollm2, tiny_gemma)]
    with pytest.raises(InputError, match="no meta kernels; use the CPU or a CUDA device"):
        Ensemble(moved, cache=False)


@without_cuda
@pytest.mark.parametrize("which", [(0, 1), (1,)])
def test_a_build_without_cuda_says_so(tiny_smollm2, tiny_gemma, which):
    moved = [tiny_smollm2, tiny_gemma]
    for i in which:
        moved[i] = changed(moved[i], device=torch.device("cuda", 0))
    with pytest.raises(InputError, match=r"no CUDA part; install the CUDA toolkit.*DEEPEN_CUDA=ON"):
        Ensemble(moved, cache=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_cuda_says_so_before_anything_is_loaded():
    with pytest.raises(InputError, match="torch sees 0 CUDA devices; use device='cpu'"):
        Ensemble.from_pretrained(["no/such", "no/where"], device="cuda")
