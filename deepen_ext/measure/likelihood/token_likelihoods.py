"""Likelihoods of a text's tokens: totals, bits a byte, differences, and how sure they are.

A standard error is that between blocks of about 128 bytes: neighbouring tokens depend on one another, and
blocks of bytes are the same parts of the text for every tokenisation, so that differences can be taken in
pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepen_ext.errors import InputError
from deepen_ext.ground.numbers import whole_number

BLOCK = 128  # bytes


@dataclass(frozen=True)
class TokenLikelihoods:
    """What a distribution gave the tokens of one text.

    Attributes:
        logprobs: natural logarithms, one for each scored token.
        ends: where each token ends, in bytes of the scored text; the last one is its length. A token that
            begins in the context counts from the text's beginning.
        greedy: whether the token is the most probable one; empty where nobody asked.
        nbytes: of the scored text.
    """

    logprobs: list[float]
    ends: list[int]
    greedy: list[bool]
    nbytes: int

    @property
    def total(self) -> float:
        """Natural logarithm of the text's probability."""
        return math.fsum(self.logprobs)

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood, base 2, for each byte of the text."""
        return -self.total / math.log(2) / self.nbytes

    def by_blocks(self, size: int) -> list[float]:
        """The total in shares of blocks of `size` bytes, the last one perhaps shorter.

        A token's log-probability is spread evenly over its bytes. Block i is the same part of the text for
        every tokenisation, so that blocks can be compared in pairs.
        """
        return self._spread(self.logprobs, size)

    def tokens_by_blocks(self, size: int) -> list[float]:
        """How many tokens there are in the blocks of `by_blocks`, parts of tokens counted as such."""
        return self._spread([1.0] * len(self.ends), size)

    def _spread(self, values: Sequence[float], size: int) -> list[float]:
        size = whole_number("the size of blocks", size, 1)
        blocks = [0.0] * -(-self.nbytes // size)
        begin = 0
        for value, end in zip(values, self.ends, strict=True):
            if end == begin:  # a token without bytes of the text
                blocks[min(begin // size, len(blocks) - 1)] += value
                continue
            for block in range(begin // size, -(-end // size)):
                covered = min(end, (block + 1) * size) - max(begin, block * size)
                blocks[block] += value * covered / (end - begin)
            begin = end
        return blocks


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None with fewer than two blocks, or where the mean is not finite."""

    value: float
    error: float | None


def ratio(amounts: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """All amounts over all sizes, with the standard error for blocks drawn independently.

    The blocks' sizes differ, so this is a ratio of two means: its error is that of the residuals ``a_i - R
    s_i`` (Cochran, Sampling Techniques, 1977, section 2.11).

    Args:
        amounts: of each block.
        sizes: of each block, in whatever the estimate is for each of.

    Returns:
        The mean is NaN where one block has infinity and another one minus infinity.
    """
    total, count = math.fsum(sizes), len(sizes)
    is_open = math.inf in amounts and -math.inf in amounts  # `fsum` raises ValueError
    value = math.nan if is_open else math.fsum(amounts) / total
    if count < 2 or not math.isfinite(value):
        return Estimate(value, None)
    squares = math.fsum((a - value * size) ** 2 for a, size in zip(amounts, sizes, strict=True))
    return Estimate(value, math.sqrt(squares * count / (count - 1)) / total)


@dataclass(frozen=True)
class Score:
    """What a distribution gave some texts, taken together.

    Attributes:
        tokens: how many were scored.
        nbytes: of the texts.
        impossible: how many of the tokens had probability 0; with one of them the likelihood is 0.
        greedy: share of the tokens that were the most probable one.
        nats_per_token: negative log-likelihood for each of the distribution's own tokens.
        bits_per_byte: negative log-likelihood, base 2, for each byte.
    """

    tokens: int
    nbytes: int
    impossible: int
    greedy: float
    nats_per_token: Estimate
    bits_per_byte: Estimate

    @classmethod
    def of(cls, texts: Sequence[TokenLikelihoods]) -> Score:
        """The score of one or more texts."""
        tokens = sum(len(one.logprobs) for one in texts)
        nats_per_token, bits_per_byte = _estimates(texts, _nats(texts))
        return cls(
            tokens=tokens,
            nbytes=sum(one.nbytes for one in texts),
            impossible=sum(one.logprobs.count(-math.inf) for one in texts),
            greedy=sum(sum(one.greedy) for one in texts) / tokens,
            nats_per_token=nats_per_token,
            bits_per_byte=bits_per_byte,
        )


@dataclass(frozen=True)
class Difference:
    """A score less another one's on the same texts, in pairs of blocks; below 0 the first one is better."""

    nats_per_token: Estimate  # for each of the first one's tokens
    bits_per_byte: Estimate

    @classmethod
    def of(cls, texts: Sequence[TokenLikelihoods], others: Sequence[TokenLikelihoods]) -> Difference:
        """Of the same texts, in the same order.

        Raises:
            InputError: the texts have other lengths.
        """
        if [one.nbytes for one in texts] != [one.nbytes for one in others]:
            raise InputError("the two are not of the same texts; score both on the same ones")
        more = [a - b for a, b in zip(_nats(texts), _nats(others), strict=True)]
        return cls(*_estimates(texts, more))


def _nats(texts: Sequence[TokenLikelihoods]) -> list[float]:
    """Negative log-likelihood of each block."""
    return [-logprob for one in texts for logprob in one.by_blocks(BLOCK)]


def _estimates(texts: Sequence[TokenLikelihoods], nats: Sequence[float]) -> tuple[Estimate, Estimate]:
    """Nats of each block of the texts: for each of their tokens, and as bits for each byte."""
    tokens = [count for one in texts for count in one.tokens_by_blocks(BLOCK)]
    sizes = [min(BLOCK, one.nbytes - begin) for one in texts for begin in range(0, one.nbytes, BLOCK)]
    return ratio(nats, tokens), ratio([one / math.log(2) for one in nats], sizes)
