"""Random numbers of a text's tokens, and draws with them."""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Sequence

import torch

from deepen_ext.errors import InputError


def seeds_and_numbers(seed: int | Sequence[int] | None, count: int) -> list[tuple[int, int]]:
    """Of each text, a seed, and its number among the texts that have this seed."""
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise InputError(f"{len(seed)} seeds for {count} prompts; give one for each, or one for all")
        return [(one, 0) for one in seed]
    seed = secrets.randbits(62) if seed is None else seed
    return [(seed, text) for text in range(count)]


def seed_of(seed: int, text: int, position: int, use: bytes = b"") -> int:
    """The seed, of 63 bits, of one token's random numbers for some use: b"" for the draw of the token."""
    data = hashlib.blake2b(struct.pack("<qqq", seed, text, position), digest_size=8, person=use).digest()
    return int.from_bytes(data, "little") >> 1


def draw(probs: torch.Tensor, seeds: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """One draw for each row of probabilities [b, V], with the random numbers of the row's seed; int64 [b].

    A draw is an exponential race. Every token has a random number E ~ Exp(1), and the token with the largest
    p / E wins: token v with probability p_v. Races with the same random numbers from two distributions are
    coupled ("Gumbel coupling": log p - log E is log p plus Gumbel noise). Their winners differ with
    probability 2 TV / (1 + TV) at most, where TV is the total variation distance of the distributions
    (Daliri, Musco and Suresh, arXiv 2408.07978). So a draft and its verification, which draw with the same
    random numbers from similar distributions, mostly take the same token. With one random number and the
    running sum of the probabilities they would not: what the first tokens gain moves all tokens behind them.

    V random numbers take 20 ns each on a CPU. Two races need 2 sqrt(V) of them: the tokens are laid out in a
    square, row by row; the columns race by their sums, then the tokens of the column that won. Tokens of
    neighbouring ids, which are often alike, are in different columns.

    Nothing waits for a device, and NaN gives some token (torch.multinomial ends the process on CUDA). A token
    of probability 0 is never drawn.
    """
    count, vocab_size = probs.shape
    width = math.isqrt(vocab_size - 1) + 1
    height = -(-vocab_size // width)
    noise = probs.new_empty(count, width + height, dtype=torch.float64)
    for row, seed in zip(noise, seeds, strict=True):
        row.exponential_(generator=generator.manual_seed(seed))
    noise.clamp_min_(torch.finfo(torch.float64).tiny)  # 0 / 0 would win
    if width * height > vocab_size:
        probs = torch.nn.functional.pad(probs, (0, width * height - vocab_size))
    square = probs.view(count, height, width)
    # In float64, so that the order of the terms, which depends on b, does not matter.
    column = (square.sum(dim=1, dtype=torch.float64) / noise[:, :width]).argmax(dim=-1)
    inside = square.gather(2, column[:, None, None].expand(-1, height, 1)).squeeze(2)
    return (inside / noise[:, width:]).argmax(dim=-1) * width + column
