"""What a session of llama.cpp answers."""

from __future__ import annotations

from dataclasses import dataclass

from deepen_ext.members.distribution import Distribution


@dataclass(frozen=True)
class LlamaAnswer:
    """See `members.backend.Answer`."""

    said: Distribution

    def wait(self) -> Distribution:
        """The distributions."""
        return self.said

    def ready(self) -> bool:
        """See `Answer`: `ask` has done the work."""
        return True
