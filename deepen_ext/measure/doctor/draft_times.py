"""What drafts would bring these members: their forwards are timed, their drafts tried on a sample."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from deepen_ext.decoding.drafts.draft_settings import LOOKUP, MAIN
from deepen_ext.decoding.drafts.lookup import PromptLookup
from deepen_ext.decoding.drafts.pace import begins_alike
from deepen_ext.ensemble import Ensemble
from deepen_ext.measure.doctor.draft_model import (
    WIDTHS,
    Acceptance,
    ForwardTimes,
    best_length,
    ms_per_token,
)
from deepen_ext.members.member import Member

SAMPLE_TOKENS = 32  # that are written after each prompt to see which drafts would have stood
_WARM_UP = 2  # on CUDA a shape's second forward is captured as a graph
_REPETITIONS = 5


@dataclass(frozen=True)
class Drafter:
    """What drafts by one drafter are expected to bring.

    Attributes:
        name: a member's, or "lookup".
        acceptance: the share of its tokens that stood on the sample.
        seen: of how many tokens.
        reach: the share of the sample's tokens for which it had a token to offer.
        length: the draft's length with the fewest milliseconds a token, 1 to 7.
        ms_per_token: with drafts of this length.
    """

    name: str
    acceptance: float
    seen: int
    reach: float
    length: int
    ms_per_token: float


@dataclass(frozen=True)
class DraftTimes:
    """The time model of drafts, for one number of texts.

    Attributes:
        lanes: how many texts are written side by side.
        context: main-model tokens of the longest of them.
        widths: tokens of each text in the forwards that were timed.
        forwards: of all members, the main model first; `ms` in the order of `widths`.
        place_ms: fusion and hand-off of one token of each text.
        without_ms: expected milliseconds a token of each text without drafts.
        drafters: with drafts, by drafter: the main model, the assistants, "lookup". A drafter that had no
            token to offer on the sample is not here.
        best: the drafter with the fewest milliseconds a token; None where no draft is expected to pay.
        allows: by member, what its backend allows.
    """

    lanes: int
    context: int
    widths: tuple[int, ...]
    forwards: tuple[ForwardTimes, ...]
    place_ms: float
    without_ms: float
    drafters: tuple[Drafter, ...]
    best: Drafter | None
    allows: dict[str, str]


def draft_times(
    ensemble: Ensemble, prompts: Sequence[str], place_ms: float, *, lanes: int, tokens: int = SAMPLE_TOKENS
) -> DraftTimes:
    """Time the members' forwards, see which drafts would stand, and put both into the time model.

    Args:
        ensemble: of the members.
        prompts: every member's context holds each of them, with `tokens` more.
        place_ms: fusion and hand-off of one token of each text.
        lanes: number of texts; the prompts are repeated to have as many.
        tokens: written after each prompt to see which drafts would stand; 8 or more.

    Raises:
        ModelError: a forward pass failed.
    """
    names = ensemble.names
    texts = [prompts[i % len(prompts)] for i in range(lanes)]
    times = [forward_times(member, name, texts) for name, member in zip(names, ensemble.members, strict=True)]
    found = acceptance(ensemble, prompts, tokens)
    plain = ms_per_token(times, place_ms, drafter=MAIN, length=0, acceptance=1.0, lanes=lanes)
    drafters = []
    for who, own in found.items():
        length, ms = best_length(times, place_ms, drafter=who, found=own, lanes=lanes)
        name = "lookup" if who == LOOKUP else names[who]
        drafters.append(Drafter(name, own.share, own.seen, own.reach, length, ms))
    fastest = min(drafters, key=lambda one: one.ms_per_token, default=None)
    return DraftTimes(
        lanes=lanes,
        context=max(len(_ids(ensemble.members[0], text)) for text in texts),
        widths=WIDTHS,
        forwards=tuple(times),
        place_ms=place_ms,
        without_ms=plain,
        drafters=tuple(drafters),
        best=fastest if fastest is not None and fastest.ms_per_token < plain else None,
        allows={
            one.name: what_it_allows(member, one) for one, member in zip(times, ensemble.members, strict=True)
        },
    )


def forward_times(member: Member, name: str, texts: Sequence[str]) -> ForwardTimes:
    """Medians of a few forwards of each width after these texts, one in each lane.

    After each of them the lanes go back to their texts, which takes a forward of one token where the member
    goes back by position. This is timed, too.

    Raises:
        ModelError: a forward pass failed.
    """
    before = [_ids(member, text) for text in texts]
    # What is read after a text: its own tokens again, any would do.
    after = [(own * WIDTHS[-1])[: WIDTHS[-1]] for own in before]
    spent: dict[int, list[float]] = {width: [] for width in WIDTHS}
    back: list[float] = []
    session = member.backend.open(len(texts), max(map(len, before)) + WIDTHS[-1])

    def timed(width: int) -> float:
        targets = {lane: own + after[lane][:width] for lane, own in enumerate(before)}
        _finish(member.device)
        began = perf_counter()
        session.ask(targets, 1, max(width, 1)).wait()
        _finish(member.device)
        return (perf_counter() - began) * 1e3

    try:
        timed(0)
        # Width after width, again and again: what disturbs the machine for a second disturbs all alike.
        for repetition in range(_WARM_UP + _REPETITIONS):
            for width in WIDTHS:
                forward, return_ = timed(width), timed(0)
                if repetition >= _WARM_UP:
                    spent[width].append(forward)
                    back.append(return_)
    finally:
        session.close()
    ms = tuple(statistics.median(spent[width]) for width in WIDTHS)
    more = max(statistics.median(back) - ms[0], 0.0)
    return ForwardTimes(name, ms, back_ms=more, reads_anew=min(back) > 2 * ms[0])


def acceptance(ensemble: Ensemble, prompts: Sequence[str], tokens: int) -> dict[int, Acceptance]:
    """By drafter, how many of its tokens stood where the ensemble wrote on, greedy and without drafts.

    The main model's first choice stands where it is the token that was written. An assistant's first choice
    stands where its text and the token's text can go on to the same text. A drafter that had no token to
    offer is left out.
    """
    main, names = ensemble.members[0], ensemble.names
    stood: Counter[int] = Counter()
    seen: Counter[int] = Counter()

    def see(record: Mapping[str, Any]) -> None:
        if record["not_asked"] is not None:  # no assistant is needed there, so it is no part of a draft
            return
        token = record["token"]["id"]
        seen[MAIN] += 1
        stood[MAIN] += token == record["main_choice"]["id"]
        written = main.vocabulary.bytes_of(token)
        for said in record["members"]:
            if (member := names.index(said["name"])) != MAIN:
                first = ensemble.members[member].vocabulary.bytes_of(said["top"][0]["id"])
                seen[member] += 1
                stood[member] += begins_alike(first, written)

    written = ensemble.generate(list(prompts), max_new_tokens=tokens, draft=0, trace=see)
    found = {who: Acceptance(stood[who], seen[who]) for who in range(len(names)) if seen[who]}
    places = 0
    for prompt, own in zip(prompts, written, strict=True):
        start = _ids(main, prompt)
        ids, lookup = start + own.token_ids, PromptLookup()
        for at in range(len(start), len(ids)):
            places += 1
            if offered := lookup.find(ids[:at], 1):
                seen[LOOKUP] += 1
                stood[LOOKUP] += offered[0] == ids[at]
    if seen[LOOKUP]:
        found[LOOKUP] = Acceptance(stood[LOOKUP], seen[LOOKUP], seen[LOOKUP] / places)
    return found


def what_it_allows(member: Member, times: ForwardTimes) -> str:
    """What a member's capabilities and its measured times mean for drafts, in words."""
    if member.backend.capabilities.repeatable:
        same = "drafts change no token"
    else:
        same = (
            "not repeatable: among near-ties a draft may give another token, so drafts are off unless asked "
            "for (draft='auto')"
        )
    if not times.reads_anew:
        return f"{same}; it goes back without reading the text again"
    return (
        f"{same}; going back takes {times.back_ms + times.ms[0]:.1f} ms, a token {times.ms[0]:.1f} ms: it "
        "seems to read the whole text again after a draft token that falls"
    )


def _ids(member: Member, text: str) -> list[int]:
    return member.vocabulary.prefix_ids + member.vocabulary.encode(text)


def _finish(device: torch.device) -> None:
    """Wait for a device that only queues its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
