"""Weights from the prompt: how much each member counts, by how well it reads what was there."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from deepen_ext.errors import InputError
from deepen_ext.ground.warning import warn
from deepen_ext.members.asking import common_prefix
from deepen_ext.members.backend import Session, require
from deepen_ext.members.distribution import Distribution, forbid
from deepen_ext.members.member import Member

_NEARLY_ALL = 0.9  # of the weights
LEAST_WEIGHT = 0.01  # of an assistant that has a say in a text; not tuned
_SHARED = 16  # tokens that two prompts begin with alike, from which on they are scored once
_ROWS = 16
_SHORT = 128  # tokens of short prompts that are read in one forward pass, with their logits
PROMPT_TOKENS = 256  # of a prompt's end, that count
_LAST = 8  # prompts that are remembered: several, because a longer one serves no shorter one


@dataclass(frozen=True)
class PromptScore:
    """How well a member reads the end of a prompt: each scored token's bytes and natural log probability.

    Attributes:
        sizes: in bytes.
        logprobs: natural logarithms.
        prompt: what was scored, for other prompts that begin alike; None where nobody will ask.
    """

    sizes: list[int]
    logprobs: list[float]
    prompt: ScoredPrompt | None = None

    @property
    def nbytes(self) -> int:
        """Bytes scored, counted from the prompt's end."""
        return sum(self.sizes)

    def nats(self, nbytes: int) -> float:
        """Negative log-likelihood of the last `nbytes` bytes; a token cut by their begin counts in part."""
        left, total = nbytes, 0.0
        for size, logprob in zip(reversed(self.sizes), reversed(self.logprobs), strict=True):
            if left <= 0:
                break
            total -= logprob * (min(size, left) / size if size else 1.0)
            left -= size
        return total


def prompt_weights(scores: Sequence[PromptScore], weights: Sequence[float], sharpness: float) -> list[float]:
    """Weights from how well each member reads the prompt, over the bytes that all of them have scored.

        w_i = lambda_i exp(-sharpness N_i) / sum,    N_i the member's nats on those bytes

    It is the posterior of "member i writes this prompt", tempered: with a sharpness of 1 a short prompt would
    already settle it, because neighbouring tokens are not independent evidence. A long prompt, such as one
    with worked examples, decides who counts; a question of one line hardly does. PackLLM (Mavromatis et al.,
    arXiv 2404.11531) has the idea; it weighs by perplexity a token, which depends on the vocabulary.

    An assistant below `LEAST_WEIGHT` has no say in the text: its weight is 0, and it is not asked. A weight
    of 0.0001 moved the distribution as far as 0.01 did: AdamW divides a gradient by its own size.

    Args:
        scores: of each member.
        weights: lambda_i, what the members start from.
        sharpness: for each nat; 0 for no difference by the prompt.
    """
    shared = min(one.nbytes for one in scores)
    nats = [one.nats(shared) for one in scores]
    best = min(nats)
    raised = list(weights)
    if shared and sharpness and not math.isinf(best):  # something to tell by, that somebody finds possible
        raised = [w * math.exp(-sharpness * (n - best)) for w, n in zip(weights, nats, strict=True)]
    total = math.fsum(raised)
    kept = [w if i == 0 or w >= LEAST_WEIGHT * total else 0.0 for i, w in enumerate(raised)]
    total = math.fsum(kept)
    return [one / total for one in kept]


def tell_of_unequal(
    names: Sequence[str], given: Sequence[float], weights: Sequence[float], told: set[tuple[str, str]]
) -> None:
    """Warn, once for each assistant, that members count so unequally that one of them writes the text.

    That is where an assistant counts for nearly all of it, and where one has no say in it.

    Args:
        names: the members', the main model's first.
        given: what the members start from.
        weights: of the text, what `prompt_weights` made of them.
        told: of whom was warned, and of what; written to.
    """
    leader = max(range(len(weights)), key=weights.__getitem__)
    found = {}
    if leader and weights[leader] >= _NEARLY_ALL:
        found["leads", names[leader]] = (
            f"{names[leader]} counts far more for a prompt than the main model, {names[0]}: the text follows "
            f"it, as far as tokens of {names[0]} go. Name {names[leader]} first, with fuser='follow' "
            "(--fuser follow), or let `deepen-ext tune` choose on texts of yours"
        )
    for name, before, after in zip(names[1:], given[1:], weights[1:], strict=True):
        if before and not after:
            found["has no say", name] = (
                f"{name} counts far less for a prompt than {names[leader]}: it has no say in the text. Leave "
                "it out, give weights=[...] if it should have one, or let `deepen-ext tune` choose on texts "
                "of yours"
            )
    for key, text in found.items():
        if key not in told:
            told.add(key)
            warn(text)


def last_prompts(score: PromptScore | None = None, most: int | None = _LAST) -> deque[ScoredPrompt]:
    """A memory for `read_prompts` of so many prompts, None for all: of nothing, or of one that was scored."""
    return deque([] if score is None or score.prompt is None else [score.prompt], maxlen=most)


