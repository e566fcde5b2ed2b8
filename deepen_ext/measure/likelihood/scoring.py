"""Members and ensembles of them measured on the same texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.measure.likelihood.token_likelihoods import Difference, Score, TokenLikelihoods
from deepen_ext.members.loading import Progress


@dataclass(frozen=True)
class Scores:
    """What each member and each ensemble gave every text, in the texts' order.

    Attributes:
        alone: by the members' names, the main model first.
        fused: by the names that the ensembles were given.
    """

    alone: dict[str, list[TokenLikelihoods]]
    fused: dict[str, list[TokenLikelihoods]]

    @property
    def main(self) -> str:
        """The main model's name."""
        return next(iter(self.alone))

    @property
    def best_single(self) -> str:
        """The member that gives the texts the highest likelihood."""
        return max(self.alone, key=lambda name: sum(one.total for one in self.alone[name]))

    def score(self, name: str) -> Score:
        """Of a member or an ensemble."""
        return Score.of(self.fused[name] if name in self.fused else self.alone[name])

    def against(self, method: str, member: str) -> Difference:
        """An ensemble less a member alone; below 0 the ensemble is better."""
        return Difference.of(self.fused[method], self.alone[member])


def score_texts(
    texts: Sequence[tuple[str, str]],
    ensembles: Mapping[str, Ensemble],
    *,
    progress: Progress | None = None,
) -> Scores:
    """Measure ensembles, and each of their members alone.

    Args:
        texts: (context, scored text), such as `pieces` gives. All are tokenised before the first is read.
        ensembles: by name; of the same `Member` objects in the same order, the main model first.
        progress: told of every text.

    Raises:
        InputError: no texts or ensembles; ensembles of other members, or with a member's name; a text that
            cannot be scored (see `TextReading`).
        ModelError: a forward pass failed.
    """
    if not texts or not ensembles:
        raise InputError("there is nothing to measure; give one or more texts and ensembles")
    first = next(iter(ensembles.values()))
    for name, one in ensembles.items():
        if list(map(id, one.members)) != list(map(id, first.members)):
            raise InputError(f"{name} has other members, or another main model; measure it by itself")
        if name in first.names:
            raise InputError(f"{name} is a member's name and an ensemble's; give one of them another name")
    readings = [TextReading(first.members, *text) for text in texts]
    scores = Scores({name: [] for name in first.names}, {name: [] for name in ensembles})
    try:
        for i, reading in enumerate(readings):
            if progress is not None:
                progress(f"Reading, piece {i + 1} of {len(texts)}")
            with reading:
                for name, member in zip(first.names, first.members, strict=True):
                    scores.alone[name].append(reading.member(member))
                for name, one in ensembles.items():
                    scores.fused[name].append(reading.fused(one))
    finally:
        for one in ensembles.values():
            one.save_rows()  # also after an interrupt: what was computed is not lost
    return scores
