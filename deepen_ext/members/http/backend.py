"""A server as a backend: what it says, asked for by HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from deepen_ext.members.backend import Capabilities, Description, Finding
from deepen_ext.members.http.served_model import ServedModel
from deepen_ext.members.http.session import HttpSession


class HttpBackend(ServedModel):
    """See `members.backend.Backend`.

    Attributes:
        findings: what was found out of the server at start.
    """

    findings: Sequence[Finding] = ()

    @property
    def capabilities(self) -> Capabilities:
        """The most probable tokens alone; a server's batches and its prefix cache change last digits."""
        return Capabilities(logits=False, max_topk=self.max_topk, repeatable=False, elsewhere=True)

    def open(self, lanes: int = 1, capacity: int = 0) -> HttpSession:
        """See `Backend`. Each lane has a slot of the server's own, where as many are free."""
        del capacity
        return HttpSession(self, lanes)

    def bytes_needed(self, lanes: int, tokens: int, used: int | None = None) -> Mapping[torch.device, int]:
        """None here: they are the server's."""
        del lanes, tokens, used
        return {}

    def embedding(self) -> None:
        """Out of reach."""

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """sha256 (hex) of what the server says of its model: the name, and sizes where it tells them.

        Weights cannot be looked at: another file under the same name passes for the same model.
        """
        del dtype
        served = self.protocol.served
        return hashlib.sha256(repr((self.vocab_size, served.facts)).encode()).hexdigest()

    def describe(self) -> Description:
        """See `Backend`. Memory is the server's, and not told."""
        served = self.protocol.served
        return Description(
            backend=f"{served.server}, by HTTP",
            architecture=served.architecture or "not known",
            parameters=served.parameters,
            non_embedding_parameters=None,
            dtype=served.dtype,
            weights_bytes=None,
            cache_bytes=None,
            findings=tuple(self.findings),
        )
