"""Some ensembles over items with choices: each member reads each choice once, for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter

from deepen_ext.ensemble import Ensemble
from deepen_ext.measure.evaluation.choices import ChoiceItem
from deepen_ext.measure.evaluation.records import ChoiceRecord, ChoiceTiming
from deepen_ext.measure.likelihood.text_reading import TextReading

Records = dict[str, list[ChoiceRecord]]  # by the name of the configuration


def score_choices(
    items: Sequence[ChoiceItem], ensembles: Mapping[str, Ensemble], size: int, *, shared: bool
) -> Iterator[Records]:
    """Records of the items, `size` items at a time.

    What the texts of neighbours begin with (an item's prompt, the demos of a domain) is read once. Nothing is
    handed on from one call to the next, so that a call gives the same numbers whatever was run before it.

    Args:
        items: in an order in which those of the same demos are neighbours.
        ensembles: by name; one of a member alone is scored without fusion.
        size: after how many items there is something to write.
        shared: all ensembles use one reading of each member. Without it each reads for itself, and the
            records of one ensemble come after those of another.

    Raises:
        InputError: a text that some member cannot read (see `TextReading`), a member that gives NaN.
        ModelError: a forward pass failed.
    """
    groups = [ensembles] if shared else [{name: one} for name, one in ensembles.items()]
    try:
        for group in groups:
            yield from _score_group(items, group, size)
    finally:
        for one in ensembles.values():
            one.save_rows()  # also after an interrupt: what was computed is not lost


def _score_group(
    items: Sequence[ChoiceItem], ensembles: Mapping[str, Ensemble], size: int
) -> Iterator[Records]:
    members = list({id(member): member for one in ensembles.values() for member in one.members}.values())
    before: TextReading | None = None
    try:
        for start in range(0, len(items), size):
            found: Records = {name: [] for name in ensembles}
            for item in items[start : start + size]:
                scores: dict[str, list[float]] = {name: [] for name in ensembles}
                seconds = dict.fromkeys(ensembles, 0.0)
                for choice in item.choices:
                    reading = TextReading(members, item.prompt, f" {choice}")
                    if before is not None:
                        reading.go_on_from(before)
                        before.close()
                    before = reading
                    for name, ensemble in ensembles.items():
                        began = perf_counter()
                        scores[name].append(_log_likelihood(reading, ensemble))
                        seconds[name] += perf_counter() - began
                for name, own in scores.items():
                    found[name].append(_record(item, own, seconds[name]))
            yield found
    finally:
        if before is not None:
            before.close()


def _log_likelihood(reading: TextReading, ensemble: Ensemble) -> float:
    if ensemble.method == "single":
        return reading.member(ensemble.members[0]).total
    return reading.fused(ensemble).total


def _record(item: ChoiceItem, scores: Sequence[float], seconds: float) -> ChoiceRecord:
    chosen, chosen_norm = (item.chosen(scores, by_bytes=by_bytes) for by_bytes in (False, True))
    return ChoiceRecord(
        index=item.index,
        logprobs=[None if one == -math.inf else one for one in scores],
        chosen=chosen,
        chosen_norm=chosen_norm,
        correct=chosen == item.right,
        correct_norm=chosen_norm == item.right,
        timing=ChoiceTiming(round(seconds, 6)),
    )
