"""What goes into a fusion step and what comes out: what each member says of which rows, the new logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepen_ext.errors import InputError, shown
from deepen_ext.ground.numbers import real_number
from deepen_ext.members.distribution import Distribution
from deepen_ext.ops.topk_softmax import TopK, check_status
from deepen_ext.ops.transfer import to_device, to_host


@dataclass(frozen=True)
class Part:
    """One member's part of a step: what it says, and of which rows."""

    member: int
    name: str
    topk: TopK  # [n, k], on the fusing device
    rows: Sequence[int]  # n rows of the step
    said: Distribution  # of these rows, where the member is

    @property
    def logits(self) -> torch.Tensor:
        """[n, V_i], where the member is.

        Raises:
            InputError: the member has only its most probable tokens.
        """
        if self.said.logits is None:
            raise InputError(f"{self.said.name}: there are no full logits, only its most probable tokens")
        return self.said.logits


@dataclass(frozen=True)
class FusedStep:
    """What a fusion step gives for B rows."""

    logits: torch.Tensor  # [B, V_main], the main model's new logits
    chosen: torch.Tensor  # int32 [B], their argmax
    main_choice: torch.Tensor  # int32 [B], the argmax of the main model's own logits
    parts: tuple[Part, ...] = ()  # of each member that took part, the main model first
    weights: torch.Tensor | None = None  # float32 [b, parts], of the rows that were fused
    fused_rows: tuple[int, ...] = ()  # b of the B rows: in the others the main model spoke alone

    @property
    def shares(self) -> list[tuple[float, ...]]:
        """Of each row the weights of `parts`, summing to 1; () where the main model spoke alone.

        On CUDA this waits for the device."""
        found: list[tuple[float, ...]] = [()] * len(self.logits)
        if self.weights is not None:
            for row, own in zip(self.fused_rows, self.weights.tolist(), strict=True):
                found[row] = tuple(own)
        return found

    def check(self) -> None:
        """Raise InputError where a member's row has no softmax. On CUDA this waits for the device."""
        for part in self.parts:
            check_status(part.name, part.topk.status.tolist(), part.rows)

    def read(self, tokens: torch.Tensor) -> tuple[list[int], list[int]]:
        """The sampled tokens (an integer dtype, [B]) and the main model's own choices, on the host.

        With what `check` looks at this is one copy from the device, the only one of a fusion step.

        Raises:
            InputError: see `check`.
        """
        if tokens.device.type == "cpu":  # `Fuser.parts` has looked at the status
            return tokens.tolist(), self.main_choice.tolist()
        wanted = [tokens.int(), self.main_choice, *(part.topk.status for part in self.parts)]
        chosen, main_choice, *status = (one.tolist() for one in to_host(*wanted))
        for part, found in zip(self.parts, status, strict=True):
            check_status(part.name, found, part.rows)
        return chosen, main_choice


