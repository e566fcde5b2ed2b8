"""What a protocol knows: the requests, and how to read what comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from deepen_ext.members.http.client import Client, Refusal
from deepen_ext.members.http.rows import Row

_Read = TypeVar("_Read")

# Sampling settings that leave a distribution as the model has it, by the names that vLLM and SGLang share.
# Servers have other defaults: all are sent.
NEUTRAL_SAMPLING = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

# What an answer of another shape than the protocol's raises when it is read.
WRONG_SHAPE = (KeyError, IndexError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Served:
    """What a server says of itself and its model; None where it does not.

    Attributes:
        server: its kind and version, for readers.
        model: the model's name, as the server has it.
        vocab_size: number of logits.
        context_length: the most ids of a prompt after which one more token fits.
        slots: texts that it works on side by side, each with a cache that requests can name.
        parameters: number of weights.
        dtype: of the weights.
        architecture: the model's family.
    """

    server: str
    model: str
    vocab_size: int | None = None
    context_length: int | None = None
    slots: int = 0
    parameters: int | None = None
    dtype: str | None = None
    architecture: str | None = None

    @property
    def facts(self) -> tuple[str, int | None, int | None, str | None, str | None]:
        """What tells a model from another one; a server may have other settings after a restart."""
        return self.model, self.vocab_size, self.parameters, self.dtype, self.architecture


@dataclass(frozen=True)
class Question:
    """Distributions after the last `positions` of some ids.

    Attributes:
        ids: the whole text.
        positions: how many of its ids.
        k: how many tokens are wanted after each.
        slot: the server's slot that holds the text; None where it chooses.
        temperature: 1 but for the check of what temperature does.
    """

    ids: Sequence[int]
    positions: int
    k: int
    slot: int | None = None
    temperature: float = 1.0

    @property
    def prefixes(self) -> list[list[int]]:
        """The ids up to each of the positions."""
        ids = list(self.ids)
        return [ids[: len(ids) - n] for n in reversed(range(self.positions))]


@dataclass(frozen=True)
class Reading:
    """What an answer says.

    Attributes:
        rows: one for each position, in order.
        counted: how many ids the server counted in the whole text; None where it does not say.
        cached: how many of them it had read before; None where it does not say.
        model: the model's name; None where answers do not have it.
    """

    rows: Sequence[Row]
    counted: int | None = None
    cached: int | None = None
    model: str | None = None


class Protocol(ABC):
    """A kind of server.

    Attributes:
        name: as `protocol=` has it.
        path: where distributions are asked for.
        page: how many ids its prefix cache keeps or drops together.
        cache_advice: what helps where it drops more.
        served: what the server said of itself.
        most_positions: how many positions a request may ask for.
        read_block: how many positions a request of a text that is read through may ask for (`read_payload`).
        written: the token that a server is made to write, where it says nothing of a token that is a part of
            a character; None for its own choice.
    """

    name: ClassVar[str]
    path: ClassVar[str]
    page: ClassVar[int] = 16
    cache_advice: ClassVar[str] = ""

    def __init__(self, served: Served) -> None:
        """Of a server that said this of itself."""
        self.served = served
        self.most_positions = self.read_block = 32
        self.written: int | None = None

    @classmethod
    @abstractmethod
    def found_at(cls, client: Client) -> Protocol | None:
        """The protocol, with what the server says of itself; None where it is no server of this kind."""

    @abstractmethod
    def payload(self, asked: Question) -> Mapping[str, Any]:
        """What to send to `path`."""

    @abstractmethod
    def read(self, answer: Any, asked: Question) -> Reading:
        """Read an answer. KeyError, TypeError and the like: it is not as this kind of server answers."""

    @abstractmethod
    def tokenize(self, client: Client, text: str) -> list[int] | None:
        """The server's own ids of a text, without BOS; None where it has no endpoint for that."""

    def count(self, client: Client, text: str) -> int | None:
        """How many ids the server makes of a text, without BOS; None where nothing tells."""
        del client, text
        return None

    def read_payload(self, asked: Question) -> Mapping[str, Any]:
        """As `payload`, of a text that is read through, and of which little may be in the server's cache."""
        return self.payload(asked)


def tokens_of(answer: Any) -> list[int] | None:
    """The ids in the answer of an endpoint that tokenises; None where there are none."""
    return list(answer["tokens"]) if isinstance(answer, dict) and "tokens" in answer else None


def answered(ask: Callable[[], _Read]) -> _Read | None:
    """What an endpoint gives; None where the server has none of that kind."""
    try:
        return ask()
    except Refusal as refusal:
        if refusal.status in (401, 403):
            raise
        return None
