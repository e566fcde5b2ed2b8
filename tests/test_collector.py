"""The garbage collector is afterwards as it was before."""

from __future__ import annotations

import gc
from contextlib import suppress

from deepen_ext.ground.collector import without_collector


def test_it_is_off_meanwhile_and_then_as_it_was() -> None:
    assert gc.isenabled()
    with without_collector():
        with suppress(ValueError), without_collector():
            raise ValueError
        assert not gc.isenabled()  # the outer one still loads
    assert gc.isenabled()
