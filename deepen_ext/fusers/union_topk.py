"""UniTE: the average over the union of the members' top-k tokens (Yao et al., arXiv 2410.03777)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from deepen_ext.fusers.bridged import BridgedFuser
from deepen_ext.fusers.parts import Said

TOP = 10  # k, as the paper has it


class UnionTopkFuser(BridgedFuser):
    """UniTE's step: the members' k = 10 most probable tokens, as byte strings, are the union.

    Each member gives every token of the union its own logit: that of the same token, or, where it does not
    have it, of the first token of its text, each of its tokens once. A softmax over the union makes that a
    distribution, and these are averaged. A union token that the main model does not have counts for its first
    main token, as in the authors' code. The main model's probability of the union's tokens is shared out
    anew; tokens outside the union keep their logits, so that the likelihood of any text is defined.

    On CUDA a step reads the top tokens on the host, and waits for them.
    """

    name: ClassVar[str] = "union-topk"

    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """See `Fuser.fuse`."""
        for row, ids, shares in self._unions(said, weights):
            mass = logits[row, ids].float().logsumexp(0)
            logits[row, ids] = (mass + shares.log()).to(logits.dtype)
        return logits.argmax(dim=-1).int()

    def logprobs(self, said: Sequence[Said], weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `Fuser.logprobs`. The union keeps its probability, and shares it out anew."""
        rows = torch.arange(len(tokens), device=self.device)
        found = said[0].logprobs(rows, tokens)
        for row, ids, shares in self._unions(said, weights):
            same = ids == tokens[row]
            if bool(same.any()):
                found[row] = said[0].logprobs(rows[row], ids).logsumexp(0) + shares[same].double().log()[0]
        return found

    def _unions(
        self, said: Sequence[Said], weights: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Of each row the main model's tokens of the union int64 [u], and the average over it float32 [u]."""
        top = [one.topk.ids[:, :TOP].tolist() for one in said]
        for row, shares in enumerate(weights.tolist()):
            speaks = [i for i, share in enumerate(shares) if share > 0]
            union = self._union([(said[i].member, top[i][row]) for i in speaks])
            average = torch.zeros(len(union), dtype=torch.float32, device=self.device)
            for i in speaks:
                own = said[i].row(row)
                assert own is not None
                average += shares[i] * self._distribution(said[i].member, own, union).to(self.device)
            # The union is empty where members name nothing but special tokens.
            first = [self._bridge.first(*token, 0) for token in union]
            main = torch.tensor(first, dtype=torch.long, device=self.device)
            kept = main >= 0
            ids, inverse = main[kept].unique(return_inverse=True)  # type: ignore[no-untyped-call]
            mass = average.new_zeros(len(ids)).index_add_(0, inverse, average[kept])
            yield row, ids, mass / mass.sum()

    def _union(self, tops: Sequence[tuple[int, list[int]]]) -> list[tuple[int, int]]:
        """(member, token) of each different text, in the members' order."""
        found: dict[bytes | None, tuple[int, int]] = {}
        for member, tokens in tops:
            for token in tokens:
                text = None if self._bridge.is_eos(member, token) else self._bridge.bytes_of(member, token)
                if text != b"":
                    found.setdefault(text, (member, token))
        return list(found.values())

    def _distribution(self, member: int, logits: torch.Tensor, union: list[tuple[int, int]]) -> torch.Tensor:
        """A member's softmax over the union, float32 [U]; 0 where it finds none of the union possible."""
        ids = [self._bridge.first(*token, member) for token in union]
        fresh = [token >= 0 and token not in ids[:i] for i, token in enumerate(ids)]
        there = torch.tensor(ids, dtype=torch.long, device=logits.device).clamp(min=0)
        counts = torch.tensor(fresh, dtype=torch.bool, device=logits.device)
        own = logits[there].float().masked_fill(~counts, -torch.inf)
        return torch.softmax(own, dim=0).masked_fill(own.isneginf().all(), 0.0)  # NaN stays, and is an error
