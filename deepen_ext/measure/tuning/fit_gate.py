"""Fits the four numbers of a `Gate` on dev items, and checks on items that it was not fitted on.

Where the fused distribution is an average of the members', a token's likelihood is ``sum_i w_i p_i``. What
the gate sees of each member and p_i are looked up once for each token; to try four numbers then takes no
fusion step. The check measures the ensemble itself with the gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.fusers import AverageFuser, Fuser, UnionVocabFuser
from deepen_ext.fusers.weighing.gate import GATE_NUMBERS, Gate
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.measure.tuning.configurations import TOLERANCE, paired_difference

NO_GATE = (0.0,) * GATE_NUMBERS  # weights stay as they are
_RIDGE = 1e-4  # nats a token, for the square of each number: no number grows for the sake of a few tokens
_DECIMALS = 4
_MOST_STEPS = 200


def check_gate_fuser(kind: type[Fuser]) -> None:
    """Check that a gate can be fitted for this fuser.

    Raises:
        InputError: what it makes of the members is no average of theirs.
    """
    if kind not in (AverageFuser, UnionVocabFuser):
        raise InputError("a gate weighs members of an average; use --fuser union-vocab or average")


@dataclass(frozen=True)
class GateEvidence:
    """What a gate has to do with at the tokens of one item: those n at which an assistant speaks.

    Tokens that no member can write are left out: no gate changes them.

    Attributes:
        features: x of each member, float64 [n, members, 4]; anything where its weight is 0.
        weights: lambda of each member at the token, float64 [n, members]; 0 where it sits out.
        logprobs: what each member gives the token, natural logarithms, float64 [n, members]. Special tokens
            that an assistant alone has do not count: the rest of what it says sums to 1.
    """

    features: torch.Tensor
    weights: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def of(cls, reading: TextReading, ensemble: Ensemble, weights: Sequence[float]) -> GateEvidence:
        """Of one item.

        Args:
            reading: the item, read by the ensemble's members.
            ensemble: with an average of the members, and a gate of any numbers.
            weights: lambda of each member, the main model first.
        """
        fuser, count = ensemble.fuser, len(ensemble.members)
        rule = fuser.rule
        assert isinstance(rule, Gate)
        blocks = [cls.together([], count)]
        for parts, given, tokens in reading.steps(ensemble, weights):
            rows, said, by_row = fuser.weighed(parts, given)
            if not rows:
                continue
            speaking = [one.member for one in said]
            features = torch.zeros(len(rows), count, GATE_NUMBERS, dtype=torch.float64, device="cpu")
            features[:, speaking] = rule.features(said).double().cpu()
            shares = torch.zeros(len(rows), count, dtype=torch.float64, device="cpu")
            shares[:, speaking] = by_row.double().cpu()
            # A member's own probability is what the average gives where it alone counts.
            logprobs = torch.full_like(shares, -math.inf)
            for member in speaking:
                alone = [float(i == member) for i in range(count)]
                logprobs[:, member] = fuser.likelihoods(parts, alone, tokens).cpu()[rows]
            # Where it sits out, that was the main model's.
            logprobs.masked_fill_(shares == 0, -math.inf)
            possible = logprobs.amax(dim=1) > -math.inf
            blocks.append(cls(features[possible], shares[possible], logprobs[possible]))
        return cls.together(blocks, count)

    @classmethod
    def together(cls, items: Sequence[GateEvidence], members: int) -> GateEvidence:
        """Of several items as one."""
        nothing = torch.zeros(0, members, dtype=torch.float64, device="cpu")
        return cls(
            torch.cat([nothing[..., None].expand(-1, -1, GATE_NUMBERS), *(one.features for one in items)]),
            torch.cat([nothing, *(one.weights for one in items)]),
            torch.cat([nothing, *(one.logprobs for one in items)]),
        )

    def likelihoods(self, gate: torch.Tensor) -> torch.Tensor:
        """Natural logarithms of what the average gives each token under a gate float64 [4], float64 [n]."""
        weights = (self.weights.log() + self.features @ gate).log_softmax(dim=1)
        return (weights + self.logprobs).logsumexp(dim=1)

    def bits(self, gate: Sequence[float]) -> float:
        """Of these tokens under a gate."""
        return -float(
            self.likelihoods(torch.tensor(gate, dtype=torch.float64, device="cpu")).sum()
        ) / math.log(2)


@dataclass(frozen=True)
class FittedGate:
    """A gate, and what it is worth on items that it was not fitted on.

    Attributes:
        numbers: fitted on all items.
        tokens: how many tokens that were, those at which an assistant speaks.
        without: bits of each item without a gate.
        held_out: bits of each item with the gate that was fitted on the half of the items without it.
        sizes: bytes of each item.
    """

    numbers: tuple[float, ...]
    tokens: int
    without: tuple[float, ...]
    held_out: tuple[float, ...]
    sizes: tuple[int, ...]

    @property
    def difference(self) -> tuple[float, float]:
        """Bits a byte by which it is above no gate on held-out items, and the standard error."""
        return paired_difference(self.held_out, self.without, self.sizes)

    @property
    def helps(self) -> bool:
        """Whether it is better than no gate by more than `TOLERANCE` standard errors."""
        difference, error = self.difference
        return difference < -TOLERANCE * error

    def bits_per_byte(self) -> tuple[float, float]:
        """Of the items with a gate that was not fitted on them, and without one."""
        return sum(self.held_out) / sum(self.sizes), sum(self.without) / sum(self.sizes)


# Bits of each item of a slice under a gate.
MeasureGate = Callable[[tuple[float, ...], slice], Sequence[float]]


def fit_gate(
    items: Sequence[GateEvidence], without: Sequence[float], sizes: Sequence[int], measure: MeasureGate
) -> FittedGate:
    """Fit a gate on all items; on each half of them for the check on the other half.

    Args:
        items: in an order that has nothing to do with what is in them.
        without: bits of each item without a gate.
        sizes: bytes of each item.
        measure: called for each half with the gate that was fitted on the other one.
    """
    held_out = list(without)
    for half, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        held_out[half] = measure(_fitted(items[other]), half)
    tokens = sum(len(one.weights) for one in items)
    return FittedGate(_fitted(items), tokens, tuple(without), tuple(held_out), tuple(sizes))


@torch.inference_mode(False)
@torch.enable_grad()  # whatever the caller is in: torch's search needs the gradient
def _fitted(items: Sequence[GateEvidence]) -> tuple[float, ...]:
    """The four numbers that make the items' tokens most probable, with a ridge on their squares."""
    if not any(len(one.weights) for one in items):
        return NO_GATE
    every = GateEvidence.together(items, items[0].weights.shape[1])
    gate = torch.zeros(GATE_NUMBERS, dtype=torch.float64, device="cpu", requires_grad=True)
    optimizer = torch.optim.LBFGS([gate], max_iter=_MOST_STEPS, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        found = _RIDGE * gate.square().sum() - every.likelihoods(gate).mean()
        found.backward()  # type: ignore[no-untyped-call]
        return float(found.detach())

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    # As a preset shows them; the check is on what is written.
    return tuple(round(number, _DECIMALS) for number in gate.tolist())
