"""An answer of a model in this process. On CUDA the work goes on behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepen_ext.members.distribution import Distribution


@dataclass(frozen=True)
class HFAnswer:
    """See `members.backend.Answer`."""

    said: Distribution
    stream: torch.cuda.Stream | None

    def wait(self) -> Distribution:
        """The distributions; on CUDA the caller's stream waits for the member's, the host does not."""
        if self.stream is not None and self.said.logits is not None:
            current = torch.cuda.current_stream(self.said.device)
            current.wait_stream(self.stream)
            self.said.logits.record_stream(current)
        return self.said

    def ready(self) -> bool:
        """See `Answer`: the host never waits."""
        return True
