"""A member's relative rows as the operations take them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from deepen_ext.errors import InputError
from deepen_ext.ops.checks import check_tensor


class RelativeRows(NamedTuple):
    """The relative row of each token of a vocabulary, by token id.

    Sparse: token t has `values[t, j]` on anchor `columns[t, j]`, and the anchors that its row does not name
    share `rest[t]` evenly. A column of -1 ends a row early. Dense: `columns` and `rest` are None.

    The columns of a row must all be different. The operations do not look: of an anchor that a row names
    twice the CPU adds both values, CUDA may leave one out. `RelativeMap.load` and libdeepen do look.
    """

    columns: torch.Tensor | None  # int32 [V, m]
    values: torch.Tensor  # float32 [V, m], dense: [V, A]
    rest: torch.Tensor | None  # float32 [V]
    anchors: int  # A

    def check(self, name: str, device: torch.device) -> None:
        """Raise InputError unless shapes, dtypes and device agree."""
        if type(self.anchors) is not int or not 1 <= self.anchors < 2**31:
            raise InputError(f"{name}.anchors is {self.anchors!r}; give a whole number of 1 or more")
        if self.columns is None or self.rest is None:
            check_tensor(
                f"{name}.values", self.values, shape=[None, self.anchors], dtype=torch.float32, device=device
            )
            return
        check_tensor(f"{name}.values", self.values, shape=[None, None], dtype=torch.float32, device=device)
        vocab, entries = self.values.shape
        if entries > self.anchors:
            raise InputError(f"{name} has {entries} entries a row, but there are only {self.anchors} anchors")
        check_tensor(
            f"{name}.columns", self.columns, shape=[vocab, entries], dtype=torch.int32, device=device
        )
        check_tensor(f"{name}.rest", self.rest, shape=[vocab], dtype=torch.float32, device=device)

    def pack(self) -> tuple[int, int, int, int, int]:
        """(columns, values, rest, vocab, entries) for the core."""
        vocab, entries = self.values.shape
        if self.columns is None or self.rest is None:
            return 0, self.values.data_ptr(), 0, vocab, entries
        return self.columns.data_ptr(), self.values.data_ptr(), self.rest.data_ptr(), vocab, entries


def check_rows(name: str, rows: RelativeRows, device: torch.device) -> None:
    """Raise InputError unless these are `RelativeRows` whose shapes, dtypes and device agree."""
    if not isinstance(rows, RelativeRows):
        raise InputError(f"{name} must be RelativeRows, not {type(rows).__name__}")
    rows.check(name, device)
