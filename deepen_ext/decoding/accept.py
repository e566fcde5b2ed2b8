"""From a draft's fused logits to the tokens that are kept: place by place, until one is not the draft's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import Literal

import torch

from deepen_ext.decoding.assistants import Assistants
from deepen_ext.decoding.places import Draft, Proposal
from deepen_ext.decoding.sampler import Chooser
from deepen_ext.decoding.stopping import Stopping
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import TextInProgress, Written
from deepen_ext.fusers import FusedStep
from deepen_ext.members.distribution import select

# What became of a drafted token: it stood, it was replaced, or no assistant could have changed it.
Fate = Literal["stood", "replaced", "settled"]


@dataclass(frozen=True)
class Accepted:
    """A token that was written.

    Attributes:
        proposal: what the draft had at its place.
        row: of the fused step.
        token: the main model's id.
        position: of the token among the text's new ones.
        written: what it adds to the text.
    """

    proposal: Proposal
    row: int
    token: int
    position: int
    written: Written

    @property
    def stood(self) -> bool:
        """Whether the draft went on with this token."""
        return self.proposal.piece is not None and self.token == self.proposal.token

    @property
    def fate(self) -> Fate | None:
        """What became of the draft's token; None where nothing was drafted on it."""
        if self.proposal.place.reason == "settled":
            return "settled"
        if self.proposal.piece is None:
            return None
        return "stood" if self.stood else "replaced"


class Acceptor:
    """Chooses the tokens of a run and writes them into its texts.

    Processors, stop strings and stopping criteria see each token once, in order, with the text as it stands.

    Attributes:
        sampling_ms: time spent on the last drafts' choices.
        failure: what a processor or a criterion raised after other tokens of the last drafts were written.
            These are for the reader first.
    """

    def __init__(
        self,
        team: Team,
        texts: Mapping[int, TextInProgress],
        assistants: Assistants,
        chooser: Chooser,
        stopping: Stopping,
    ) -> None:
        self._team = team
        self._texts = texts
        self._assistants = assistants
        self._chooser = chooser
        self._stopping = stopping
        self.sampling_ms = 0.0
        self.failure: Exception | None = None

    def take_failure(self) -> Exception | None:
        """`failure`, which is None again afterwards."""
        failure, self.failure = self.failure, None
        return failure

    def accept(self, drafts: Mapping[int, Draft], fused: FusedStep) -> list[Accepted]:
        """Write what stands of each draft, and the first token that is another one.

        A text that ends has a `finish_reason` afterwards; what its draft had after that is dropped.

        Args:
            drafts: of the texts, by number.
            fused: its rows are the drafts' places, draft after draft.

        Raises:
            InputError: a member that gave NaN; processors that forbid every token (`ChoiceError`). After
                other tokens of these drafts were written, this is in `failure`.
        """
        began = perf_counter()
        choices = _Choices(self._chooser, drafts, self._texts, fused)
        self.sampling_ms = (perf_counter() - began) * 1e3
        accepted: list[Accepted] = []
        try:
            self._accept(drafts, choices, fused, accepted)
        except Exception as error:
            if not accepted:
                raise
            self.failure = error
        return accepted

    def _accept(
        self, drafts: Mapping[int, Draft], choices: _Choices, fused: FusedStep, accepted: list[Accepted]
    ) -> None:
        going, depth = list(drafts), 0
        while going:
            began = perf_counter()
            try:
                tokens = choices.at(depth, going)
            except Exception:
                for number in going:  # what follows in their drafts is dropped
                    self._assistants.texts[number] = drafts[number][depth].before
                raise
            self.sampling_ms += (perf_counter() - began) * 1e3
            following = []
            for number, token in zip(going, tokens, strict=True):
                one, row = drafts[number][depth], choices.starts[number] + depth
                text = self._texts[number]
                text.changed += token != choices.main_choices[row]
                accepted.append(Accepted(one, row, token, text.written, self._write(text, one, token)))
                text.finish_reason = self._stopping.reason(number, text, fused.logits[row : row + 1])
                if token == one.token and depth + 1 < len(drafts[number]):
                    if text.finish_reason is None:
                        following.append(number)
                    else:
                        self._assistants.texts[number] = drafts[number][depth + 1].before
            going, depth = following, depth + 1

    def _write(self, text: TextInProgress, one: Proposal, token: int) -> Written:
        """Give the token's text to the assistants; a special token has none, and they read its name."""
        number, main = one.place.text, self._team.main
        text.ids.append(token)
        if one.piece is not None and token == one.token:
            read = one.piece  # they have it from the draft
        else:
            self._assistants.texts[number] = one.before
            if self._stopping.ends_text(number, token):
                return Written(number, token, "")
            read = one.before.append(main.bytes_written(token))
        self._stopping.remember(number, text, read)
        piece = read if main.vocabulary.bytes_of(token) else read.removesuffix(main.name_of(token))
        if piece:
            text.pieces.append(piece)
        return Written(number, token, piece)


class _Choices:
    """The tokens chosen at the places of some drafts.

    Attributes:
        starts: the first batch row of each draft.
        main_choices: of each batch row, the main model's own first choice.
    """

    def __init__(
        self,
        chooser: Chooser,
        drafts: Mapping[int, Draft],
        texts: Mapping[int, TextInProgress],
        fused: FusedStep,
    ) -> None:
        self._chooser = chooser
        self._drafts = drafts
        self._texts = texts
        self._fused = fused
        self._lengths = {number: len(texts[number].ids) for number in drafts}
        starts = accumulate(map(len, drafts.values()), initial=0)
        self.starts = dict(zip(drafts, starts, strict=False))
        # All at once where that costs nothing, or saves reads of the device. Else in order: of the places
        # that are dropped nobody should compute anything, and a caller's processor may count its calls.
        plain = chooser.is_plain(drafts)
        in_order = chooser.keeps_state or (fused.logits.device.type == "cpu" and not plain)
        self._tokens = None
        if in_order:
            _, self.main_choices = fused.read(fused.main_choice)
        else:
            chosen = self._choose([(number, i) for number in drafts for i in range(len(drafts[number]))])
            self._tokens, self.main_choices = fused.read(chosen)

    def at(self, depth: int, numbers: Sequence[int]) -> list[int]:
        """The token of each of these texts at a place of its draft; all before it stood."""
        if self._tokens is not None:
            return [self._tokens[self.starts[number] + depth] for number in numbers]
        return self._choose([(number, depth) for number in numbers]).tolist()

    def _choose(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        fused = self._fused
        rows = [self.starts[number] + depth for number, depth in places]
        ids = [
            self._texts[number].ids[: self._lengths[number]]
            + [one.token for one in self._drafts[number][:depth]]
            for number, depth in places
        ]
        logits, chosen = (select(one, rows) for one in (fused.logits, fused.chosen))
        return self._chooser.choose(logits, [number for number, _ in places], ids, chosen)
