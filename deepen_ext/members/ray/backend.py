"""A member in an actor, as the ensemble sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from deepen_ext.cluster.actors import end
from deepen_ext.members.backend import Capabilities, Description
from deepen_ext.members.ray.remote import RemoteMember
from deepen_ext.members.ray.session import RaySession


class RayBackend(RemoteMember):
    """See `members.backend.Backend`. An answer is the k most probable tokens, in this machine's memory."""

    @property
    def device(self) -> torch.device:
        """Where its answers arrive."""
        return torch.device("cpu")

    @property
    def capabilities(self) -> Capabilities:
        """No logits, and any k that the backend in the actor gives; repeatable where that is."""
        facts = self.facts
        return Capabilities(
            logits=False, max_topk=facts["max_topk"], repeatable=facts["repeatable"], elsewhere=True
        )

    def open(self, lanes: int = 1, capacity: int = 0) -> RaySession:
        """See `Backend`."""
        return RaySession(self, lanes, capacity)

    def bytes_needed(self, lanes: int, tokens: int, used: int | None = None) -> Mapping[torch.device, int]:
        """See `Backend`: none here."""
        return {}

    def embedding(self) -> torch.Tensor | None:
        """Out of reach: weights do not travel."""
        return None

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """See `Backend`; asked for once."""
        named = None if dtype is None else str(dtype).removeprefix("torch.")
        if named not in self.fingerprints:
            self.fingerprints[named] = self.get(self.call("fingerprint", named))
        return self.fingerprints[named]

    def describe(self) -> Description:
        """See `Backend`; `backend` names Ray, and what computes in the actor."""
        import ray

        inside = Description(**self.facts["description"])
        return replace(inside, backend=f"ray {ray.__version__}: {inside.backend}")

    def close(self) -> None:
        """End the actor."""
        end(self.actor)
