"""What every session checks of what it is asked, and how ids that it holds go with ids that are wanted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import whole_number


class Limits(Protocol):
    """Of a backend, what the checks look at."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def context_length(self) -> int | None: ...  # noqa: D102


def lane_count(name: str, lanes: int) -> int:
    """How many lanes a session is opened with.

    Args:
        name: the member's.
        lanes: 1 or more.

    Raises:
        InputError: no such number.
    """
    return whole_number(f"{name}: a session's number of lanes", lanes, 1)


def check_lane(name: str, lane: int, count: int, in_use: Collection[int]) -> None:
    """That a session has a lane.

    Args:
        name: the member's.
        lane: the lane asked for.
        count: how many lanes the session was opened with.
        in_use: those not released.

    Raises:
        InputError: it does not exist, or was released.
    """
    if lane not in in_use:
        state = "was released" if 0 <= lane < count else f"is not one of 0..{count - 1}"
        raise InputError(f"{name}: lane {lane} {state}")


def check_ids(backend: Limits, lane: int, count: int, ids: Sequence[int]) -> None:
    """That a text can be fed.

    Args:
        backend: of the member.
        lane: for the message, where the session has several.
        count: the session's lanes.
        ids: the whole text.

    Raises:
        InputError: no ids, more than the context holds, or some outside the vocabulary.
    """
    where = backend.name if count == 1 else f"{backend.name}, lane {lane}"
    if not ids:
        raise InputError(
            f"{where}: nothing to feed; the text gives no tokens. Give a prompt that is not empty."
        )
    if backend.context_length is not None and len(ids) > backend.context_length:
        raise InputError(
            f"{where}: {len(ids)} tokens exceed its context of {backend.context_length}; "
            "shorten the prompt or ask for fewer new tokens"
        )
    if min(ids) < 0 or max(ids) >= backend.vocab_size:
        raise InputError(
            f"{where}: token ids must lie in 0..{backend.vocab_size - 1}, got {min(ids)}..{max(ids)}"
        )


def check_positions(
    name: str, wanted: Mapping[int, Sequence[int]], positions: int | Mapping[int, int]
) -> dict[int, int]:
    """How many positions are asked for of each lane, in the order of `wanted`.

    Args:
        name: the member's.
        wanted: whole id lists by lane.
        positions: one number for all lanes, or a number for each.

    Raises:
        InputError: the numbers are of other lanes than the texts; a number is none, or more than the lane
            has ids.
    """
    if isinstance(positions, Mapping):
        if positions.keys() != wanted.keys():
            raise InputError(
                f"{name}: positions are given for lanes {list(positions)} and texts for lanes "
                f"{list(wanted)}; give a number for each text, or one number for all"
            )
        counts = {
            lane: whole_number(f"{name}, lane {lane}: positions", positions[lane], 1) for lane in wanted
        }
    else:
        counts = dict.fromkeys(wanted, whole_number(f"{name}: positions", positions, 1))
    for lane, count in counts.items():
        if len(wanted[lane]) < count:
            raise InputError(
                f"{name}, lane {lane}: {count} positions are asked for of a text of {len(wanted[lane])} "
                "tokens; ask for fewer"
            )
    return counts


def check_start(name: str, ids: Sequence[int], start: int) -> None:
    """That a reading can begin after ``ids[start]``; InputError otherwise."""
    if not 0 <= start < len(ids):
        raise InputError(
            f"{name}: cannot read from position {start} of {len(ids)} ids; choose 0 to {len(ids) - 1}"
        )


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids the two have in common from the start. Of one type, list or tuple."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:  # the usual case
        return high
    while low < high:  # slices are compared at the speed of C
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def read_end(at: int, start: int, length: int, chunk: int, block: int) -> int:
    """Where the next forward pass of `Session.read` ends.

    A small rest goes with the block before it: alone, its few tokens would read all weights once more.

    Args:
        at: tokens that the lane holds.
        start: the first token after which there is a distribution.
        length: of the whole text.
        chunk: most tokens at once before `start`.
        block: most positions at once after it, and an eighth more where the text then ends.
    """
    if at < start:
        return min(at + chunk, start)
    return length if length - at <= block + block // 8 else at + block
