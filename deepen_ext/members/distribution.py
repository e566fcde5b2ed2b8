"""What a backend says: next-token distributions, as logits, or as their most probable tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deepen_ext.ops.topk_softmax import NOTHING_LEFT, TopK, launch_many
from deepen_ext.ops.transfer import to_device


@dataclass(eq=False)
class Distribution:
    """The next-token distributions of n positions, on the device of the backend that computed them.

    A backend with full logits gives them and leaves the top-k to be taken when somebody asks, so that the
    top-k of several members is one launch (`take_topk`). Any other backend gives its top-k. Either way a
    reader finds `topk`. Tensors are to be read only, unless a method says otherwise.

    Attributes:
        name: the member's, for errors.
        vocab_size: V, the number of logits the member has or would have.
        k: how many tokens `topk` has. More than V stand for V.
        logits: [n, V] in float32, float16 or bfloat16, contiguous; None where the backend has none.
    """

    name: str
    vocab_size: int
    k: int
    logits: torch.Tensor | None = None
    known_topk: TopK | None = None

    def __post_init__(self) -> None:
        self.k = min(self.k, self.vocab_size)

    def __len__(self) -> int:
        """Number of positions n."""
        return len(self._tensor)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._tensor.device

    @property
    def nbytes(self) -> int:
        """Bytes of what the backend gave."""
        return self.logits.nbytes if self.logits is not None else sum(one.nbytes for one in self.topk)

    @property
    def topk(self) -> TopK:
        """The k most probable tokens: ids int32 [n, k], probabilities float32 [n, k] and tail [n].

        Probabilities are of the full softmax. Rows without a softmax (NaN, nothing but -inf) have a status
        other than 0: nobody has looked at it yet.
        """
        if self.known_topk is None:
            take_topk([self])
            assert self.known_topk is not None
        return self.known_topk

    def scores(self) -> torch.Tensor:
        """Scores [n, V] that a softmax takes: the logits as they are; without them log-probabilities.

        There the k most probable tokens have their natural logarithms in float32, all others -inf.
        """
        if self.logits is not None:
            return self.logits
        top = self.topk
        shape = len(self), self.vocab_size
        scores = torch.full(shape, -torch.inf, dtype=torch.float32, device=self.device)
        return scores.scatter_(1, top.ids.long(), top.probs.log())

    def without(self, ids: torch.Tensor, *, in_place: bool = False) -> Distribution:
        """The same with probability 0 for these ids (int64 [m]); the others are scaled to sum to 1.

        Of a backend without logits only ids among its top-k are known, and these alone are taken out.

        Args:
            ids: on this device.
            in_place: the logits are the caller's, and may be written to.
        """
        if not len(ids):
            return self
        if self.logits is None:
            return replace(self, known_topk=_without(self.topk, ids))
        return replace(self, logits=forbid(self.logits, ids, in_place=in_place), known_topk=None)

    def at(self, positions: Sequence[int]) -> Distribution:
        """Some of the positions, in this order: a view where they follow one another, else a copy."""
        logits, known = self.logits, self.known_topk
        return replace(
            self,
            logits=None if logits is None else select(logits, positions),
            known_topk=None if known is None else TopK(*(select(one, positions) for one in known)),
        )

    def top(self, k: int) -> Distribution:
        """The same with a `topk` of k tokens, or of all there are where the backend gave no more."""
        if min(k, self.vocab_size) == self.k:
            return self
        if self.logits is not None:
            return replace(self, k=k, known_topk=None)
        ids, probs, tail, status = self.topk
        kept = (ids[:, :k].contiguous(), probs[:, :k].contiguous())  # as the kernels take them
        cut = TopK(*kept, tail + probs[:, k:].sum(dim=1), status)
        return replace(self, k=min(k, self.k), known_topk=cut)

    def clone(self) -> Distribution:
        """A copy of what the backend gave, which nothing else holds on to."""
        logits, known = self.logits, self.known_topk
        return replace(
            self,
            logits=None if logits is None else logits.clone(),
            known_topk=None if known is None else TopK(*(one.clone() for one in known)),
        )

    @property
    def _tensor(self) -> torch.Tensor:
        return self.logits if self.logits is not None else self.topk.ids


def select(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Some rows of a tensor [n, ...], in this order: a view where they follow one another, else a copy."""
    first = rows[0] if rows else 0
    if list(rows) == list(range(first, first + len(rows))):
        return tensor[first : first + len(rows)]
    return tensor[to_device(rows, tensor.device)]


def forbid(logits: torch.Tensor, ids: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
    """Logits [n, V] with -inf for some ids (int64 [m]); a copy where there are any, unless `in_place`."""
    if not len(ids):
        return logits
    with torch.inference_mode(in_place):  # what a session gives can be written to there alone
        return logits.index_fill_(1, ids, -torch.inf) if in_place else logits.index_fill(1, ids, -torch.inf)


def joined(parts: Sequence[Distribution]) -> Distribution:
    """The positions of one member's distributions, one after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    logits = [one.logits for one in parts if one.logits is not None]
    if len(logits) < len(parts):
        return replace(first, logits=None, known_topk=_joined_topk([one.topk for one in parts]))
    taken = [one.known_topk for one in parts if one.known_topk is not None and one.k == first.k]
    known = _joined_topk(taken) if len(taken) == len(parts) else None
    return replace(first, logits=torch.cat(logits), known_topk=known)


def _joined_topk(parts: Sequence[TopK]) -> TopK:
    return TopK(*(torch.cat(same) for same in zip(*parts, strict=True)))


def gathered(rows: Sequence[tuple[Distribution, int]]) -> Distribution:
    """One member's positions, each row i of a distribution; no copy where these are all of one, in order."""
    runs: list[tuple[Distribution, list[int]]] = []
    for said, row in rows:
        if not runs or runs[-1][0] is not said:
            runs.append((said, []))
        runs[-1][1].append(row)
    if len(runs) == 1 and runs[0][1] == list(range(len(runs[0][0]))):
        return runs[0][0]
    return joined([said.at(own) for said, own in runs])


def take_topk(distributions: Sequence[Distribution]) -> None:
    """Take the top-k of all that do not have theirs yet: on one device, for one k, in one launch."""
    missing: dict[int, list[Distribution]] = {}
    for one in distributions:
        if one.known_topk is None:
            missing.setdefault(one.k, []).append(one)
    for k, same in missing.items():
        logits = [one.logits for one in same if one.logits is not None]
        names = [f"logits of {one.name}" for one in same]
        for one, topk in zip(same, launch_many(logits, k, names), strict=True):
            one.known_topk = topk


def _without(topk: TopK, ids: torch.Tensor) -> TopK:
    kept = torch.where(torch.isin(topk.ids, ids), 0.0, topk.probs)
    # Sorted down again, ties to the lower id as before: what is taken out comes last.
    probs, order = kept.sort(dim=1, descending=True, stable=True)
    scale = 1 / (probs.sum(dim=1) + topk.tail).clamp(min=torch.finfo(torch.float32).tiny)
    status = topk.status.masked_fill((topk.status == 0) & (probs[:, 0] == 0), NOTHING_LEFT)
    return TopK(topk.ids.gather(1, order), probs * scale[:, None], topk.tail * scale, status)