@dataclass(frozen=True)
class Said:
    """What one member says of the b rows that are fused. Where its weight is 0 the row means nothing.

    Attributes:
        member: its place, 0 for the main model.
        name: the member's.
        topk: its most probable tokens, ids int32 [b, k], probabilities float32 [b, k] and tail [b].
        part: the same as the member gave it, for the rows that it spoke for.
        to_main: what `on_main` calls. A function as fuser has it; a `Fuser` that needs it is a `MappedFuser`.
    """

    member: int
    name: str
    topk: TopK
    part: Part
    _places: list[int] | None  # of the part's rows among the b; None where they are the same
    to_main: Callable[[Said], torch.Tensor] | None = None

    def row(self, place: int) -> torch.Tensor | None:
        """Its logits [V_i] for one of the b rows, where the member is; None where it says nothing of it."""
        if self._places is None:
            return self.part.logits[place]
        return self.part.logits[self._places.index(place)] if place in self._places else None

    def probabilities(self) -> torch.Tensor:
        """Its whole distribution, float32 [b, V_i], on the fusing device; rows it says nothing of are 0."""
        # From the sums that the top-k knows: torch's softmax adds a vocabulary up in float32, and is 1e-4 off
        # for one of a quarter of a million tokens.
        logits, topk = self.part.logits, self.part.topk
        best = logits.gather(1, topk.ids[:, :1].to(logits.device).long()).double()
        sums = best - topk.probs[:, :1].to(logits.device).double().log()
        return self.placed((logits.float() - sums.float()).exp_().to(self.topk.probs.device))

    def on_main(self) -> torch.Tensor:
        """Its whole distribution over the main model's tokens, float32 [b, V_main], on the fusing device.

        A token that the main model does not have counts for the main model's token that its text begins with.
        What has no such token is left out, so a row may sum to less than 1. Rows it says nothing of are 0.
        The first call looks all of the member's tokens up: some seconds for a large vocabulary.

        Raises:
            InputError: in a `Fuser` of its own class, which is a `MappedFuser` instead.
        """
        if self.to_main is None:
            raise InputError(
                "on_main is for a function as fuser; make the class a MappedFuser, with mapped(one) of an "
                "assistant and probabilities() of the main model"
            )
        return self.to_main(self)

    def logits_at(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Single logits, float64 [...] on the fusing device; anything in rows it says nothing of.

        Args:
            rows: int64 [...], of the b rows, on the fusing device.
            tokens: int64 [...], a token for each.
        """
        logits = self.part.logits
        if self._places is not None:
            given = {place: i for i, place in enumerate(self._places) if place >= 0}
            own = [given.get(place, 0) for place in range(len(self.topk.ids))]
            rows = to_device(own, rows.device)[rows]
        return logits[rows.to(logits.device), tokens.to(logits.device)].to(rows.device).double()

    def log_sums(self) -> torch.Tensor:
        """Log-sum-exp of each row's logits, float64 [b]; inf in rows it says nothing of.

        The most probable token's logit less the logarithm of its probability: nothing reads the vocabulary.
        """
        best, probability = self.topk.ids[:, 0].long(), self.topk.probs[:, 0].double()
        return self.logits_at(torch.arange(len(best), device=best.device), best) - probability.log()

    def logprobs(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Natural logarithms of single probabilities, float64 [...]; -inf in rows it says nothing of.

        Args:
            rows: int64 [...], of the b rows, on the fusing device.
            tokens: int64 [...], a token for each.
        """
        return self.logits_at(rows, tokens) - self.log_sums()[rows]

    def taken(self, values: torch.Tensor) -> torch.Tensor:
        """Values [b, ...] of the b rows, for the part's rows [n, ...]; anything for those not among them."""
        if self._places is None:
            return values
        return values[to_device([max(place, 0) for place in self._places], values.device)]

    def placed(self, values: torch.Tensor) -> torch.Tensor:
        """Values [n, ...] of the part's rows in their places among the b; the others are 0."""
        return values if self._places is None else placed([values], self._places, len(self.topk.probs))[0]


def given_logits(name: str, vocab_size: int, k: int, logits: torch.Tensor) -> Distribution:
    """Logits [n, V] that a caller gives for a member, as what it says.

    Raises:
        InputError: no tensor, or not of two dimensions.
    """
    if not isinstance(logits, torch.Tensor):
        raise InputError(
            f"logits of {name} must be a torch.Tensor [B, V], not {type(logits).__name__}; make one with "
            "torch.as_tensor(...)"
        )
    if logits.dim() != 2:
        raise InputError(
            f"logits of {name} have shape {list(logits.shape)}; expected two dimensions, one row for each "
            f"text and {vocab_size} tokens"
        )
    return Distribution(name, logits.shape[1], k, logits)


def placed(tensors: Sequence[torch.Tensor], places: Sequence[int], count: int) -> list[torch.Tensor]:
    """Each [n, ...] at these places among `count` rows, 0 elsewhere; a place below 0 is left out.

    All on one device, to which the places are sent once.
    """
    device = tensors[0].device
    kept = to_device([i for i, place in enumerate(places) if place >= 0], device)
    there = to_device([place for place in places if place >= 0], device)
    return [
        one.new_zeros(count, *one.shape[1:]).index_copy_(0, there, one.index_select(0, kept))
        for one in tensors
    ]


def shares_by_row(
    parts: Sequence[Part], weights: Sequence[float] | Sequence[Sequence[float]], *, alone: bool
) -> list[tuple[float, ...]]:
    """Each row's weights, one for each part and summing to 1; () for a row without an assistant.

    Args:
        parts: the main model's first, which speaks for every row.
        weights: one for each member, or such a list for each row.
        alone: there is one member only, and its rows are fused without an assistant.

    Raises:
        InputError: weights for another number of rows.
    """
    by_row = _by_row(weights, len(parts[0].rows))
    takes_part = [(part.member, set(part.rows)) for part in parts]
    shares = []
    for row, given in enumerate(by_row):
        own = [given[member] if row in rows else 0.0 for member, rows in takes_part]
        total = math.fsum(own)
        speaks = any(own[1:]) or (total > 0 and alone)
        shares.append(tuple(weight / total for weight in own) if speaks else ())
    return shares


def _by_row(weights: Sequence[float] | Sequence[Sequence[float]], batch: int) -> Sequence[Sequence[float]]:
    """The weights of each row."""
    if not weights or not _is_list(weights[0]):
        return [weights] * batch  # type: ignore[list-item]
    if len(weights) != batch:
        raise InputError(f"there are weights for {len(weights)} rows, and {batch} rows; give one list each")
    return weights  # type: ignore[return-value]


def check_shares(weights: Any, members: int) -> None:
    """That a caller's weights are what `shares_by_row` reads; how many rows there are, it checks itself.

    Raises:
        InputError: no list, not one for each member, or a weight that is negative or not finite.
    """
    rows = weights if isinstance(weights, Sequence) and weights and _is_list(weights[0]) else [weights]
    for own in rows:
        if not _is_list(own) or len(own) != members:
            raise InputError(
                f"weights is {shown(weights)}; give a list of {members}, one for each member, or such a list "
                "for each row"
            )
        for one in own:
            real_number("weight", one, "a number of 0 or more", lambda x: 0 <= x < math.inf)


def check_speaking(rows: Any, members: int, batch: int) -> None:
    """That a caller says of which rows each member speaks.

    Raises:
        InputError: not one for each member, or something else than numbers of rows in rising order.
    """
    if not _is_list(rows) or len(rows) != members:
        raise InputError(f"rows is {shown(rows)}; give a list of {members}, None for all rows of a member")
    for member, own in enumerate(rows):
        if own is None or (isinstance(own, range) and own == range(batch)):
            continue
        whole = _is_list(own) and all(type(row) is int and 0 <= row < batch for row in own)
        if not whole or list(own) != sorted(set(own)) or (member == 0 and len(own) < batch):
            which = "the main model speaks for all" if member == 0 else "in rising order, or None for all"
            raise InputError(
                f"rows of member {member} is {shown(own)}; give numbers of the {batch} rows, {which}"
            )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
