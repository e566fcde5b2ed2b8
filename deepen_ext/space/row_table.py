"""Relative rows in memory: one for each token of a vocabulary, and which tokens have theirs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deepen_ext.errors import InputError
from deepen_ext.ops import RelativeRows
from deepen_ext.space.row_sources import SparseRows

SUM_ERROR = 1e-3  # how far from 1 the sum of a relative row may be


class RowTable:
    """Relative rows by token id, on one device.

    Attributes:
        rows: as the operations take them; what stands at a token that is not known means nothing.
        known: bool [V], on the host: which tokens have their relative row.
    """

    def __init__(self, rows: RelativeRows, known: torch.Tensor) -> None:
        self.rows = rows
        self.known = known

    @classmethod
    def empty(
        cls, vocab_size: int, anchors: int, entries: int, device: str | torch.device = "cpu"
    ) -> RowTable:
        """Room for the whole vocabulary; on the CPU it is taken page by page as relative rows are kept."""
        with torch.inference_mode(False):  # the caller may be in it now, and not when a row is kept
            rows = RelativeRows(
                columns=torch.empty(vocab_size, entries, dtype=torch.int32, device=device),
                values=torch.empty(vocab_size, entries, dtype=torch.float32, device=device),
                rest=torch.empty(vocab_size, dtype=torch.float32, device=device),
                anchors=anchors,
            )
            return cls(rows, torch.zeros(vocab_size, dtype=torch.bool, device="cpu"))

    @classmethod
    def dense(cls, matrix: torch.Tensor) -> RowTable:
        """Full relative rows, float32 [V, A]; kept, not copied.

        Raises:
            InputError: not two-dimensional, not float32, negative or not finite, or rows whose sum is not 1.
        """
        if matrix.dim() != 2 or 0 in matrix.shape:
            raise InputError(
                f"the relative matrix has shape {list(matrix.shape)}; expected [vocabulary, anchors]"
            )
        if matrix.dtype != torch.float32:
            raise InputError(f"the relative matrix is {matrix.dtype}; pass matrix.float()")
        if not bool(torch.isfinite(matrix).all()) or bool((matrix < 0).any()):
            raise InputError(
                "the relative matrix has negative or non-finite entries; rows must be distributions"
            )
        off = (matrix.sum(dim=1, dtype=torch.float64) - 1).abs().max().item()
        if off > SUM_ERROR:
            raise InputError(f"rows of the relative matrix must sum to 1; one is off by {off:.3g}")
        vocab, anchors = matrix.shape
        rows = RelativeRows(None, matrix.detach().contiguous(), None, anchors)
        return cls(rows, torch.ones(vocab, dtype=torch.bool, device="cpu"))

    @property
    def device(self) -> torch.device:
        """Where the relative rows are."""
        return self.rows.values.device

    def keep(self, tokens: torch.Tensor, computed: SparseRows) -> None:
        """Write the relative rows of these tokens (int64 [N] on the host, all different)."""
        assert self.rows.columns is not None
        assert self.rows.rest is not None
        there = tokens.to(self.device)
        self.rows.columns[there] = computed.columns.to(self.device)
        self.rows.values[there] = computed.values.to(self.device)
        self.rows.rest[there] = computed.rest.to(self.device)
        self.known[tokens] = True

    def to(self, device: str | torch.device) -> RowTable:
        """The same relative rows on another device; this table itself if they are there."""
        columns, values, rest, anchors = self.rows
        with torch.inference_mode(False):  # as in `empty`
            moved = values.to(device)
            if moved.device == self.device:
                return self
            rows = RelativeRows(
                columns=None if columns is None else columns.to(device),
                values=moved,
                rest=None if rest is None else rest.to(device),
                anchors=anchors,
            )
            return RowTable(rows, self.known.clone())

    def to_dense(self) -> torch.Tensor:
        """The relative rows of all tokens, whole: float32 [V, A]. Every token must be known."""
        columns, values, rest, anchors = self.rows
        if columns is None or rest is None:
            return values
        used = columns >= 0
        length = used.sum(dim=1)
        share = torch.where(length < anchors, rest / (anchors - length).clamp(min=1), 0.0)
        dense = share[:, None].repeat(1, anchors)
        token, entry = torch.nonzero(used, as_tuple=True)
        dense[token, columns[token, entry].long()] = values[token, entry]
        return dense

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is known, on the host, for a file: see `map_file.py`."""
        columns, values, rest, _ = self.rows
        if columns is None or rest is None:
            return {"matrix": values.cpu()}
        tokens = torch.nonzero(self.known).flatten()
        there = tokens.to(self.device)
        return {
            "tokens": tokens.int(),
            "columns": columns[there].cpu(),
            "values": values[there].cpu(),
            "rest": rest[there].cpu(),
        }

    def adopt(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Take over relative rows from a file, as `tensors` wrote them; returns how many."""
        rows = SparseRows(tensors["columns"], tensors["values"], tensors["rest"])
        self.keep(tensors["tokens"].long(), rows)
        return len(rows.rest)
