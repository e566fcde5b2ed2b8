"""What every way of fusing has in common: who speaks for which row, with what weight, and what comes out.

A fuser is one class with one method of its own, `Fuser.fuse`. Everything around it (the loop, caches, text
hand-off, boundary rule) is the same for all, so that accuracy and speed can be compared.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from deepen_ext.errors import InputError
from deepen_ext.fusers.ingredients import Ingredients
from deepen_ext.fusers.parts import (
    FusedStep,
    Part,
    Said,
    check_shares,
    check_speaking,
    given_logits,
    placed,
    shares_by_row,
)
from deepen_ext.fusers.search_bound import SearchBound
from deepen_ext.fusers.weighing.rule import Rule
from deepen_ext.ground.numbers import whole_number
from deepen_ext.members.distribution import Distribution, take_topk
from deepen_ext.ops.copy import plain_copy
from deepen_ext.ops.token_logprobs import token_logprobs
from deepen_ext.ops.topk_softmax import TopK, check_status
from deepen_ext.ops.transfer import to_device

_SHARES_KEPT = 256  # weights on the device, for that many different sets of members and weights


class Fuser(ABC):
    """Fuses what the members say of B rows into the main model's logits, with fixed settings.

    Members' logits may be on any devices: each top-k is taken where the logits are, and its k ids and
    probabilities go to the main model's device. Threads may share a Fuser.

    Attributes:
        name: as users write it; "" for a function.
        uses_maps: it works in relative space, and is made of relative maps.
        uses_recipe: recipe, learning rate, steps and relative temperature are its settings.
        fewest_members: how many members it needs. 1: the main model writes alone, and others are not used.
        assistants_need_logits: it reads the assistants' full logits; False: their top-k and tail are enough.
        main_needs_logits: it reads the main model's full logits; False: its top-k is enough.
        spans: the loop lets members propose whole words, and `fuse` is not called (see `SpansFuser`).
        draws: where tokens are sampled, one member speaks for each, drawn by the weights (see `DrawFuser`).
        first_end_needs_all: no text ends at its first token unless all members that have a say would end it
            (see `decoding.first_token`); False: the end of a text is a token like any other there.
    """

    name: ClassVar[str] = ""
    uses_maps: ClassVar[bool] = False
    uses_recipe: ClassVar[bool] = False
    fewest_members: ClassVar[int] = 2
    assistants_need_logits: ClassVar[bool] = True
    main_needs_logits: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    spans: ClassVar[bool] = False
    first_end_needs_all: ClassVar[bool] = False

    @classmethod
    def make(cls, given: Ingredients) -> Fuser:
        """This fuser for the members of an ensemble.

        Raises:
            InputError: a setting out of range.
        """
        return cls(given.vocab_sizes, given.device, **given.common)

    def __init__(
        self,
        vocab_sizes: Sequence[int],
        device: torch.device,
        *,
        candidates: int = 128,
        rule: Rule | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Check the settings.

        Args:
            vocab_sizes: V_i of each member, the main model's first.
            device: the main model's.
            candidates: how many of a member's most probable tokens are looked at one by one.
            rule: who counts how much at a token, by what the members say there; None: the weights as given.
            names: the members', for error messages.

        Raises:
            InputError: a setting out of range.
        """
        self.rule = rule
        self.weighing = "" if rule is None else str(rule)  # records of results tell fusers apart by it
        self.vocab_sizes = list(vocab_sizes)
        self.device = device
        self.candidates = whole_number("candidates", candidates, 1)
        self.names = list(names) if names is not None else [f"member {i}" for i in range(len(vocab_sizes))]
        self._shares: dict[object, torch.Tensor] = {}
        self._captured: dict[object, torch.Tensor] = {}  # of them those that a CUDA graph reads
        self._lock = threading.RLock()  # of what a step computes once and keeps

    def search_bound(self) -> SearchBound | None:
        """How far `fuse` can move the main model's logits, whatever the assistants say; None: not known."""
        return None

    def bounded(self, weights: Sequence[float]) -> bool:
        """Whether `search_bound` holds in a text whose members have these weights."""
        return True

    @abstractmethod
    def fuse(self, logits: torch.Tensor, said: Sequence[Said], weights: torch.Tensor) -> torch.Tensor:
        """Write the fused logits into the main model's.

        Args:
            logits: [b, V_main] in the main model's dtype, a copy: written in place.
            said: what the members say, the main model first; those that sit out of all b rows are left out.
            weights: float32 [b, len(said)]; each row sums to 1, and has an assistant with a weight above 0.

        Returns:
            the argmax of the new logits, int32 [b], ties to the lower id.
        """

    def logprobs(self, said: Sequence[Said], weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What the fused distribution gives one token of each row; see `likelihoods`.

        Here by whole logits, which every fuser has. A fuser that knows a shorter way overrides it.

        Args:
            said: as for `fuse`.
            weights: as for `fuse`.
            tokens: int64 [b], of the main model.

        Returns:
            natural logarithms, float64 [b].
        """
        logits = plain_copy(said[0].placed(said[0].part.said.scores()))
        self.fuse(logits, said, weights)
        return token_logprobs(logits, tokens, name=f"{self.name or 'the fuser'} of {self.names[0]}")[0]

    def part(self, member: int, said: Distribution) -> Part:
        """What a member says of the first n rows of a step, its most probable tokens on the fusing device.

        Args:
            member: its index, 0 for the main model.
            said: of n positions.

        Raises:
            InputError: a vocabulary that does not fit, or (on the CPU) a position that has no softmax.
        """
        return self.parts([(member, said, range(len(said)))])[0]

    def parts(self, asked: Sequence[tuple[int, Distribution, Sequence[int]]]) -> list[Part]:
        """`part` of several members at once: one launch for all their top-k.

        Args:
            asked: (member, said, rows) of each; the positions are of these rows of the step.
        """
        for member, said, rows in asked:
            vocab_size = self.vocab_sizes[member]
            if len(said) != len(rows) or said.vocab_size != vocab_size:
                raise InputError(
                    f"logits of {self.names[member]} have shape {[len(said), said.vocab_size]}; expected "
                    f"[{len(rows)}, {vocab_size}], one row for each and as many tokens as the member has"
                )
        take_topk([said for _, said, _ in asked])
        parts = []
        for member, said, rows in asked:
            name = f"logits of {self.names[member]}"
            topk = TopK(*(one.to(self.device) for one in said.topk))
            if self.device.type == "cpu":
                check_status(name, topk.status.tolist(), rows)
            parts.append(Part(member, name, topk, rows, said))
        return parts

    def step(
        self,
        logits: Sequence[torch.Tensor | None],
        weights: Sequence[float] | Sequence[Sequence[float]],
        *,
        rows: Sequence[Sequence[int] | None] | None = None,
    ) -> FusedStep:
        """Fuse B rows, for a loop of your own.

        Args:
            logits: of each member, the main model first, [B, V_i]. None: the member sits out, and the others'
                weights are scaled to sum to 1. A row without assistants keeps the main model's logits.
            weights: a list with one for each member, as `check_weights` gives them; or such a list for each
                of the B rows.
            rows: where an assistant speaks for some of the B rows only: which ones its logits [n_i, V_i] are
                of, in rising order; None for all of them.

        Raises:
            InputError: see `fuse_logits`.
        """
        if not isinstance(logits, Sequence):
            raise InputError(
                f"the logits are a {type(logits).__name__}; give a list, one tensor [B, V] for each member"
            )
        if len(logits) != len(self.vocab_sizes):
            raise InputError(
                f"there are {len(logits)} logits for {len(self.vocab_sizes)} members; give one for each"
            )
        if logits[0] is None:
            raise InputError("the main model cannot sit out of a fusion step")
        check_shares(weights, len(logits))
        main = self._given(0, logits[0])
        speaks = [None] * len(logits) if rows is None else rows
        check_speaking(speaks, len(logits), len(main))
        asked: list[tuple[int, Distribution, Sequence[int]]] = [(0, main, range(len(main)))]
        for i, one in enumerate(logits[1:], start=1):
            if one is not None:
                own = speaks[i]
                asked.append((i, self._given(i, one), range(len(main)) if own is None else own))
        return self.step_parts(self.parts(asked), weights)

    def step_parts(
        self, parts: Sequence[Part], weights: Sequence[float] | Sequence[Sequence[float]]
    ) -> FusedStep:
        """`step` from what `part` gave for the members that speak, the main model first."""
        with self._lock:
            logits = parts[0].said.scores()
            main_choice = parts[0].topk.ids[:, 0]
            fused_rows, said, by_row = self.weighed(parts, weights)
            if not fused_rows:
                return FusedStep(logits, main_choice, main_choice, tuple(parts))
            there = None if len(fused_rows) == len(logits) else to_device(fused_rows, self.device)
            fused = plain_copy(logits)
            ours = fused if there is None else fused[there]
            chosen = self.fuse(ours, said, by_row)
            if self.device.type == "cpu":  # on CUDA this would wait for the device
                self._check_writable(ours, chosen, fused_rows)
            if there is not None:
                fused[there] = ours
                chosen = main_choice.index_copy(0, there, chosen)
            return FusedStep(fused, chosen, main_choice, tuple(parts), by_row, tuple(fused_rows))

    def likelihoods(
        self,
        parts: Sequence[Part],
        weights: Sequence[float] | Sequence[Sequence[float]],
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """How probable one given token is in each row: what `step_parts` would give it.

        Args:
            parts: as for `step_parts`; the main model's with full logits.
            weights: as for `step_parts`.
            tokens: int64 [B], of the main model, on the fusing device.

        Returns:
            natural logarithms, float64 [B].
        """
        with self._lock:
            fused_rows, said, by_row = self.weighed(parts, weights)
            alone = self._alone(parts[0], tokens)
            if not fused_rows:
                return alone
            there = to_device(fused_rows, self.device)
            return alone.index_copy(0, there, self.logprobs(said, by_row, tokens[there]))

    def _alone(self, main: Part, tokens: torch.Tensor) -> torch.Tensor:
        """What the main model by itself gives one token of each row, float64 [B]."""
        rows = torch.arange(len(tokens), device=self.device)
        return self._said(main, list(main.rows)).logprobs(rows, tokens)

    def weighed(
        self, parts: Sequence[Part], weights: Sequence[float] | Sequence[Sequence[float]]
    ) -> tuple[list[int], list[Said], torch.Tensor]:
        """Who speaks for the rows of a step, and how much each counts there.

        Returns:
            the b rows in which an assistant speaks, what each member says of them, and the weights float32
            [b, parts], as `fuse` takes them.
        """
        shares = shares_by_row(parts, weights, alone=len(self.vocab_sizes) == 1)
        fused_rows = [row for row, own in enumerate(shares) if own]
        if not fused_rows:
            return [], [], torch.empty(0, len(parts), dtype=torch.float32, device=self.device)
        said = [self._said(part, fused_rows) for part in parts]
        with self._lock:
            by_row = self._share(tuple(shares[row] for row in fused_rows))
            return fused_rows, said, by_row if self.rule is None else self.rule.weigh(by_row, said)

    def _check_writable(self, fused: torch.Tensor, chosen: torch.Tensor, rows: Sequence[int]) -> None:
        """Raise InputError for a row in which no token of the main model's is left."""
        best = fused.gather(1, chosen.long().clamp(min=0)[:, None])[:, 0]
        for row, found in zip(rows, best.tolist(), strict=True):
            if not math.isfinite(found):
                raise InputError(
                    f"row {row}: {self.names[0]} has no token for what the members with a say would write, "
                    f"such as another model's special token; give {self.names[0]} a weight of its own"
                )

    def _given(self, member: int, logits: torch.Tensor) -> Distribution:
        return given_logits(self.names[member], self.vocab_sizes[member], self.candidates, logits)

    def _share(self, weights: tuple[tuple[float, ...], ...]) -> torch.Tensor:
        """The weights float32 [B, n], where the main model is; kept for the steps that follow.

        A CUDA graph of the step reads this tensor. It is then kept as long as the Fuser, which the graph must
        not outlive.
        """
        found = self._captured.get(weights, self._shares.get(weights))
        if found is None:
            if len(self._shares) >= _SHARES_KEPT:
                self._shares.clear()
            found = to_device(weights, self.device, torch.float32)
            self._shares[weights] = found
        if _in_a_graph(found):
            self._captured[weights] = found
        return found

    def _said(self, part: Part, fused_rows: list[int]) -> Said:
        """The part's tokens in the order of the fused rows; elsewhere its weight is 0, nothing is read."""
        if list(part.rows) == fused_rows:
            return Said(part.member, part.name, part.topk, part, None)
        place = {row: i for i, row in enumerate(fused_rows)}
        places = [place.get(row, -1) for row in part.rows]
        topk = TopK(*placed(part.topk, places, len(fused_rows)))
        return Said(part.member, part.name, topk, part, places)


def _in_a_graph(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is captured that will read this tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
