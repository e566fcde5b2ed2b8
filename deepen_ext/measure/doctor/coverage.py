"""How much of what members say the shared anchors can carry, and what their relative rows look like.

Both are measured at the tokens that a member finds probable on a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from deepen_ext.space.anchors import Anchors, PrefixColumns
from deepen_ext.space.row_sources import RowSource, SparseRows

_OTHERS = 20_000  # tokens that are no anchors and are looked at, most probable first
_SAMPLE = 128  # anchors, and other tokens, whose relative rows are computed, most probable first


@dataclass(frozen=True)
class Coverage:
    """Where a member's probability lies, mean over the positions of a text; the three sum to 1.

    Attributes:
        anchors: on tokens that all members share.
        prefixes: on other tokens whose text begins with an anchor, and so can speak for it.
        rest: on tokens that mean nothing to the other members: special tokens, tokens that begin with no
            anchor, and all beyond the 20,000 most probable that are no anchors.
    """

    anchors: float
    prefixes: float
    rest: float


@dataclass(frozen=True)
class RowShape:
    """What a member's relative rows look like: mean over the tokens that it finds most probable on a text.

    Attributes:
        tokens: how many relative rows this is the mean of.
        own: the mass that an anchor's row has on that anchor itself; None for tokens that are no anchors.
        largest: the mass of the entries that are kept (32 of similarity rows).
        effective: among how many anchors a relative row spreads its mass, exp(mean entropy): 1 where all mass
            is on one anchor, the number of anchors where the row is uniform.
    """

    tokens: int
    own: float | None
    largest: float
    effective: float


def mean_distribution(logits: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean over positions of the softmax of blocks of logits [n, V]: float64 [V] on the host."""
    total = sum(
        torch.softmax(block.float(), dim=-1).sum(dim=0, dtype=torch.float64).cpu() for block in logits
    )
    assert isinstance(total, torch.Tensor)
    return total / total.sum()  # each float32 softmax sums to 1 to some 1e-5


def coverage(anchors: Anchors, prefixes: PrefixColumns, member: int, mean: torch.Tensor) -> Coverage:
    """Where the mean distribution (float64 [V]) of a member lies; `member` is the member index."""
    shared = anchors.columns[member] >= 0
    others = _most_probable(mean, ~shared, _OTHERS)
    begins = [prefixes.column(member, token) >= 0 for token in others.tolist()]
    by_anchor = float(mean[shared].sum())
    by_prefix = float(mean[others[torch.tensor(begins, dtype=torch.bool, device="cpu")]].sum())
    return Coverage(by_anchor, by_prefix, max(1.0 - by_anchor - by_prefix, 0.0))


def row_shapes(
    anchors: Anchors, source: RowSource, member: int, mean: torch.Tensor
) -> tuple[RowShape, RowShape | None]:
    """The shape of the relative rows of anchors, and of other tokens (None where there are no others)."""
    columns = anchors.columns[member]
    shared = columns >= 0
    tokens = _most_probable(mean, shared, _SAMPLE)
    others = _most_probable(mean, ~shared, _SAMPLE)
    return (
        _shape(source.compute(tokens), source.anchors, columns[tokens]),
        _shape(source.compute(others), source.anchors, None) if len(others) else None,
    )


def _most_probable(mean: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    """Token ids int64, most probable first, without those of probability 0."""
    chosen = torch.where(among, mean, 0.0)
    top = torch.topk(chosen, min(count, len(chosen)))
    return top.indices[top.values > 0]


def _shape(rows: SparseRows, anchors: int, own: torch.Tensor | None) -> RowShape:
    columns, rest = rows.columns.cpu(), rows.rest.cpu().double()
    kept = columns >= 0
    values = torch.where(kept, rows.values.cpu().double(), 0.0)
    left = (anchors - kept.sum(dim=1)).clamp(min=1)  # anchors that share the rest evenly
    entropy = -torch.xlogy(values, values).sum(dim=1) - torch.xlogy(rest, rest / left)
    on_itself = None
    if own is not None:
        named = columns == own[:, None]
        # An anchor whose own entry was not kept has the share of any other anchor.
        share = torch.where(named.any(dim=1), (values * named).sum(dim=1), rest / left)
        on_itself = float(share.mean())
    return RowShape(len(rest), on_itself, float(values.sum(dim=1).mean()), math.exp(float(entropy.mean())))
