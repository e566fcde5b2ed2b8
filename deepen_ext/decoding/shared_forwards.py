"""Forward passes shared by several runs over the same prompts, to compare ways of fusing them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch

from deepen_ext.decoding.prompt_weights import ScoredPrompt, last_prompts
from deepen_ext.errors import InputError, MemberLost
from deepen_ext.ground.closing import Closing
from deepen_ext.members.asking import check_ids, check_positions
from deepen_ext.members.backend import Answer, Backend, Session
from deepen_ext.members.distribution import Distribution, joined
from deepen_ext.members.member import Member

_MOST_BYTES = 2 << 30  # of distributions kept
_SCORED = 1  # k of a prompt that is scored: its score is kept, so nobody asks for its positions again

# What a member said after some ids, one position each.
_Ids = tuple[int, ...]
_Kept = dict[_Ids, Distribution]


class SharedForwards(Closing):
    """Members' caches and what they said, kept over runs: ``ensemble.generate(prompts, shared=shared)``.

    Ensembles of the same `Member` objects that continue the same prompts, one after the other, then read each
    prompt once for each member, score it once where their weights come from it, and what they write alike
    (from one prompt two methods often go the same way for a while) costs one forward. What was said is found
    by the ids before it, so that runs with and without drafts share too. The results are those without it,
    but for the rounding of sums, which depends on what a text was fed with.

    Make one for each batch of prompts; text b of every run must be the same prompt for this to gain anything.
    Leaving the ``with`` block frees everything.
    """

    def __init__(self, max_bytes: int = _MOST_BYTES) -> None:
        """Nothing is allocated; `max_bytes` bounds the distributions that are kept, beside the caches."""
        self._free_bytes = max_bytes
        self._sessions: dict[tuple[int, int], Session] = {}
        self._kept: dict[int, _Kept] = {}
        self._scored: dict[int, deque[ScoredPrompt]] = {}
        self._members: dict[int, Member] = {}  # so that no other object gets their id
        self._closed = False

    def close(self) -> None:
        """Free all caches and distributions."""
        self._closed = True
        with ExitStack() as closing:  # all of them, whatever one of them raises
            for session in self._sessions.values():
                closing.enter_context(suppress(MemberLost))
                closing.callback(session.close)
            self._sessions.clear()
            self._kept.clear()
            self._scored.clear()

    def session(self, member: Member, lanes: int, capacity: int) -> Session:
        """A session that goes on from what earlier ones of the member left.

        Raises:
            InputError: this was closed.
        """
        if self._closed:
            raise InputError("these shared forwards were closed; make new ones for the next prompts")
        self._members[id(member)] = member
        key = id(member), lanes
        if key not in self._sessions:
            self._sessions[key] = member.backend.open(lanes, capacity)
        kept = self._kept.setdefault(id(member), {})
        return _SharedSession(self, self._sessions[key], kept, member.backend, lanes)

    def last_prompts(self, member: Member) -> deque[ScoredPrompt]:
        """The prompts that the member has scored, for `read_prompts`."""
        return self._scored.setdefault(id(member), last_prompts(most=None))

    def bytes_held(self, member: Member, lanes: int) -> Mapping[torch.device, int]:
        """Bytes by device of the caches that a run of so many texts finds here already."""
        session = self._sessions.get((id(member), lanes))
        return {} if session is None else session.bytes_held

    def keep(self, kept: _Kept, ids: _Ids, said: Distribution) -> None:
        """Keep what was said after these ids, if that is not kept yet, while there is room."""
        before = kept.get(ids)
        if before is not None and _says(before, said.k):
            return
        more = said.nbytes - (0 if before is None else before.nbytes)
        if more <= self._free_bytes:
            self._free_bytes -= more
            kept[ids] = said.clone()


class _SharedSession:
    """One run's view of a session that outlives it: lanes are set aside, not released."""

    def __init__(
        self, shared: SharedForwards, session: Session, kept: _Kept, backend: Backend, lanes: int
    ) -> None:
        self._shared = shared
        self._session = session
        self._kept = kept
        self._backend = backend
        self._lanes = lanes

    @property
    def bytes_held(self) -> Mapping[torch.device, int]:
        return self._session.bytes_held

    def ask(
        self, targets: Mapping[int, Sequence[int]], k: int, positions: int | Mapping[int, int] = 1
    ) -> Answer:
        for lane, ids in targets.items():
            check_ids(self._backend, lane, self._lanes, ids)
        counts = check_positions(self._backend.name, targets, positions)
        most = self._backend.capabilities.max_topk
        k = k if most is None else min(k, most)
        texts = {lane: _texts(targets[lane], count) for lane, count in counts.items()}
        known = {lane: said for lane, own in texts.items() if (said := self._known(own, k)) is not None}
        if known and len(known) == len(targets):
            return _SharedAnswer(self._shared, self._kept, k, texts, known, None)
        missing = [lane for lane in targets if lane not in known]
        answer = self._session.ask(
            {lane: targets[lane] for lane in missing}, k, {lane: counts[lane] for lane in missing}
        )
        return _SharedAnswer(self._shared, self._kept, k, texts, known, answer)

    def read(self, lane: int, ids: Sequence[int], start: int, k: int) -> Iterator[Distribution]:
        return self._session.read(lane, ids, start, k)

    def set_aside(self, lane: int, *, forget: bool = False) -> None:
        self._session.set_aside(lane, forget=forget)

    def release(self, lane: int) -> None:
        self._session.set_aside(lane)

    def close(self) -> None:
        pass

    def _known(self, texts: Sequence[_Ids], k: int) -> list[Distribution] | None:
        """What is kept after each of these texts; None where it is not kept of all."""
        found = []
        for ids in texts:
            said = self._kept.get(ids)
            if said is None or not _says(said, k):
                return None
            found.append(said.top(k))
        return found


