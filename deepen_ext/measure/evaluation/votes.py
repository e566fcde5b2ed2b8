"""Votes: an item is answered by several texts, and the answer that most of them give is its answer.

The texts are samples of one configuration (self-consistency: Wang et al., ICLR 2023, arXiv 2203.11171), or
what several configurations wrote, such as all members alone (the voting of Huang et al., arXiv 2404.12715).

    answers = [task.answer(text) for text in texts]       a text without an answer does not vote
    groups  = equal answers, as task.answers.matches says
    answer  = the largest group's; of groups of one size, that of the answer that came first
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import real_number, whole_number
from deepen_ext.measure.evaluation.headers import Header
from deepen_ext.measure.evaluation.records import ItemRecord, ItemTiming, Vote
from deepen_ext.measure.evaluation.tasks import Item, Task

DEFAULT_TEMPERATURE = 0.7  # Wang et al.'s for GPT-3 and PaLM
DEFAULT_TOP_P = 0.95


@dataclass(frozen=True)
class Votes:
    """How many texts of an item vote, and how they are drawn.

    Attributes:
        count: texts of an item, 2 or more.
        temperature: of sampling.
        top_p: of sampling; 1 for the whole distribution.
        seed: every text has a seed of its own, made of this one, the item's index and the vote's number. So a
            text depends neither on the batch size nor on `count`, and all configurations draw with the same
            random numbers: they differ in what they say, not in luck.
    """

    count: int
    temperature: float
    top_p: float
    seed: int

    @classmethod
    def read(
        cls, count: int, temperature: float | None, top_p: float | None, seed: int | None
    ) -> Votes | None:
        """What was asked for; None for one greedy text an item.

        Raises:
            InputError: a number out of range; settings of sampling without votes.
        """
        given = {"temperature": temperature, "top_p": top_p, "seed": seed}
        if whole_number("votes", count, 1) == 1:
            if named := [name for name, value in given.items() if value is not None]:
                raise InputError(
                    f"{' and '.join(named)}: one text an item is written greedily; give votes=2 or more "
                    f"(--votes) to sample, or leave {'it' if len(named) == 1 else 'them'} out"
                )
            return None
        return cls(
            count,
            real_number(
                "temperature",
                DEFAULT_TEMPERATURE if temperature is None else temperature,
                "above 0 to 100: without sampling all votes would be the same text",
                lambda x: 0 < x <= 100,
            ),
            real_number(
                "top_p", DEFAULT_TOP_P if top_p is None else top_p, "above 0 to 1", lambda x: 0 < x <= 1
            ),
            whole_number("seed", 0 if seed is None else seed, -(2**62), 2**62),
        )

    def settings(self, items: Sequence[Item]) -> dict[str, Any]:
        """What `Ensemble.generate` takes for `count` texts of each item, item after item."""
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": [_seed(self.seed, item.index, vote) for item in items for vote in range(self.count)],
        }


@dataclass(frozen=True)
class Poll:
    """A configuration of `evaluate` that writes nothing: the texts of other configurations vote.

    Attributes:
        voters: names of other configurations of the same call. Of answers with equally many votes the one
            that comes first in this order wins, so the best one's stands first. With votes, each
            configuration has all its votes.
    """

    voters: tuple[str, ...]

    def header(self, name: str, configurations: Mapping[str, Header]) -> Header:
        """The configuration part of its files' headers; those of the voters are in it.

        Raises:
            InputError: fewer than two voters, one that is there twice or not among the configurations.
        """
        if len(set(self.voters)) < max(2, len(self.voters)):
            raise InputError(f"{name}: a vote takes two or more configurations, each named once")
        if unknown := [one for one in self.voters if one not in configurations]:
            raise InputError(
                f"{name}: no configuration {unknown[0]} writes answers in this call; there are "
                f"{', '.join(configurations) or 'none'}"
            )
        voters = [configurations[one] for one in self.voters]
        members = [member for one in voters for member in one["members"]]
        return {
            "name": name,
            "method": "vote",
            "members": [one for i, one in enumerate(members) if one not in members[:i]],
            "weights": [1 / len(voters)] * len(voters),
            "share_forwards": any(one["share_forwards"] for one in voters),
            "voters": voters,
        }

    def records(
        self, task: Task, items: Iterable[Item], written: Mapping[str, Sequence[ItemRecord]]
    ) -> list[ItemRecord]:
        """Its records of these items, from all that its voters have written."""
        found = [{record.index: record for record in written[one]} for one in self.voters]
        return [counted(task, item, [own[item.index] for own in found]) for item in items]


def counted(task: Task, item: Item, records: Sequence[ItemRecord]) -> ItemRecord:
    """One record of several of an item: the answer is the majority's, tokens and times are the sums.

    `output` and `finish_reason` are those of the first text with that answer, or of the first text where none
    has an answer.
    """
    votes = [
        vote
        for one in records
        for vote in one.votes or [Vote(one.output, one.answer, one.tokens, one.finish_reason)]
    ]
    winner = votes[majority(task, [one.answer for one in votes]) or 0]
    return ItemRecord(
        index=item.index,
        output=winner.output,
        answer=winner.answer,
        correct=task.correct(winner.output, item),
        tokens=sum(one.tokens for one in records),
        changed=sum(one.changed for one in records),
        finish_reason=winner.finish_reason,
        timing=ItemTiming(
            prompt_ms=round(sum(one.timing.prompt_ms for one in records), 4),
            decode_ms=round(sum(one.timing.decode_ms for one in records), 4),
            rows=max(one.timing.rows for one in records),
        ),
        votes=votes,
    )


def majority(task: Task, answers: Sequence[str | None]) -> int | None:
    """The place of the first answer that agrees with most; None where there is no answer."""
    groups: list[list[int]] = []
    for place, answer in enumerate(answers):
        if answer is None:
            continue
        for group in groups:
            if task.answers.matches(answer, str(answers[group[0]])):
                group.append(place)
                break
        else:
            groups.append([place])
    return max(groups, key=len)[0] if groups else None  # of several the first


def _seed(seed: int, item: int, vote: int) -> int:
    """The seed, of 62 bits, of one text."""
    data = hashlib.blake2b(struct.pack("<qqq", seed, item, vote), digest_size=8).digest()
    return int.from_bytes(data, "little") >> 2
