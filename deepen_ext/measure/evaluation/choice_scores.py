"""Some ensembles over items with choices: each member reads each choice once, for all of them."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from time import perf_counter

from deepen_ext.ensemble import Ensemble
from deepen_ext.measure.evaluation.choices import ChoiceItem
from deepen_ext.measure.evaluation.records import ChoiceRecord, ChoiceTiming
from deepen_ext.measure.likelihood.text_reading import TextReading

Records = dict[str, list[ChoiceRecord]]  # by the name of the configuration

_BATCH_BYTES = (
    2048  # of prompts with choices that are read together: 150 scored tokens, 150 MB of logits by Gemma
)


def score_choices(
    items: Sequence[ChoiceItem], ensembles: Mapping[str, Ensemble], size: int, *, shared: bool
) -> Generator[Records, None, None]:
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
) -> Generator[Records, None, None]:
    members = list({id(member): member for one in ensembles.values() for member in one.members}.values())
    weighs = any(one.weighs_prompts for one in ensembles.values())
    before: TextReading | None = None
    readings: list[TextReading] = []
    try:
        for start in range(0, len(items), size):
            found: Records = {name: [] for name in ensembles}
            for batch in _batches(items[start : start + size]):
                began = perf_counter()
                by_item = [
                    [TextReading(members, item.prompt, f" {choice}") for choice in item.choices]
                    for item in batch
                ]
                readings = [reading for own in by_item for reading in own]
                if before is not None:
                    readings[0].go_on_from(before)
                    before.close()
                before = readings[0]
                TextReading.read_together(readings, contexts=weighs)
                scores = [[_log_likelihoods(reading, ensembles) for reading in own] for own in by_item]
                seconds = (perf_counter() - began) / len(batch) / len(ensembles)
                for name in ensembles:
                    for item, own in zip(batch, scores, strict=True):
                        found[name].append(_record(item, [one[name] for one in own], seconds))
                for reading in readings[1:]:
                    reading.close()
            yield found
    finally:
        for reading in (*readings, *([] if before is None else [before])):
            reading.close()


def _batches(items: Sequence[ChoiceItem]) -> Iterator[list[ChoiceItem]]:
    """Neighbours that are read together: beside a short item's tokens a forward pass is what costs."""
    batch: list[ChoiceItem] = []
    left = 0
    for item in items:
        nbytes = sum(len(f"{item.prompt} {choice}".encode()) for choice in item.choices)
        if batch and nbytes > left:
            yield batch
            batch = []
        left = (left if batch else _BATCH_BYTES) - nbytes
        batch.append(item)
    if batch:
        yield batch


def _log_likelihoods(reading: TextReading, ensembles: Mapping[str, Ensemble]) -> dict[str, float]:
    """Of one choice, by the name of the configuration."""
    fused = {name: one for name, one in ensembles.items() if one.method != "single"}
    found = reading.fused_each([(one, None) for one in fused.values()], greedy=False)
    by_name = {name: one.total for name, one in zip(fused, found, strict=True)}
    return {
        name: by_name[name] if name in fused else reading.member(one.members[0]).total
        for name, one in ensembles.items()
    }


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
