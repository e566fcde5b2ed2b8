"""A backend with its logits hidden, as any server would have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from deepen_ext.ground.numbers import whole_number
from deepen_ext.members.backend import Answer, Backend, Capabilities, Description, Session
from deepen_ext.members.distribution import Distribution


class TopKOnly:
    """Another backend, of whose distributions only the k most probable tokens and the tail are seen.

    What fusion makes of a member that a server runs can be looked at with a model in this process:
    ``dataclasses.replace(member, backend=TopKOnly(member.backend, 20))``.
    """

    def __init__(self, backend: Backend, k: int) -> None:
        """Wrap a backend.

        Args:
            backend: any other.
            k: the largest k it gives from now on.

        Raises:
            InputError: k is not 1 to the vocabulary's size.
        """
        self._backend = backend
        most = backend.capabilities.max_topk or backend.vocab_size
        self._k = whole_number(f"{backend.name}: k", k, 1, most)

    @property
    def name(self) -> str:
        """See `Backend`, as the rest."""
        return self._backend.name

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return self._backend.vocab_size

    @property
    def context_length(self) -> int | None:  # noqa: D102
        return self._backend.context_length

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self._backend.device

    @property
    def capabilities(self) -> Capabilities:
        """No logits, and no more than k tokens."""
        return replace(self._backend.capabilities, logits=False, max_topk=self._k, writes=False)

    def open(self, lanes: int = 1, capacity: int = 0) -> Session:  # noqa: D102
        return _TopKSession(self._backend.open(lanes, capacity), self._k)

    def bytes_needed(  # noqa: D102
        self, lanes: int, tokens: int, used: int | None = None
    ) -> Mapping[torch.device, int]:
        return self._backend.bytes_needed(lanes, tokens, used)

    def embedding(self) -> torch.Tensor | None:
        """Out of reach, as a server's are."""
        return None

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:  # noqa: D102
        return self._backend.fingerprint(dtype)

    def describe(self) -> Description:  # noqa: D102
        return self._backend.describe()

    def close(self) -> None:  # noqa: D102
        self._backend.close()


class _TopKSession:
    """See `Session`."""

    def __init__(self, session: Session, k: int) -> None:
        self._session = session
        self._k = k

    @property
    def bytes_held(self) -> Mapping[torch.device, int]:
        return self._session.bytes_held

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> Answer:
        return _TopKAnswer(self._session.ask(targets, min(k, self._k), positions))

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        return map(_without_logits, self._session.read(lane, ids, start, min(k, self._k)))

    def set_aside(self, lane: int, *, forget: bool = False) -> None:
        self._session.set_aside(lane, forget=forget)

    def release(self, lane: int) -> None:
        self._session.release(lane)

    def close(self) -> None:
        self._session.close()


@dataclass(frozen=True)
class _TopKAnswer:
    answer: Answer

    def wait(self) -> Distribution:
        return _without_logits(self.answer.wait())

    def ready(self) -> bool:
        return self.answer.ready()


def _without_logits(said: Distribution) -> Distribution:
    return Distribution(said.name, said.vocab_size, said.k, known_topk=said.topk)
