"""What computes a member's distributions: the promise that every backend keeps.

    backend.open(lanes, capacity) -> Session     several texts, each in a lane
    session.ask({lane: ids}, k)   -> Answer      the work is under way
    answer.wait()                 -> Distribution   of the token after each of these texts

Everything above `members/` (fusion, the loop, likelihood, the doctor) sees a model through these alone. A new
backend is a file here or a folder of its own, and passes tests/contract/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from deepen_ext.errors import InputError
from deepen_ext.members.distribution import Distribution


@dataclass(frozen=True)
class Capabilities:
    """What a backend can say.

    Attributes:
        logits: its distributions have full logits.
        max_topk: the largest k it gives; None for any. Asked for more, it gives this many.
        repeatable: a text gets the same numbers however it was fed: in one piece or token by token, alone or
            beside others (up to the rounding of float32 sums). Servers with prefix caches and models of
            quantised activations do not promise that.
        writes: its sessions can write several tokens without the host reading each: they are
            `WritingSession`s. It pays where the host and the device work side by side.
        elsewhere: it computes in another process or on another machine, beside the members here: it is worth
            asking before its answer is needed for sure.
    """

    logits: bool
    max_topk: int | None
    repeatable: bool
    writes: bool = False
    elsewhere: bool = False


@dataclass(frozen=True)
class Finding:
    """Something that was found out about a member when it was loaded.

    Attributes:
        name: a word or two, such as "prefix cache".
        text: what was found.
        good: nothing to look at. False where it costs time, or could not be found out.
    """

    name: str
    text: str
    good: bool = True


@dataclass(frozen=True)
class Description:
    """Facts about the model behind a backend, for readers; None where the backend cannot know.

    Attributes:
        backend: what computes it, with versions, such as "transformers 5.23.0".
        architecture: the model's family, such as "llama".
        parameters: number of weights.
        non_embedding_parameters: of them outside of the embeddings and the output's table.
        dtype: of the weights, such as "float32".
        weights_bytes: bytes of the weights.
        cache_bytes: bytes of the KV cache of one lane with 1,000 tokens.
        findings: what was found out of a model that runs elsewhere.
    """

    backend: str
    architecture: str
    parameters: int | None
    non_embedding_parameters: int | None
    dtype: str | None
    weights_bytes: int | None
    cache_bytes: int | None
    findings: tuple[Finding, ...] = ()


class Answer(Protocol):
    """Distributions that are on their way."""

    def wait(self) -> Distribution:
        """The distributions, once: lane after lane in the order asked, of each lane its number of positions.

        Raises:
            ModelError: the forward pass failed; the member's name is in the message.
        """
        ...

    def ready(self) -> bool:
        """Whether `wait` has nothing to wait for. An answer that failed is ready."""
        ...


class Session(Protocol):
    """Several texts through one model, each in a lane 0..lanes-1 of its own.

    One thread at a time uses a session. After any error it can go on: a lane then holds what it surely has
    read. Every error names the member.
    """

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> Answer:
        """Bring lanes to these ids and ask for the distributions after the last `positions` ids of each.

        Of each lane the prefix that its present ids share with the new ones is kept, and only the rest is
        computed. Lanes that are not named stay as they are. The work starts here and may go on until `wait`;
        what was asked is waited for before the session is asked again.

        Args:
            targets: whole id lists by lane, the model's BOS included where it has one.
            k: how many of the most probable tokens are wanted.
            positions: how many of a lane's last ids; after each of them the distribution is given. A number
                for all lanes, or by lane a number for each; at most as many as the lane has ids.

        Raises:
            InputError: no ids, an id outside the vocabulary, more ids than the context holds, fewer ids than
                positions, positions of other lanes than the targets', or a lane that does not exist or was
                released.
            ModelError: the forward pass failed.
        """
        ...

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        """Bring a lane to these ids, giving the distribution after ``ids[start]`` and after every later id.

        They come in blocks, in the order of the ids; each is the caller's to keep. A block with logits is
        large, so let it go before the next one. Dropped half way, or after any error, the lane holds what was
        fed so far.

        Raises:
            InputError: see `ask`; a start that is no place in the ids.
            ModelError: the forward pass failed.
        """
        ...

    def set_aside(self, lane: int, *, forget: bool = False) -> None:
        """Keep a lane that is not asked for a while out of the way. Any `ask` may name it again.

        Args:
            lane: which.
            forget: its text has ended: what it holds is freed, and the next text begins from nothing.
        """
        ...

    def release(self, lane: int) -> None:
        """The lane's text has ended: its room is freed, and it cannot be asked any more."""
        ...

    def close(self) -> None:
        """Release all lanes and free everything. A second call does nothing."""
        ...

    @property
    def bytes_held(self) -> Mapping[torch.device, int]:
        """Bytes of its caches by device, as far as they are allocated; {} where they are elsewhere."""
        ...


