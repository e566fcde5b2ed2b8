"""How probable a text is to an ensemble, and to each of its members alone, token by token.

Under teacher forcing: the text is given, and at each of its tokens the distribution that the loop would have
sampled from is asked for the token that really comes. Members' vocabularies differ, so nats a token cannot be
compared between them; bits a byte can.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from operator import eq

import torch

from deepen_ext.decoding.boundary import CANDIDATES, BoundaryRule, share_left
from deepen_ext.decoding.prompt_weights import prompt_weights
from deepen_ext.decoding.shares import handed_over
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.fusers import Part
from deepen_ext.fusers.weights import check_weights
from deepen_ext.ground.closing import Closing
from deepen_ext.measure.likelihood.accompaniment import Speech, where_it_speaks
from deepen_ext.measure.likelihood.readings import Reading, read_together
from deepen_ext.measure.likelihood.text_pieces import pieces
from deepen_ext.measure.likelihood.token_likelihoods import TokenLikelihoods
from deepen_ext.members.backend import require
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.member import Member
from deepen_ext.ops.token_logprobs import token_logprobs
from deepen_ext.ops.transfer import to_device

__all__ = ["TextReading", "TokenLikelihoods", "pieces"]

# Logits of one fusion step: with more than the allocator keeps at hand (32 MB), each step waits for fresh
# pages, which takes ten times as long as the copy itself.
_STEP_BYTES = 16 << 20
_USE = "the likelihood of a text"
# What several ensembles read of the members' logits, by reading, numbers in `said` and `written`.
_Kept = dict[tuple[Reading, tuple[int, ...], bool], Distribution]
_KEPT_BYTES = 256 << 20


class TextReading(Closing):
    """One text, read once by some members; any number of ensembles of them are measured on it.

    A member reads `context` and `text` together, in its own tokens. Scored are the tokens beyond those that
    the context alone has (lm-evaluation-harness's convention, `_encode_pair`): whitespace at the end of the
    context belongs to the text. Without a context the first token follows what the tokenizer puts before
    every text, or else the BOS or EOS token (its `prefix_token_id`).

    As in the loop, only what can be written has a probability: tokens with text, EOS, and the special tokens
    that the text names (see `Member.unwritable`).

    An assistant takes part at a token as it does in the loop: it has read the text so far, in the tokens that
    this has by itself; it waits for unfinished characters, and heeds the ensemble's boundary rule.

    Models run when they are first needed. What was read is kept: 4 bytes for each token of the text and each
    of the member's vocabulary, until `close`, the end of a `with` block, or of the object.

    Attributes:
        context: without the whitespace at its end.
        text: what is scored, with that whitespace before it.
    """

    def __init__(self, members: Sequence[Member], context: str, text: str) -> None:
        """Tokenise for all members, so that what cannot be read is refused before anything is computed.

        Raises:
            InputError: an empty text, a lone surrogate, bytes that some tokenizer loses, a text that has no
                token of its own after the context, or more tokens than a member's context holds.
        """
        if not text:
            raise InputError("the text is empty; give some text to score")
        self.context = context.rstrip()
        self.text = context[len(self.context) :] + text
        self._readings = {id(member): Reading(member, self.context, self.text) for member in members}
        self._begin = len(self.context.encode())
        self._alone: dict[int, TokenLikelihoods] = {}
        # By main model, assistant, rule, how many candidates it looks at, and whether the assistant leads.
        self._speaks: dict[tuple[Reading, Reading, BoundaryRule | None, int, bool], list[Speech]] = {}

    @staticmethod
    def read_together(readings: Sequence[TextReading], *, contexts: bool = False) -> None:
        """Let each member read several texts in few forward passes, such as the choices of one context.

        What the texts begin with is read once. Without it, each text is read by itself when it is needed.

        Args:
            readings: of the same members. With `readings[0].go_on_from(before)`, what an earlier text has
                in its caches is not read again either; `before` can be closed then.
            contexts: some ensemble weighs prompts: what that needs of the context is read at the same time.

        Raises:
            ModelError: a forward pass failed.
        """
        for member in readings[0]._readings:
            read_together([one._readings[member] for one in readings], contexts=contexts)

    def release(self) -> None:
        """Free the caches, keep the logits.

        What was measured once can be measured again, with other fusers too; with other weights after
        `read_ahead`. What takes logits that nobody has asked for yet reads the text again.
        """
        for reading in self._readings.values():
            reading.release()

    def read_ahead(self, ensemble: Ensemble) -> None:
        """Read what these members may be asked for by any weights.

        An assistant that counts more than the main model speaks where another one sits out.

        Raises:
            InputError: a member that the reading does not have; a member that gives NaN.
            ModelError: a forward pass failed.
        """
        main, *assistants = [self._reading(member) for member in ensemble.members]
        for reading in assistants:
            for leads in (False, True):
                self._speech(ensemble, main, reading, leads)

    def go_on_from(self, other: TextReading) -> None:
        """Take over what another reading of the same members holds in its caches.

        What both begin with, such as the context of several answers, is then not read again. The other keeps
        what it has computed.
        """
        for member, reading in self._readings.items():
            if member in other._readings:
                reading.go_on_from(other._readings[member])

    def close(self) -> None:
        """Free caches and logits."""
        for reading in self._readings.values():
            reading.close()
        self._speaks.clear()

    def member(self, member: Member) -> TokenLikelihoods:
        """The member alone, in its own tokens.

        Raises:
            InputError: not one of the reading's members; a member that gives NaN.
            ModelError: its forward pass failed.
        """
        if id(member) not in self._alone:
            require(member.backend, "logits", _USE)
            reading = self._reading(member)
            reading.read()
            found = _Found(reading.scored)
            for tokens in _blocks(len(reading.scored), member):
                logits = reading.said.take(tokens, written=True).scores()
                found.add(*token_logprobs(logits, found.next(logits), name=member.name))
            self._alone[id(member)] = self._likelihoods(reading, found)
        return self._alone[id(member)]

    def logits(self, member: Member) -> Iterator[torch.Tensor]:
        """What the member says before each scored token, in blocks [n, V] of its dtype, to be read only.

        Raises:
            InputError: not one of the reading's members.
            ModelError: its forward pass failed.
        """
        require(member.backend, "logits", _USE)
        reading = self._reading(member)
        reading.read()
        for tokens in _blocks(len(reading.scored), member):
            yield reading.said.take(tokens).scores()

    def fused(
        self, ensemble: Ensemble, weights: Sequence[float] | None = None, *, greedy: bool = True
    ) -> TokenLikelihoods:
        """The ensemble's distribution, in the tokens of its main model.

        Args:
            ensemble: of members of this reading, the same objects.
            weights: one for each member, summing to 1; None for the ensemble's own. Those that an ensemble
                finds from the prompt are found from the context.
            greedy: look for each token's rivals too. That takes the fused logits of the whole vocabulary;
                False: each fuser computes the given tokens alone, and `TokenLikelihoods.greedy` is empty.

        Raises:
            InputError: a member that the reading does not have; a member that gives NaN; see `check_weights`.
            ModelError: a forward pass failed.
        """
        return self.fused_each([(ensemble, weights)], greedy=greedy)[0]

    def fused_each(
        self, ensembles: Sequence[tuple[Ensemble, Sequence[float] | None]], *, greedy: bool = True
    ) -> list[TokenLikelihoods]:
        """`fused` of several ensembles with their weights; what they have in common is looked up once."""
        kept: _Kept = {}
        return [self._fused(one, weights, kept, greedy=greedy) for one, weights in ensembles]

    def steps(
        self, ensemble: Ensemble, weights: Sequence[float]
    ) -> Iterator[tuple[list[Part], Sequence[Sequence[float]], torch.Tensor]]:
        """What the members say of the scored tokens, in their order: the parts of one fusion step each.

        With each step come the weights of each of its B rows, and its tokens int64 [B], of the main model and
        on its device. Errors are those of `fused`.
        """
        main, *assistants = [self._reading(member) for member in ensemble.members]
        require(main.member.backend, "logits", _USE)
        main.read()
        at = 0
        for parts, by_row in self._steps(ensemble, main, assistants, weights, {}):
            count = len(parts[0].rows)
            yield parts, by_row, to_device(main.scored[at : at + count], ensemble.device)
            at += count

    def _fused(
        self, ensemble: Ensemble, weights: Sequence[float] | None, kept: _Kept, *, greedy: bool
    ) -> TokenLikelihoods:
        members = ensemble.members
        main, *assistants = [self._reading(member) for member in members]
        shares = ensemble.weights if weights is None else check_weights(weights, len(members))
        if weights is None and ensemble.weighs_prompts:
            shares = prompt_weights(
                [one.prompt_score for one in (main, *assistants)], shares, ensemble.team.sharpness
            )
        require(main.member.backend, "logits", _USE)
        main.read()
        name, fuser = f"{ensemble.method} of {main.member.name}", ensemble.fuser
        found = _Found(main.scored)
        for parts, by_row in self._steps(ensemble, main, assistants, shares, kept):
            if greedy:
                step = fuser.step_parts(parts, by_row)
                logprobs, _ = token_logprobs(step.logits, found.next(step.logits), name=name)
                found.add(logprobs, step.chosen)
            else:
                found.add(fuser.likelihoods(parts, by_row, found.next(parts[0].topk.ids)))
        return self._likelihoods(main, found)

    def _steps(
        self,
        ensemble: Ensemble,
        main: Reading,
        assistants: Sequence[Reading],
        weights: Sequence[float],
        kept: _Kept,
    ) -> Iterator[tuple[list[Part], Sequence[Sequence[float]]]]:
        """What the members say of the scored tokens: parts of one fusion step each, and its rows' weights."""
        speaks = []
        for reading, weight in zip(assistants, weights[1:], strict=True):
            said = self._speech(ensemble, main, reading, weight > weights[0])
            speaks.append([one for one in said if share_left(weight, one.share)])
        for tokens in _blocks(len(main.scored), *ensemble.members):
            parts = [self._part(ensemble, 0, main, range(len(tokens)), tokens, kept)]
            shares = [dict.fromkeys(range(1, len(weights)), 0.0) for _ in tokens]
            for i, (reading, said) in enumerate(zip(assistants, speaks, strict=True), start=1):
                first, last = (bisect_left(said, (token,)) for token in (tokens.start, tokens.stop))
                if here := said[first:last]:
                    rows = [one.token - tokens.start for one in here]
                    parts.append(self._part(ensemble, i, reading, rows, [one.said for one in here], kept))
                    for row, one in zip(rows, here, strict=True):
                        shares[row][i] = one.share
            yield parts, [handed_over(weights, own) for own in shares]

    def _speech(self, ensemble: Ensemble, main: Reading, assistant: Reading, leads: bool) -> list[Speech]:
        """See `where_it_speaks`; without a rule an assistant speaks wherever it can."""
        rule, candidates = ensemble.boundary_rule, ensemble.fuser.candidates
        looks_at = 0 if rule is None else min(candidates, CANDIDATES)
        key = main, assistant, rule, looks_at, leads and rule is not None
        if key not in self._speaks:
            self._speaks[key] = where_it_speaks(main, assistant, rule, candidates, leads)
        return self._speaks[key]

    def _part(
        self,
        ensemble: Ensemble,
        i: int,
        reading: Reading,
        rows: Sequence[int],
        numbers: Sequence[int],
        kept: _Kept,
    ) -> Part:
        """What member i says for these batch rows of a step: these numbers of what it said."""
        written = i == 0
        top = reading.said.top(numbers, ensemble.fuser.candidates, ensemble.device, written=written)
        key = reading, tuple(numbers), written
        if key not in kept:
            if sum(one.nbytes for one in kept.values()) > _KEPT_BYTES:
                kept.clear()
            kept[key] = reading.said.take(numbers, written=written)
        return Part(i, f"logits of {ensemble.names[i]}", top, rows, kept[key])

    def _reading(self, member: Member) -> Reading:
        try:
            return self._readings[id(member)]
        except KeyError:
            raise InputError(
                f"{member.name} is not a member of this reading; make the reading with the Member objects of "
                "all ensembles"
            ) from None

    def _likelihoods(self, reading: Reading, found: _Found) -> TokenLikelihoods:
        ends = [max(end - self._begin, 0) for end in reading.ends]
        return TokenLikelihoods(found.logprobs, ends, found.greedy, len(self.text.encode()))


class _Found:
    """The scored tokens' likelihoods, as far as they are found."""

    def __init__(self, scored: Sequence[int]) -> None:
        self._scored = scored
        self.logprobs: list[float] = []
        self.greedy: list[bool] = []

    def next(self, rows: torch.Tensor) -> torch.Tensor:
        """The next tokens int64 [n], one for each row of a tensor [n, ...] and on its device."""
        at = len(self.logprobs)
        return to_device(self._scored[at : at + len(rows)], rows.device)

    def add(self, logprobs: torch.Tensor, best: torch.Tensor | None = None) -> None:
        """Take in the next tokens' log-probabilities [n], and the most probable tokens [n]."""
        at = len(self.logprobs)
        self.logprobs += logprobs.tolist()
        if best is not None:
            self.greedy += map(eq, self._scored[at:], best.tolist())


def _blocks(count: int, *members: Member) -> Iterator[range]:
    """Numbers 0 to `count` - 1 in blocks whose logits are not too large for any of the members."""
    largest = max(member.vocab_size for member in members)
    step = max(_STEP_BYTES // (4 * largest), 1)
    for begin in range(0, count, step):
        yield range(begin, min(begin + step, count))
