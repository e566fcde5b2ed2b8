"""A model in a server, with what every part of its backend asks of it."""

from __future__ import annotations

import os
import threading
import weakref
from bisect import insort
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from deepen_ext.errors import MemberLost
from deepen_ext.members.http.client import Client, Refusal
from deepen_ext.members.http.protocols import look_for
from deepen_ext.members.http.protocols.base import WRONG_SHAPE, Protocol, Question, Reading
from deepen_ext.members.http.rows import BadRow, to_topk
from deepen_ext.ops.topk_softmax import TopK


class ServedModel:
    """The model behind a backend and its sessions. Threads may share it.

    Attributes:
        name: the member's.
        vocab_size: V.
        device: where distributions are put.
        max_topk: the largest k that the server gives; None for any.
        client: of the server.
        protocol: its kind, with what it said of itself.
    """

    def __init__(
        self,
        name: str,
        client: Client,
        protocol: Protocol,
        vocab_size: int,
        device: torch.device,
        connections: int,
    ) -> None:
        """Nothing is asked yet.

        Args:
            name: the member's.
            client: of the server.
            protocol: its kind, with what it said of itself.
            vocab_size: V.
            device: where distributions are put.
            connections: how many requests may be under way at once.
        """
        client.member = name
        self.name = name
        self.vocab_size = vocab_size
        self.device = device
        self.max_topk: int | None = None
        self.client = client
        self.protocol = protocol
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="deepen-ext-http")
        self._free_slots = list(range(protocol.served.slots))
        self._taking = threading.Lock()
        self._process = os.getpid()
        self._verified = client.connections_made
        self._end = weakref.finalize(self, _close, client, self._pool)

    @property
    def context_length(self) -> int | None:
        """The most ids of a text; None where the server does not say."""
        return self.protocol.served.context_length

    def most(self, k: int) -> int:
        """How many of k tokens the server gives."""
        return min(k, self.vocab_size, self.max_topk or k)

    def take_slots(self, lanes: int) -> list[int | None]:
        """A slot of the server's for each lane, the lowest; None for all of them where too few are free."""
        with self._taking:
            if len(self._free_slots) < lanes:
                return [None] * lanes
            taken = self._free_slots[:lanes]
            for slot in taken:
                self._free_slots.remove(slot)
        return list(taken)

    def give_slot(self, slot: int | None) -> None:
        """A lane is done with its slot.

        Without the lock: the garbage collector may end a dropped stream, which gives its slots back, in the
        middle of `take_slots` in this very thread. To insert is one step for other threads too.
        """
        if slot is not None:
            insort(self._free_slots, slot)

    def start(self, asked: Question) -> Future[TopK]:
        """Have a question answered in another thread; see `answer`.

        Raises:
            MemberLost: the backend was closed, or this process was forked after the member was loaded.
        """
        self._check_process()
        try:
            return self._pool.submit(self.answer, asked)
        except RuntimeError:
            raise MemberLost(self.name, "is not asked any more: the member was closed") from None

    def answer(self, asked: Question, *, read: bool = False) -> TopK:
        """What the server says, checked.

        Args:
            asked: at most as many positions as a request may ask for.
            read: the text is read through (`Protocol.read_payload`).

        Raises:
            MemberLost: no answer, or one that cannot be used.
        """
        try:
            return self.distributions(asked, read=read)
        except Refusal as refusal:
            raise self.client.lost(
                f"refuses a request of {len(asked.ids)} ids with {refusal}; see its log"
            ) from None

    def distributions(self, asked: Question, *, read: bool = False) -> TopK:
        """As `answer`, but a refusal is left to the caller.

        Raises:
            Refusal: the server refuses.
            MemberLost: see `answer`.
        """
        said = self.exchange(asked, read=read)
        try:
            return to_topk(said.rows, asked.k, self.vocab_size, self.device)
        except BadRow as error:
            raise self.client.lost(f"{error}; see which model and which version it runs") from None

    def exchange(self, asked: Question, *, read: bool = False) -> Reading:
        """What the server says, of this model and of these ids; its rows are not looked at.

        Raises:
            Refusal: the server refuses.
            MemberLost: see `answer`.
        """
        self._check_process()
        protocol, client = self.protocol, self.client
        payload = protocol.read_payload(asked) if read else protocol.payload(asked)
        answer = client.post(protocol.path, payload)
        try:
            said = protocol.read(answer, asked)
        except BadRow as error:
            raise client.lost(f"{error}; it cannot be a member") from None
        except WRONG_SHAPE as error:
            raise client.lost(
                f"answers otherwise than {protocol.name} does ({type(error).__name__}: {error}); check its "
                "version, or give another protocol="
            ) from None
        if said.model is not None and said.model != protocol.served.model:
            raise self._other_model(said.model)
        if client.connections_made != self._verified:
            self._verify()
        if len(said.rows) != asked.positions:
            raise client.lost(
                f"gave {len(said.rows)} distributions of {asked.positions} asked for; see its log"
            )
        if said.counted not in (None, len(asked.ids)):
            raise client.lost(
                f"counts {said.counted} ids where {len(asked.ids)} were sent: it adds BOS, or cuts the "
                "prompt; start it so that it takes ids as they are"
            )
        return said

    def _check_process(self) -> None:
        """A forked process has none of the threads, and shares the connections with the first."""
        if os.getpid() != self._process:
            why = "was loaded before this process was forked; load the member in this process"
            raise MemberLost(self.name, why)

    def _verify(self) -> None:
        """That a server on a new connection serves what it did: it may have been started again."""
        made = self.client.connections_made
        found = look_for(type(self.protocol), self.client)
        if found is None:
            raise self.client.lost(f"is no server of the kind {self.protocol.name} any more; load it anew")
        if found.served.facts != self.protocol.served.facts:
            raise self._other_model(found.served.model)
        self._verified = made

    def _other_model(self, model: str) -> MemberLost:
        return self.client.lost(
            f"was started again with another model ({model} in the place of "
            f"{self.protocol.served.model}); start it as it was, or load the member anew"
        )

    def close(self) -> None:
        """Connections and threads end."""
        self._end()


def _close(client: Client, pool: ThreadPoolExecutor) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    client.close()
