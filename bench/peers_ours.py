"""Our side of `bench/peers.py`: members alone, and the fusers that stand beside the peers' ways."""

from __future__ import annotations

import math
from collections.abc import Mapping

from common import PROMPTS
from compare_setup import configurations, letters_of, load
from peers_setup import (
    BLOCK,
    LETTERS,
    Job,
    Memory,
    Question,
    Row,
    attempt,
    choices_right,
    questions,
    speed,
    texts,
)

from deepen_ext import Ensemble
from deepen_ext.measure.likelihood.text_reading import TextReading, TokenLikelihoods
from deepen_ext.members.member import Member

METHODS = ("deepen", "average", "union-topk", "union-vocab")


def measure(job: Job) -> list[Row]:
    """A row for each member alone and for each fuser."""
    members = load([job.pair])
    letters = letters_of(job.pair)
    for member in members.values():
        Ensemble([member], fuser="single").generate(PROMPTS[0], max_new_tokens=1)
    rows: dict[str, Row] = {}
    for method in METHODS:
        memory = Memory()
        made = configurations({one: members[one] for one in letters}, [job.pair], [method])
        name = next(one for one in made if one not in members)
        row = rows[name] = {"system": "deepen-ext", "name": name.partition(" ")[2]}
        attempt(row, "speed", lambda made=made, name=name, memory=memory: _speed(job, made[name], memory))
        del made
    for letter in letters:
        memory = Memory()
        alone = Ensemble([members[letter]], fuser="single")
        row = rows[letter] = {"system": "alone", "name": letter}
        attempt(row, "speed", lambda alone=alone, memory=memory: _speed(job, alone, memory))
    ensembles = configurations({one: members[one] for one in letters}, [job.pair], METHODS)
    _texts(job, ensembles, rows)
    _choices(job, ensembles, rows)
    _letters(job, ensembles, rows)
    return [rows[name] for name in ensembles]


def _speed(job: Job, ensemble: Ensemble, memory: Memory) -> dict[str, object]:
    def write(prompts: list[str]) -> float:
        ensemble.generate(
            prompts if len(prompts) > 1 else prompts[0],
            max_new_tokens=job.tokens,
            min_new_tokens=job.tokens,
            draft=0,
        )
        return job.tokens

    return speed(job, write, memory)


def _texts(job: Job, ensembles: Mapping[str, Ensemble], rows: Mapping[str, Row]) -> None:
    """Bits of each block of the texts, and how many tokens are the most probable ones."""
    for row in rows.values():
        row["texts"] = []
    for text in texts(job):
        with TextReading(_members(ensembles), text.context, text.scored) as reading:
            for name, ensemble in ensembles.items():
                found = _read(reading, ensemble)
                rows[name]["texts"].append(
                    {
                        "kind": text.kind,
                        "bytes": found.nbytes,
                        "bits": [round(-one / math.log(2), 4) for one in found.by_blocks(BLOCK)],
                        "tokens": len(found.greedy),
                        "right_tokens": sum(found.greedy),
                    }
                )


def _choices(job: Job, ensembles: Mapping[str, Ensemble], rows: Mapping[str, Row]) -> None:
    """Which questions are right by the likelihoods of their choices."""
    found: dict[str, list[tuple[Question, list[float]]]] = {name: [] for name in ensembles}
    before: TextReading | None = None
    for question in questions(job):
        for values in found.values():
            values.append((question, []))
        for choice in question.choices:
            reading = TextReading(_members(ensembles), question.prompt, choice)
            if before is not None:
                reading.go_on_from(before)  # all choices have the question before them
                before.close()
            for name, ensemble in ensembles.items():
                found[name][-1][1].append(_read(reading, ensemble).total)
            before = reading
    for name, row in rows.items():
        row["choices"] = choices_right(found[name])


def _letters(job: Job, ensembles: Mapping[str, Ensemble], rows: Mapping[str, Row]) -> None:
    """Whether the most probable next token is the right letter."""
    for row in rows.values():
        row["letters"] = {"right": []}
    for question in questions(job)[: job.letters]:
        answer = f" {LETTERS[question.gold]}"
        with TextReading(_members(ensembles), question.letters_prompt, answer) as reading:
            for name, ensemble in ensembles.items():
                rows[name]["letters"]["right"].append(int(all(_read(reading, ensemble).greedy)))


def _members(ensembles: Mapping[str, Ensemble]) -> list[Member]:
    return list({id(one): one for each in ensembles.values() for one in each.members}.values())


def _read(reading: TextReading, ensemble: Ensemble) -> TokenLikelihoods:
    alone = len(ensemble.members) == 1
    return reading.member(ensemble.members[0]) if alone else reading.fused(ensemble)
