"""How often a draft's tokens stand, by how sure its writer was."""

from __future__ import annotations

from bisect import bisect_right

_EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)  # of margins, 0 to 1
_PRIOR = 4.0  # tokens that the guess before any measurement counts for
_MEMORY = 200.0  # tokens of a class that count; older ones fade


class Acceptance:
    """The share of tokens that stood, for each class of margins, and over all.

    Every token that is verified tells, also where nothing was written after it: so it is known before the
    first draft is made.
    """

    def __init__(self) -> None:
        # Before anything is known: half of the tokens without a margin stand, all of those that are certain.
        middles = [(low + high) / 2 for low, high in zip((0.0, *_EDGES), (*_EDGES, 1.0), strict=True)]
        self._stood = [_PRIOR * (1 + middle) / 2 for middle in middles]
        self._seen = [_PRIOR] * len(middles)
        self._all_stood, self._all_seen = _PRIOR / 2, _PRIOR

    def see(self, margin: float, stood: bool) -> None:
        """A token of this margin was verified."""
        at = bisect_right(_EDGES, margin)
        fade = 1 - 1 / _MEMORY
        self._stood[at] = self._stood[at] * fade + stood
        self._seen[at] = self._seen[at] * fade + 1
        self._all_stood = self._all_stood * fade + stood
        self._all_seen = self._all_seen * fade + 1

    def chance(self, margin: float) -> float:
        """Of a token of this margin to stand."""
        at = bisect_right(_EDGES, margin)
        return self._stood[at] / self._seen[at]

    @property
    def mean(self) -> float:
        """Of any token to stand."""
        return self._all_stood / self._all_seen


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens that a cycle writes: those of its draft that stand, and the one after them.

    1 + a + ... + a^g, with a the chance of each token to stand and g the draft's length (Leviathan et al.
    2023, equation 1).
    """
    return float(sum(acceptance**j for j in range(length + 1)))
