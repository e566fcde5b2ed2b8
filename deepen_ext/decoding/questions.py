"""What an assistant is asked about the places of some drafts, and its answers in the order of the places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from deepen_ext.decoding.places import Place
from deepen_ext.members.distribution import Distribution, joined


class Question(NamedTuple):
    """One call of an assistant's session, and the batch rows that its answer has something for."""

    targets: dict[int, Sequence[int]]  # ids by lane
    positions: dict[int, int]  # by lane
    rows: list[int]
    found: list[int]  # of each of these rows, which position of the answer


def questions_about(places: Sequence[Place], i: int, lanes: Mapping[int, int]) -> list[Question]:
    """What assistant i is asked about these places: one question, more where a token reaches across one.

    The last ids of each text come first; what is no beginning of them is left for the next question.

    Args:
        places: of texts that have a lane.
        i: the assistant, counted without the main model.
        lanes: by text.
    """
    left: dict[int, list[int]] = {}  # batch rows by text
    for row, place in enumerate(places):
        if i in place.asked and i not in place.known:
            left.setdefault(place.text, []).append(row)
    questions = []
    while left:
        one = Question({}, {}, [], [])
        rest: dict[int, list[int]] = {}
        start = 0
        for text, rows in left.items():
            ids = places[rows[-1]].asked[i]
            here = [row for row in rows if _begins(ids, places[row].asked[i])]
            if len(here) < len(rows):
                rest[text] = [row for row in rows if row not in here]
            first = len(places[here[0]].asked[i])
            lane, count = lanes[text], len(ids) - first + 1
            one.targets[lane], one.positions[lane] = ids, count
            one.rows.extend(here)
            one.found.extend(start + len(places[row].asked[i]) - first for row in here)
            start += count
        questions.append(one)
        left = rest
    return questions


def in_order(said: Sequence[tuple[list[int], Distribution]]) -> tuple[Distribution, list[int]]:
    """What an assistant said in several pieces, with the batch rows of each: one piece, its rows rising."""
    rows = [row for own, _ in said for row in own]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return joined([one for _, one in said]).at(order), [rows[at] for at in order]


def _begins(ids: Sequence[int], start: Sequence[int]) -> bool:
    return ids[: len(start)] == start
