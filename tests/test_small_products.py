"""Linear layers of a few rows, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from deepen_ext.members.hf.small_products import small_products

CPU = torch.device("cpu")


@pytest.fixture
def products(monkeypatch):
    """How many products went the other way around."""
    seen = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *operands: seen.append(1) or original(*operands))
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 8), (1, 16), (5,), ()])
def test_as_torch_does_it(products, shape, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 48, generator=generator)
    weight = torch.randn(70, 48, generator=generator)
    offset = torch.randn(70, generator=generator) if bias else None
    want = linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert products == []
    with small_products(CPU, torch.float32):
        found = linear(x, weight, offset)
    assert products == [1]
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)


def test_strided_rows(products):
    x = torch.randn(4, 6, 48)[:, ::2]
    weight = torch.randn(48, 70).t()
    with small_products(CPU, torch.float32):
        found = linear(x, weight)
    assert products == [1]
    torch.testing.assert_close(found, linear(x, weight))


@pytest.mark.parametrize(("rows", "dtype"), [(17, torch.float32), (2, torch.bfloat16), (0, torch.float32)])
def test_the_rest_is_left_to_torch(products, rows, dtype):
    x, weight = torch.randn(rows, 48, dtype=dtype), torch.randn(70, 48, dtype=dtype)
    with small_products(CPU, torch.float32):
        found = linear(x, weight)
    assert products == []
    assert torch.equal(found, linear(x, weight))


def test_where_it_is_of_no_use(products):
    x, weight = torch.randn(2, 48), torch.randn(70, 48)
    for device, dtype in ((CPU, torch.bfloat16), (torch.device("cuda"), torch.float32)):
        with small_products(device, dtype):
            linear(x, weight)
    assert products == []
