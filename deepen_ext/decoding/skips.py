"""Which tokens need no assistant: those that none can change, and those the main model is sure enough of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepen_ext.decoding.certificate import Certificate
from deepen_ext.decoding.places import Reason
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.team import Team
from deepen_ext.errors import InputError
from deepen_ext.fusers import Part
from deepen_ext.ground.numbers import real_number, true_or_false
from deepen_ext.ops.transfer import to_device

REASONS: tuple[Reason | None, ...] = (None, "gated", "settled")


def check_gate(value: float) -> None:
    """Raise InputError for a confidence gate out of range."""
    real_number("confidence_gate", value, "above 0 to 1", lambda x: 0 < x <= 1)


def check_certified_skip(method: str, *, do_sample: bool, bounded: bool) -> None:
    """That a text can be written with the certified skip. Needs no models.

    Args:
        method: what messages call the fuser.
        do_sample: whether tokens are drawn.
        bounded: whether the fuser has a `search_bound`.

    Raises:
        InputError: while sampling, or of a fuser that has no bound.
    """
    if do_sample:
        raise InputError(
            "certified_skip holds for greedy decoding only; for sampling use confidence_gate, "
            "which is not exact"
        )
    if not bounded:
        raise InputError(
            f"certified_skip bounds the inverse search, which {method} has not; leave it out, "
            "or use fuser='deepen'"
        )


class Skips:
    """The certified skip (`Certificate`) and the confidence gate of one run."""

    def __init__(
        self,
        team: Team,
        settings: Settings,
        chooser: Chooser,
        *,
        certified_skip: bool = False,
        confidence_gate: float | None = None,
    ) -> None:
        """Check that they fit the run.

        Args:
            team: whose assistants may be spared.
            settings: of the texts.
            chooser: picks the tokens.
            certified_skip: ask the assistants only where they can change a greedy token.
            confidence_gate: nor where the main model's first choice has at least this probability.

        Raises:
            InputError: a certified skip while sampling, or of a fuser that has no bound; a gate out of range.
        """
        self._certificate = None
        self._bounded = team.fuser.bounded
        self._chooser = chooser
        self._first_ends = team.main.eos_ids if team.fuser.first_end_needs_all else ()
        self._gate = confidence_gate
        true_or_false("certified_skip", certified_skip)
        if confidence_gate is not None:
            check_gate(confidence_gate)
        if not certified_skip:
            return
        bound = team.fuser.search_bound()
        check_certified_skip(team.method, do_sample=settings.do_sample, bounded=bound is not None)
        assert bound is not None  # or the check has refused it
        self._certificate = Certificate(bound, chooser)

    @property
    def spares(self) -> bool:
        """Whether there is anything by which an assistant may be spared."""
        return self._certificate is not None or self._gate is not None

    def flags(
        self,
        main: Part,
        texts: Sequence[int],
        ids: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
    ) -> torch.Tensor:
        """Of each text, the place in `REASONS` of why its next token needs no assistant, int32 [b].

        They are where the main model's word is. Nothing waits for the device.

        Args:
            main: what the main model says of them.
            texts: their numbers.
            ids: of each of them, prompt and new tokens so far.
            weights: of each of them, the members'.
        """
        first = main.topk.probs[:, 0]
        flags = torch.zeros_like(first, dtype=torch.int32)
        if self._gate is not None:
            flags.masked_fill_(first >= self._gate, REASONS.index("gated"))
        if self._certificate is not None:
            settled = self._certificate.settled(main.said.scores(), texts, ids, top=main.topk)
            bounded = [self._bounded(one) for one in weights]
            if not all(bounded):
                settled &= to_device(bounded, settled.device, torch.bool)
            flags.masked_fill_(settled, REASONS.index("settled"))
        if self._first_ends and self.spares:
            begin = [self._chooser.begins(text, len(own)) for text, own in zip(texts, ids, strict=True)]
            if any(begin):
                asked = to_device(begin, flags.device, torch.bool) & self._may_end(main, texts)
                flags.masked_fill_(asked, REASONS.index(None))
        return flags

    def _may_end(self, main: Part, texts: Sequence[int]) -> torch.Tensor:
        """Texts that the main model alone might end with this token, bool [b].

        Its first choice tells, but not of texts with processors or of sampled ones: these all might end.
        """
        first, device = main.topk.ids[:, 0], main.topk.ids.device
        ends = torch.isin(first, to_device(self._first_ends, device, first.dtype))
        unsure = [not self._chooser.is_plain([text]) for text in texts]
        return ends | to_device(unsure, device, torch.bool)
