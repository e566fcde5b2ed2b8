"""Which lanes are fed together, and in which order, so that it costs least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepen_ext.members.asking import common_prefix
from deepen_ext.members.hf.kv_cache import CHUNK

# Tokens that a lane must be spared before it takes states from another one. The copy itself costs less than
# one token fed (SmolLM2 on two cores: 0.5 ms and 5 us a position, where a token takes 3 ms). But the few
# tokens of a step, which all lanes feed at once, must not be taken apart because two texts go the same way.
SHARED = 16

# What a forward costs beside its tokens (its weights are read once), in tokens.
_FORWARD_COST = {"cpu": 50, "cuda": 128}


def groups(new: Mapping[int, int], device: str) -> list[list[int]]:
    """Which lanes to feed together, by how many tokens they have to feed.

    A forward of b lanes costs its fixed part and b times its widest lane; the lanes are cut, sorted by width,
    where the sum is smallest. What is longer than a chunk goes by itself.
    """
    fixed = _forward_cost(device)
    if len(set(new.values())) == 1 and sum(new.values()) <= CHUNK:
        return [list(new)]
    lanes = sorted(new, key=lambda lane: new[lane])
    best: list[tuple[int, int]] = [(0, 0)]  # for the first n lanes: cost, and where the last group begins
    for n in range(1, len(lanes) + 1):
        width = new[lanes[n - 1]]
        best.append(
            min(
                (best[begin][0] + fixed + (n - begin) * width, begin)
                for begin in range(n)
                if (n - begin) * width <= CHUNK or begin == n - 1
            )
        )
    found = []
    end = len(lanes)
    while end:
        begin = best[end][1]
        found.append(sorted(lanes[begin:end]))
        end = begin
    return found[::-1]


def cost(new: Mapping[int, int], device: str) -> int:
    """What feeding these lanes costs, in tokens, forwards' fixed parts included."""
    fixed = _forward_cost(device)
    return sum(fixed + len(group) * max(new[lane] for lane in group) for group in groups(new, device))


def fed_first(wanted: Mapping[int, Sequence[int]], held: Mapping[int, int], device: str) -> list[int]:
    """Rows to feed now; the others wait, to take from these what they share.

    A lane waits where one fed now spares it `SHARED` tokens or more. Of several prompts that begin alike the
    longest goes alone, so that the rests are short; of several such groups, the longest of each. Nobody waits
    where two rounds would cost more than one.

    Args:
        wanted: the ids that each lane is to hold.
        held: how many of them it holds already; fewer than all.
        device: the kind of device, as torch names it.
    """
    first: list[int] = []
    now, later = {}, {}
    for lane, ids in sorted(wanted.items(), key=lambda one: -len(one[1])):
        left = len(ids) - held[lane]
        spared = 0
        if left > SHARED and first:  # the last token is fed in any case, for its logits
            common = max(common_prefix(ids, wanted[other]) for other in first)
            spared = min(common, len(ids) - 1) - held[lane]
        if spared >= SHARED:
            later[lane] = left - spared
        else:
            first.append(lane)
            now[lane] = left
    if later:
        at_once = cost({lane: len(ids) - held[lane] for lane, ids in wanted.items()}, device)
        if cost(now, device) + cost(later, device) >= at_once:
            return list(wanted)
    return first


def in_common(texts: Sequence[list[int]]) -> int:
    """Length of the prefix that all share. In sorted order the first and the last differ most."""
    return common_prefix(min(texts), max(texts))


def _forward_cost(device: str) -> int:
    return _FORWARD_COST.get(device, 128)