# Picks the tokens int64 [b] after logits [b, V], both on the device, given how many were picked before.
Choose = Callable[[torch.Tensor, int], torch.Tensor]


class WritingSession(Session, Protocol):
    """A session of a backend with `Capabilities.writes`."""

    def write(
        self, targets: Mapping[int, Sequence[int]], k: int, count: int, choose: Choose
    ) -> tuple[torch.Tensor, Distribution]:
        """Bring lanes to these ids, and then by `count` tokens further, without waiting for the device.

        Afterwards the lanes hold the tokens that were picked. What is given is what `ask` would give, token
        by token.

        Args:
            targets: as in `ask`.
            k: as in `ask`.
            count: how many tokens every lane gets; at least 1.
            choose: called `count` times, in order, on a stream of the session's. It must not wait for the
                device. It may write to the logits: what is given shows it.

        Returns:
            the tokens, int64 [b, count], on the device; and the distributions after the last of the
            lane's ids and after each token, lane after lane: count + 1 positions each.

        Raises:
            InputError: as in `ask`; a count below 1; more ids and tokens than the context holds.
            ModelError: a forward pass failed.
        """
        ...


class Backend(Protocol):
    """One model, wherever it is computed. Threads may share it; each opens sessions of its own.

    Attributes:
        name: the member's, for errors.
        vocab_size: V, how many logits the model gives or would give (may exceed the tokenizer's tokens).
        context_length: the most tokens of a text; None where nothing says so.
        device: where its distributions are.
        capabilities: what it can say.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def context_length(self) -> int | None: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    @property
    def capabilities(self) -> Capabilities: ...  # noqa: D102

    def open(self, lanes: int = 1, capacity: int = 0) -> Session:
        """A session.

        Args:
            lanes: number of texts side by side.
            capacity: expected tokens of a text. More may come.

        Raises:
            ModelError: the model cannot do this, such as two texts of different lengths at once.
        """
        ...

    def bytes_needed(self, lanes: int, tokens: int, used: int | None = None) -> Mapping[torch.device, int]:
        """Bytes by device that a new session takes; {} where it is remote.

        What the backend holds idle for its next session is not counted again.

        Args:
            lanes: of the session.
            tokens: in every lane that is used.
            used: how many lanes are; None for all. The others count where they have room all the same.
        """
        ...

    def embedding(self) -> torch.Tensor | None:
        """Input embeddings [rows, d] in the model's dtype, for similarity rows; None where out of reach."""
        ...

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """Identifies the weights: equal for two backends of one model.

        Args:
            dtype: the weights are compared as rounded to it, so that copies in other precisions are found.
                None: as they are, from samples of each weight.
        """
        ...

    def describe(self) -> Description:
        """Facts for readers."""
        ...

    def close(self) -> None:
        """Give back what no later session will use. The backend is not used after this."""
        ...


def require(backend: Backend, capability: str, what: str) -> None:
    """Refuse early what a backend lacks.

    Args:
        backend: of the member.
        capability: a field of `Capabilities` that must be true.
        what: what needs it, such as "weights='prompt'".

    Raises:
        InputError: it lacks the capability; the message names member, capability and use.
    """
    if not getattr(backend.capabilities, capability):
        raise InputError(
            f"{backend.name}: {what} needs a member with the capability '{capability}', and its backend has "
            f"only its most probable tokens; leave {what} out, or run this member in process"
        )