@dataclass(frozen=True)
class _SharedAnswer:
    shared: SharedForwards
    kept: _Kept
    k: int
    texts: dict[int, list[_Ids]]  # of each lane, the ids before each of its positions
    known: dict[int, list[Distribution]]  # of lanes that need not be asked
    answer: Answer | None  # of the others

    def wait(self) -> Distribution:
        found = dict(self.known)
        if self.answer is not None:
            given = self.answer.wait()
            at = 0
            for lane, texts in self.texts.items():
                if lane in self.known:
                    continue
                found[lane] = [given.at([at + i]) for i in range(len(texts))]
                at += len(texts)
                kept = slice(-1 if self.k == _SCORED else 0, None)
                for ids, said in zip(texts[kept], found[lane][kept], strict=True):
                    self.shared.keep(self.kept, ids, said)
            if not self.known:
                return given
        return joined([said for lane in self.texts for said in found[lane]])

    def ready(self) -> bool:
        return self.answer is None or self.answer.ready()


def _texts(ids: Sequence[int], positions: int) -> list[_Ids]:
    """The ids before each of the last positions."""
    whole = tuple(ids)
    return [whole[: len(whole) - left] for left in reversed(range(positions))]


def _says(said: Distribution, k: int) -> bool:
    """Whether its top-k has so many tokens, or can have."""
    return said.logits is not None or said.k >= k


def open_session(member: Member, lanes: int, capacity: int, shared: SharedForwards | None) -> Session:
    """A session of its own, or one of the shared ones."""
    if shared is not None:
        return shared.session(member, lanes, capacity)
    return member.backend.open(lanes, capacity)


def scored_prompts(member: Member, shared: SharedForwards | None) -> deque[ScoredPrompt]:
    """The member's last prompts, for `read_prompts`: those of this run, or all of the runs that share."""
    return last_prompts() if shared is None else shared.last_prompts(member)
