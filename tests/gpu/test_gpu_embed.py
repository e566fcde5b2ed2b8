"""libdeepen on CUDA, built for this card, against Python's operations on the CPU."""

from __future__ import annotations

import pytest
import torch
from embedded_library import install
from libdeepen import Failed, Library, by_python, logits_of, random_maps, save

# How near a logit must be.
NEAR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(install("-DDEEPEN_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native", name="embed-cuda"))


@pytest.fixture(scope="module")
def maps():
    return random_maps()


@pytest.fixture(scope="module")
def read(library, maps, tmp_path_factory):
    found = [library.read(path) for path in save(maps, tmp_path_factory.mktemp("maps"))]
    yield found
    for one in found:
        library.call.deepen_map_free(one)


@pytest.fixture
def fusion(library, read, device):
    made = library.fusion(read, batch=5, device=torch.device(device).index)
    yield made
    library.call.deepen_fusion_free(made)


def _check(found, there, chosen, new):
    """What the card gave beside the CPU's. Half precision makes ties, which may fall elsewhere."""
    there, found, near = there.cpu(), found.cpu().long(), NEAR[new.dtype]
    assert (there.float() - new.float()).abs().max() < near
    assert torch.equal(there.gather(1, found[:, None])[:, 0], there.amax(1))
    if new.dtype == torch.float32:
        assert found.tolist() == chosen.tolist()


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("own_stream", [False, True])
def test_a_step_is_the_python_operations(library, fusion, maps, device, dtype, batch, own_stream):
    logits = logits_of(batch, dtype, seed=batch)
    weights = torch.rand(batch, 2, generator=torch.Generator().manual_seed(batch)).softmax(1)
    new, chosen = by_python(maps, logits, weights)
    there, weights_there = [one.to(device, copy=True) for one in logits], weights.to(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if own_stream else torch.cuda.default_stream()):
        found = library.step(fusion, there, weights_there)
    torch.cuda.synchronize()
    _check(found, there[0], chosen, new)
    assert not torch.equal(new, logits[0])
    assert torch.equal(there[1].cpu(), logits[1])


def test_a_captured_step_is_the_step(library, fusion, maps, device):
    """In a CUDA graph: a step neither waits nor allocates."""
    logits, weights = logits_of(3), torch.full((3, 2), 0.5)
    new, chosen = by_python(maps, logits, weights)
    there, weights_there = [torch.zeros_like(one, device=device) for one in logits], weights.to(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = library.step(fusion, there, weights_there)
    for _ in range(2):
        for one, own in zip(there, logits, strict=True):
            one.copy_(own)
        graph.replay()
        _check(found, there[0], chosen, new)


def test_a_device_that_is_not_there(library, read):
    with pytest.raises(Failed, match="cudaErrorInvalidDevice"):
        library.fusion(read, device=99)


def test_more_rows_than_it_was_made_for(library, fusion, device):
    logits = [one.to(device) for one in logits_of(6)]
    before = logits[0].clone()
    with pytest.raises(Failed, match="this fusion was made for 0 to 5 rows"):
        library.step(fusion, logits, torch.full((6, 2), 0.5, device=device))
    assert torch.equal(logits[0], before)
