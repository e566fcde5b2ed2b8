"""Every test of an operation runs on every instruction set this processor has."""

from __future__ import annotations

import pytest

from deepen_ext import _core

_ALL = ("portable", "avx2", "avx512")
_HERE = _ALL[: _ALL.index(_core.best_isa()) + 1]


@pytest.fixture(params=_HERE, autouse=True)
def isa(request):
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(_core.best_isa())
