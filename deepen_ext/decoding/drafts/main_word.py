"""What the host needs of the main model's word on some places, in one read of the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from deepen_ext.decoding.assistants import Assistants
from deepen_ext.decoding.boundary import CANDIDATES
from deepen_ext.decoding.places import Reason
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.skips import REASONS, Skips
from deepen_ext.decoding.team import Team
from deepen_ext.members.distribution import Distribution
from deepen_ext.ops.topk_softmax import TopK, check_status
from deepen_ext.ops.transfer import to_host


@dataclass(frozen=True)
class Word:
    """The main model's word on some places, as the host has read it: one entry for each.

    Attributes:
        tokens: what it would write; its most probable tokens where nobody asked for that.
        margins: by how much its first choice is more probable than its second.
        reasons: why no assistant is needed, or None.
        candidates: its most probable tokens, for the boundary rule.
        spent_ms: what its forward passes took.
    """

    tokens: list[int]
    margins: list[float]
    reasons: list[Reason | None]
    candidates: Mapping[int, list[tuple[int, float]]]
    spent_ms: float


class WordReader:
    """Of one run."""

    def __init__(self, team: Team, assistants: Assistants, chooser: Chooser, skips: Skips) -> None:
        """See `Writer`."""
        self._team = team
        self._assistants = assistants
        self._chooser = chooser
        self._skips = skips

    def read(
        self,
        said: Distribution,
        numbers: Sequence[int],
        prefixes: Sequence[Sequence[int]],
        tokens: torch.Tensor | None = None,
        *,
        began: float,
        guess: bool = True,
    ) -> Word:
        """One copy from the device, for which the host waits once.

        Args:
            said: by the main model, of n places.
            numbers: of each place, its text's.
            prefixes: of each place, the ids before it.
            tokens: what the main model would write, int64 [n]; None where nobody has chosen yet.
            began: when its forward passes did (`time.perf_counter`).
            guess: find out what it would write. Where the texts are sampled this costs as much as the choice
                itself.

        Raises:
            InputError: a place whose logits have no softmax.
        """
        asked = perf_counter()
        part = self._team.fuser.part(0, said)
        weights = [self._assistants.weights[number] for number in numbers]
        top, flags = part.topk, self._skips.flags(part, numbers, prefixes, weights)
        if tokens is None:
            tokens = top.ids[:, 0]
            if guess:
                tokens = self._chooser.propose(said.scores(), numbers, prefixes, tokens)
        first = TopK(top.ids[:, :CANDIDATES], top.probs[:, :CANDIDATES], top.tail, top.status)
        written, codes, *rest = to_host(tokens.int(), flags, *first)
        first = TopK(*rest)
        if said.device.type != "cpu":  # forward passes are only queued there; now they are done
            asked = perf_counter()
            check_status(part.name, first.status.tolist(), part.rows)
        reasons = [REASONS[code] for code in codes.tolist()]
        candidates = self._assistants.candidates(first, reasons)
        return Word(written.tolist(), _margins(first), reasons, candidates, (asked - began) * 1e3)


def _margins(top: TopK) -> list[float]:
    """By how much the most probable token of each place is more probable than the next."""
    first_two = top.probs[:, :2]
    return (first_two[:, 0] - first_two[:, -1] * (first_two.shape[1] - 1)).tolist()
