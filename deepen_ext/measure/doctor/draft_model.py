"""What drafts are expected to bring: the milliseconds of a token, from measured forwards and acceptance.

Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), equation 1.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from deepen_ext.decoding.drafts.draft_settings import MAIN
from deepen_ext.decoding.observed.acceptance import expected_tokens

WIDTHS = (1, 2, 4, 8)  # tokens of each text in the forwards that are timed
LONGEST = WIDTHS[-1] - 1  # tokens of a draft: with the place after them they fill the widest forward


@dataclass(frozen=True)
class ForwardTimes:
    """What one member's forwards take.

    Attributes:
        name: the member's.
        ms: milliseconds by number of tokens of each text, as in `WIDTHS`.
        back_ms: what it takes more than a forward of one token to drop the text's last tokens and read
            another token in their place.
        reads_anew: going back took more than twice as long as a token, every time: the member seems to read
            the whole text again.
    """

    name: str
    ms: tuple[float, ...]
    back_ms: float
    reads_anew: bool

    def of(self, width: int) -> float:
        """Milliseconds of a forward of 1 to 8 tokens of each text; on a line between measured widths."""
        above = bisect_left(WIDTHS, width)
        if WIDTHS[above] == width:
            return self.ms[above]
        low, high = WIDTHS[above - 1], WIDTHS[above]
        return self.ms[above - 1] + (self.ms[above] - self.ms[above - 1]) * (width - low) / (high - low)


@dataclass(frozen=True)
class Acceptance:
    """How a drafter's tokens fared on a sample.

    Attributes:
        stood: how many tokens stood, or would have stood.
        seen: of how many.
        reach: the share of the sample's tokens for which the drafter had a token to offer.
    """

    stood: int
    seen: int
    reach: float = 1.0

    @property
    def share(self) -> float:
        """Of the tokens that stood."""
        return self.stood / self.seen


def cycle_ms(
    times: Sequence[ForwardTimes],
    place_ms: float,
    *,
    drafter: int,
    length: int,
    acceptance: float,
    lanes: int = 1,
) -> float:
    """Milliseconds of a cycle with a draft of g tokens.

    With t_i(w) the forward of member i of w tokens of each text, d the drafter, f the fusion of a place, b_i
    what going back takes, and B texts:

        (g + 1) · t_d(1)  +  Σ_{i ≠ d} t_i(g + 1)  +  (g + 1) · f  +  (1 − a^(g·B)) · Σ_i b_i

    The drafter writes g tokens and is asked for one more place. Everybody else reads all places at once.
    Where a token falls, everybody goes back. Prompt lookup has no forwards of its own. A step without a draft
    is the main model's draft of length 0.

    Args:
        times: of all members, the main model first.
        place_ms: f: fusion and hand-off of one place of each text.
        drafter: a member index, or `LOOKUP`.
        length: g, 0 to 7.
        acceptance: a, the chance of a token to stand.
        lanes: B.
    """
    writing = (length + 1) * times[drafter].of(1) if drafter >= MAIN else 0.0
    reading = sum(one.of(length + 1) for i, one in enumerate(times) if i != drafter)
    falls = 1.0 - acceptance ** (length * lanes)
    return writing + reading + (length + 1) * place_ms + falls * sum(one.back_ms for one in times)


def ms_per_token(
    times: Sequence[ForwardTimes],
    place_ms: float,
    *,
    drafter: int,
    length: int,
    acceptance: float,
    lanes: int = 1,
    reach: float = 1.0,
) -> float:
    """Milliseconds a token of each text: `cycle_ms` over `expected_tokens`.

    A drafter that has something for a share r of the places alone (`reach`; prompt lookup) makes a cycle with
    a draft where one of the texts has something, of chance 1 − (1 − r)^B, and else a step without a draft. A
    text gets 1 + r · (Σ a^j − 1) tokens a cycle on average.
    """
    plain = cycle_ms(times, place_ms, drafter=MAIN, length=0, acceptance=1.0, lanes=lanes)
    drafted = cycle_ms(times, place_ms, drafter=drafter, length=length, acceptance=acceptance, lanes=lanes)
    some = 1.0 - (1.0 - reach) ** lanes
    tokens = 1.0 + reach * (expected_tokens(acceptance, length) - 1.0)
    return (some * drafted + (1.0 - some) * plain) / tokens


def best_length(
    times: Sequence[ForwardTimes], place_ms: float, *, drafter: int, found: Acceptance, lanes: int = 1
) -> tuple[int, float]:
    """The draft's length from 1 to 7 with the fewest milliseconds a token, and these."""
    expected = (
        ms_per_token(
            times,
            place_ms,
            drafter=drafter,
            length=length,
            acceptance=found.share,
            lanes=lanes,
            reach=found.reach,
        )
        for length in range(1, LONGEST + 1)
    )
    return min(enumerate(expected, start=1), key=lambda one: one[1])
