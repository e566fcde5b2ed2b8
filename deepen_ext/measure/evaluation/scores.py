"""The scores of one configuration on one task: with intervals, and paired with the best single member."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepen_ext.measure.evaluation.headers import Header
from deepen_ext.measure.evaluation.records import ChoiceRecord, Record
from deepen_ext.measure.evaluation.statistics import mcnemar, wilson_interval


@dataclass(frozen=True)
class Comparison:
    """A fused configuration beside the best of its members alone, on the same items.

    The best member is picked on these items themselves, which favours it: the comparison is strict.

    Attributes:
        configuration: the best member's.
        difference: accuracy of the fused configuration minus that of the best member.
        interval: 95 %, of the difference.
        p_value: of McNemar's exact test.
        gained: items that only the fused configuration has right.
        lost: items that only the best member has right.
    """

    configuration: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    gained: int
    lost: int


@dataclass(frozen=True)
class Timing:
    """What the clock said.

    Attributes:
        seconds: in all.
        ms_per_token: the time of all steps but those that read the prompts, divided by the tokens that these
            steps wrote. None where every text has one token, and of choices, for which nothing is written.
        shared_forwards: configurations had forwards in common. Then times say what all of them took, and not
            what each would take.
    """

    seconds: float
    ms_per_token: float | None
    shared_forwards: bool


@dataclass(frozen=True)
class Rate:
    """How often a configuration is right by one metric.

    Attributes:
        correct: how many items are right.
        accuracy: their share.
        interval: 95 %, Wilson's.
        against_best_single: None for a member alone, and where some member is not there alone.
    """

    correct: int
    accuracy: float
    interval: tuple[float, float]
    against_best_single: Comparison | None


@dataclass(frozen=True)
class Score(Rate):
    """One configuration on one task, by the task's metric.

    Attributes:
        method: how it fuses; "single" for a member alone.
        members: their names, the main model first.
        weights: of the members; where a rule finds them for each prompt, its name and what it starts from.
        n: how many items.
        unanswered_share: share of the items without an answer in their text, or without a choice that has a
            probability above 0.
        timing: apart from everything else, because no two runs have the same times.
    """

    method: str
    members: list[str]
    weights: list[float] | dict[str, Any]
    n: int
    unanswered_share: float
    timing: Timing


@dataclass(frozen=True)
class TextScore(Score):
    """Of texts that were written.

    Attributes:
        votes: how many texts of an item voted; 1 where there was no vote.
        tokens: how many were written.
        changed_share: share of the tokens that are not the main model's own first choice.
        finish_reasons: how many texts ended for each reason.
    """

    votes: int
    tokens: int
    changed_share: float
    finish_reasons: dict[str, int]


@dataclass(frozen=True)
class ChoiceScore(Score):
    """Of choices: as `acc`, by the log-likelihood of a choice.

    Attributes:
        norm: as `acc_norm`, by the log-likelihood for each byte. Its best single member may be another one.
    """

    norm: Rate


# What each member scored alone: the configuration's name and records, by `identity`.
Singles = Mapping[str, tuple[str, Sequence[Record]]]


def is_alone(configuration: Header) -> bool:
    """Whether it is of one member."""
    return len(configuration["members"]) == 1


def identity(member: Mapping[str, Any]) -> str:
    """A member by what it computes, whatever it is called."""
    return json.dumps({key: value for key, value in member.items() if key != "name"})


def score_of(configuration: Header, records: Sequence[Any], singles: Singles) -> TextScore | ChoiceScore:
    """The score from all records of a configuration, which are of one kind and in the items' order."""
    common = {
        **vars(_rate(configuration, records, singles, "correct")),
        "method": configuration["method"],
        "members": [member["name"] for member in configuration["members"]],
        "weights": configuration["weights"],
        "n": len(records),
    }
    shared = configuration["share_forwards"]
    if isinstance(records[0], ChoiceRecord):
        seconds = math.fsum(record.timing.seconds for record in records)
        return ChoiceScore(
            **common,
            unanswered_share=sum(record.chosen is None for record in records) / len(records),
            norm=_rate(configuration, records, singles, "correct_norm"),
            timing=Timing(round(seconds, 3), ms_per_token=None, shared_forwards=shared),
        )
    tokens = sum(record.tokens for record in records)
    votes = len(records[0].votes) or 1
    later = tokens - len(records) * votes  # after the first of each text
    reasons = [one.finish_reason for record in records for one in record.votes]
    reasons = reasons or [record.finish_reason for record in records]
    decoding = sum(record.timing.decode_ms for record in records)
    milliseconds = sum(record.timing.prompt_ms for record in records) + decoding
    return TextScore(
        **common,
        unanswered_share=sum(record.answer is None for record in records) / len(records),
        votes=votes,
        tokens=tokens,
        changed_share=sum(record.changed for record in records) / tokens,
        finish_reasons=dict(sorted(Counter(reasons).items())),
        timing=Timing(
            seconds=round(milliseconds / 1e3, 3),
            ms_per_token=round(decoding / later, 3) if later else None,
            shared_forwards=shared,
        ),
    )


def _rate(configuration: Header, records: Sequence[Record], singles: Singles, metric: str) -> Rate:
    """By a record's field that says whether the item is right."""
    right = [bool(getattr(record, metric)) for record in records]
    return Rate(
        correct=sum(right),
        accuracy=sum(right) / len(right),
        interval=wilson_interval(sum(right), len(right)),
        against_best_single=_compare(configuration, right, singles, metric),
    )


def _compare(
    configuration: Header, right: Sequence[bool], singles: Singles, metric: str
) -> Comparison | None:
    own = [identity(member) for member in configuration["members"]]
    if is_alone(configuration) or any(one not in singles for one in own):
        return None
    alone = [
        (name, [bool(getattr(record, metric)) for record in records])
        for name, records in map(singles.__getitem__, own)
    ]
    # Of equally good members the first: the main model before an assistant.
    name, best = max(alone, key=lambda one: sum(one[1]))
    paired = mcnemar(right, best)
    return Comparison(
        configuration=name,
        difference=paired.difference,
        interval=(paired.low, paired.high),
        p_value=paired.p_value,
        gained=paired.only_a,
        lost=paired.only_b,
    )
