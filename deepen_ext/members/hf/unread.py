"""Tokens that a session writes by itself: picked and fed on the device, read by the host in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepen_ext.errors import failures_of
from deepen_ext.members.backend import Choose
from deepen_ext.members.hf.forwards import Forwards, Known


@dataclass(eq=False)
class Unread:
    """What was written into some lanes. Its ids are on their way to the host.

    Attributes:
        lanes: b of them.
        tokens: int64 [b, count], on the device.
        logits: [b, count + 1, V], after the lanes' last ids and after each token.
    """

    lanes: Sequence[int]
    tokens: torch.Tensor
    logits: torch.Tensor

    def __post_init__(self) -> None:
        """Send the ids to the host. On CUDA that is queued behind the work, and nothing waits."""
        on_cuda = self.tokens.device.type == "cuda"
        self._ids = torch.empty(self.tokens.shape, dtype=torch.long, device="cpu", pin_memory=on_cuda)
        self._ids.copy_(self.tokens, non_blocking=True)
        self._arrived = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> dict[int, tuple[list[int], Known]]:
        """Of each lane its tokens, and the logits. Whoever has read what was said does not wait here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        known = (Known(self.logits, i, self.logits.shape[1]) for i in range(len(self.lanes)))
        return dict(zip(self.lanes, zip(self._ids.tolist(), known, strict=True), strict=True))


def write_unread(
    name: str, forwards: Forwards, lanes: Sequence[int], logits: torch.Tensor, count: int, choose: Choose
) -> Unread:
    """Write so many tokens into each of these lanes, without waiting for the device.

    Args:
        name: the member's, for errors.
        forwards: of the session, over fixed buffers.
        lanes: b of them; their cache has room for the tokens.
        logits: [b, V] after what they hold.
        count: 1 or more.
        choose: see `WritingSession.write`.

    Raises:
        ModelError: a forward pass failed.
    """
    rows = logits.new_empty(len(lanes), count + 1, logits.shape[1])
    tokens = torch.empty(len(lanes), count, dtype=torch.long, device=logits.device)
    rows[:, 0] = logits
    for n in range(count):
        tokens[:, n] = choose(rows[:, n], n)
        with failures_of(name):
            rows[:, n + 1] = forwards.feed_unread(lanes, tokens[:, n], n)
    return Unread(lanes, tokens, rows)