def read_prompts(
    session: Session,
    member: Member,
    prompts: Mapping[int, Sequence[int]],
    last: deque[ScoredPrompt] | None = None,
) -> dict[int, PromptScore]:
    """Bring lanes to their prompts and score the last `PROMPT_TOKENS` tokens of each.

    Args:
        session: of the member, whose backend has full logits; its lanes then hold the prompts, and asking for
            them costs nothing.
        member: whose tokens they are.
        prompts: ids by lane, with what stands before the text.
        last: the member's last prompts (`last_prompts`). What a prompt has in common with one of them is not
            scored again. These prompts are added.

    Raises:
        InputError: see `Session.ask`; logits without a softmax.
        ModelError: the forward pass failed.
    """
    require(member.backend, "logits", "weights by the prompt")
    starts = {lane: max(len(ids) - 1 - PROMPT_TOKENS, 0) for lane, ids in prompts.items()}
    wanted = {
        lane: ScoredPrompt(list(prompts[lane]), starts[lane], member.unwritable(prompts[lane]), [])
        for lane in sorted(prompts, key=lambda lane: starts[lane])
    }
    last = last_prompts() if last is None else last
    unlike = [lane for lane, one in wanted.items() if one.best_of(last) is None]
    heads = {lane: prompts[lane][: starts[lane]] for lane in unlike if starts[lane]}
    if heads:  # together, and what they begin with alike only once
        session.ask(heads, 1).wait()
    waiting: dict[int, ScoredPrompt] = {}  # short ones, which are read together
    for lane, now in wanted.items():
        before = now.best_of(last)
        if before is not None:
            if any(before is one for one in waiting.values()):
                _read_waiting(session, waiting)
            now.take_over(before)
            if before.ids == now.ids:  # or a memory of all prompts would hold it once for each run
                last.remove(before)
        left = len(now.ids) - now.read_from
        if left <= _SHORT:
            if sum(len(one.ids) - one.read_from for one in (*waiting.values(), now)) > _SHORT:
                _read_waiting(session, waiting)
            waiting[lane] = now
        else:
            if before is not None:  # the lane takes another one's states, where the session can do that
                session.ask({lane: now.ids[: now.read_from + 1]}, 1).wait()
            for block in session.read(lane, now.ids, now.read_from, 1):
                now.score(block)
                del block  # or its logits (67 MB for 262,144 tokens) would stay beside those of the next
        last.append(now)
    _read_waiting(session, waiting)
    if any(math.isnan(logprob) for one in wanted.values() for logprob in one.logprobs):
        last.clear()  # or a prompt that begins alike would take it over
        raise InputError(f"logits of {member.name}: NaN, +inf or nothing but -inf at a token of the prompt")
    scores = {lane: one.result(member) for lane, one in wanted.items()}
    return {lane: scores[lane] for lane in prompts}


def _read_waiting(session: Session, waiting: dict[int, ScoredPrompt]) -> None:
    """Read these, in few forward passes; nobody waits afterwards."""
    if not waiting:
        return
    counts = {lane: len(one.ids) - one.read_from for lane, one in waiting.items()}
    said = session.ask({lane: one.ids for lane, one in waiting.items()}, 1, counts).wait()
    at = 0
    for lane, one in waiting.items():
        one.score(said.at(range(at, at + counts[lane])))
        at += counts[lane]
    waiting.clear()


@dataclass(eq=False)
class ScoredPrompt:
    """A prompt's ids, and the log-probabilities of those after `start`, as far as they are found."""

    ids: list[int]
    start: int
    unwritable: torch.Tensor  # but for the special tokens that the prompt has
    logprobs: list[float]

    @property
    def read_from(self) -> int:
        """The first position whose next token is to be scored."""
        return self.start + len(self.logprobs)

    def best_of(self, others: Sequence[ScoredPrompt]) -> ScoredPrompt | None:
        """The one of these that serves this prompt best, because it begins alike; None where none does."""
        best = max(others, key=self._saved_by, default=None)
        return best if best is not None and self._saved_by(best) else None

    def _saved_by(self, other: ScoredPrompt) -> int:
        """How many tokens of this prompt the other one has scored; 0 where they are too few to gain by."""
        saved = common_prefix(self.ids, other.ids) - self.start
        serves = other.start <= self.start and saved >= _SHARED
        return saved if serves and torch.equal(self.unwritable, other.unwritable) else 0

    def take_over(self, other: ScoredPrompt) -> None:
        """What another prompt that begins alike has found."""
        common = common_prefix(self.ids, other.ids)
        self.logprobs += other.logprobs[self.start - other.start : common - 1 - other.start]

    def result(self, member: Member) -> PromptScore:
        """What was found, when all of it was."""
        sizes = [len(member.vocabulary.bytes_of(token)) for token in self.ids[self.start + 1 :]]
        return PromptScore(sizes, self.logprobs, self)

    def score(self, block: Distribution) -> None:
        """Go on with the next distributions."""
        at = self.start + 1 + len(self.logprobs)
        following = self.ids[at : at + len(block)]
        known = block.scores()[: len(following)].float()
        picked = known.gather(1, torch.tensor(following, device=known.device)[:, None]).squeeze(1)
        # Some rows at a time: of a vocabulary of 262k, 128 rows and their exponentials would be 270 MB.
        rows = torch.split(known, _ROWS)
        totals = torch.cat([forbid(one, self.unwritable).logsumexp(-1) for one in rows])
        # NaN where there is no softmax, which `read_prompts` refuses; of +inf it would be -inf.
        self.logprobs += (picked - totals).where(totals.isfinite(), torch.nan).tolist()
