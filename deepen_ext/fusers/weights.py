"""How much each member counts: by given weights, by how well it reads the prompt, by how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from deepen_ext.decoding.shared_forwards import Session
from deepen_ext.errors import InputError, failures_of
from deepen_ext.ground.numbers import real_number
from deepen_ext.members.member import Member, forbid
from deepen_ext.ops.topk_softmax import TopK


def check_weights(weights: Sequence[float], members: int) -> list[float]:
    """The weights as floats.

    Raises:
        InputError: not one for each member, negative, not finite, or not summing to 1.
    """
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise InputError(f"weights is {weights!r}; give a list of numbers, one for each member")
    weights = [real_number("weight", weight, "0 to 1", lambda _: True) for weight in weights]
    if len(weights) != members:
        raise InputError(f"there are {len(weights)} weights for {members} members; give one for each")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise InputError(f"weights are {weights}; none may be negative, infinite or NaN")
    if abs(sum(weights) - 1) > 1e-4:
        raise InputError(f"weights sum to {sum(weights):.6g}; they must sum to 1")
    return weights


SHARPNESS = 8.0  # of weights from the prompt, for each nat a byte; chosen on dev texts, see docs/results.md
PROMPT_TOKENS = 256  # of a prompt's end, that count


@dataclass(frozen=True)
class PromptScore:
    """How well a member reads the end of a prompt: each scored token's bytes and natural log probability."""

    sizes: list[int]
    logprobs: list[float]

    @property
    def nbytes(self) -> int:
        """Bytes scored, counted from the prompt's end."""
        return sum(self.sizes)

    def nats_per_byte(self, nbytes: int) -> float:
        """Negative log-likelihood of the last `nbytes` bytes; a token cut by their begin counts in part."""
        left, total = nbytes, 0.0
        for size, logprob in zip(reversed(self.sizes), reversed(self.logprobs), strict=True):
            if left <= 0:
                break
            total -= logprob * (min(size, left) / size if size else 1.0)
            left -= size
        return total / nbytes


def prompt_weights(
    scores: Sequence[PromptScore], weights: Sequence[float], sharpness: float = SHARPNESS
) -> list[float]:
    """Weights from how well each member reads the prompt, over the bytes that all of them have scored.

        w_i = lambda_i exp(-sharpness n_i) / sum,    n_i the member's nats a byte

    PackLLM (Mavromatis et al., arXiv 2404.11531) has the idea; it weighs by perplexity a token, which
    depends on the vocabulary. A prompt too short to tell leaves the weights as they are.

    Args:
        scores: of each member.
        weights: lambda_i, what the members start from.
        sharpness: 0 leaves the weights as they are.
    """
    shared = min(one.nbytes for one in scores)
    if shared == 0:
        return list(weights)
    nats = [one.nats_per_byte(shared) for one in scores]
    best = min(nats)
    raised = [w * math.exp(-sharpness * (n - best)) for w, n in zip(weights, nats, strict=True)]
    total = math.fsum(raised)
    return [one / total for one in raised]


def read_prompts(
    session: Session, member: Member, prompts: Mapping[int, Sequence[int]]
) -> dict[int, PromptScore]:
    """Bring rows to their prompts and score the last `PROMPT_TOKENS` tokens of each.

    Args:
        session: of the member; its rows then hold the prompts, and `sync` costs nothing.
        member: whose tokens they are.
        prompts: ids, with what stands before the text.

    Raises:
        InputError: see `BatchSession.sync`.
        ModelError: the forward pass failed.
    """
    starts = {row: max(len(ids) - 1 - PROMPT_TOKENS, 0) for row, ids in prompts.items()}
    heads = {row: prompts[row][:start] for row, start in starts.items() if start}
    scores = {}
    with failures_of(member.name):
        if heads:  # together, and what they begin with alike only once
            session.sync(heads)
        for row, ids in prompts.items():
            start, logprobs = starts[row], []
            unwritable = member.unwritable(ids)  # but for the special tokens that the prompt has
            for block in session.read(row, ids, start):
                following = torch.tensor(ids[start + 1 : start + 1 + len(block)])
                known = block[: len(following)].float()
                picked = known.gather(1, following.to(known.device)[:, None]).squeeze(1)
                known = forbid(known, unwritable)
                logprobs += (picked - known.logsumexp(-1)).tolist()
                start += len(block)
            sizes = [len(member.vocabulary.bytes_of(token)) for token in ids[starts[row] + 1 :]]
            scores[row] = PromptScore(sizes, logprobs)
    return scores


def confident_weights(weights: torch.Tensor, tops: Sequence[TopK], confidence: float) -> torch.Tensor:
    """Weights of one step, by how sure each member is of its next token.

        w_i = lambda_i exp(-confidence H_i) / sum,    H_i = -sum_t p_i[t] log p_i[t]

    The tail of a top-k counts as k more tokens of one probability: whatever the vocabulary's size, a member
    that knows nothing has about the same entropy.

    Args:
        weights: lambda, float32 [b, n]; a weight of 0 stays 0.
        tops: of each member its k_i most probable tokens, of b rows.
        confidence: for each nat of entropy.

    Returns:
        float32 [b, n], rows summing to 1.
    """
    entropies = torch.stack([_entropy(one) for one in tops], dim=1)
    # A silent member's is no measure for the others: next to its 0 all their weights could underflow.
    entropies = entropies.masked_fill(weights == 0, torch.inf)
    raised = weights * torch.exp(-confidence * (entropies - entropies.amin(dim=1, keepdim=True)))
    return raised / raised.sum(dim=1, keepdim=True)


def _entropy(top: TopK) -> torch.Tensor:
    """In nats, float32 [b]."""
    tail = top.tail.clamp(min=0)
    in_tail = torch.special.entr(tail) + tail * math.log(top.probs.shape[1])
    entropy: torch.Tensor = torch.special.entr(top.probs).sum(dim=-1) + in_tail
    return entropy
