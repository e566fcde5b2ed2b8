"""A text as one member reads it under teacher forcing: its tokens, and what it says before each of them.

Nothing here depends on how members are fused: what is read once serves every ensemble of the same members.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from deepen_ext.decoding.prompt_weights import PromptScore, last_prompts, read_prompts
from deepen_ext.errors import InputError
from deepen_ext.measure.likelihood.reading_lanes import ReadingLanes
from deepen_ext.measure.likelihood.said_rows import SaidRows
from deepen_ext.members.member import Member

_TOGETHER = 128  # scored tokens of one forward pass: 134 MB of logits for a vocabulary of 262,144


class Reading:
    """Context and text, read by one member.

    Attributes:
        ids: of context and text together, after what the member's tokenizer puts before every text; where
            that is nothing and there is no context, after its BOS or else EOS id (lm-eval's convention). A
            text that begins with these ids gets no second ones.
        first: the first scored token's position in `ids`: scored are those beyond the context's own.
        context_ids: of the context alone, after the same. In `ids` its last tokens may be others: a token may
            reach from the context into the text.
        ends: where each scored token ends, in bytes of context and text.
        begin: where the first of them begins.
    """

    def __init__(self, member: Member, context: str, text: str) -> None:
        """Tokenise; the model runs when logits are first asked for.

        Raises:
            InputError: a lone surrogate, bytes that the tokenizer loses, more tokens than the member's
                context holds, or none to score.
        """
        vocabulary = member.vocabulary
        self.member = member
        whole, character_ends = vocabulary.encode_spans(context + text)
        self.data = (context + text).encode()
        own = vocabulary.encode(context)
        self.prefix = list(vocabulary.prefix_ids) or ([] if own else _first_id(member))
        self.ids = self.after_prefix(whole)
        self.context_ids = self.after_prefix(own)
        added = len(self.ids) - len(whole)
        self.first = max(added + len(own), len(self.prefix))
        # Special tokens that the text itself names can be written in it.
        self._unwritable = member.unwritable(self.ids)
        self.said = SaidRows(self._unwritable)
        if self.first >= len(self.ids):
            raise InputError(
                f"{member.name}: the text has no token of its own after this context, its characters go to "
                f"the {len(own)} tokens of the context; cut where a word begins"
            )
        if not member.fits(len(self.ids) - 1):
            raise InputError(
                f"{member.name}: context and text have {len(self.ids)} tokens, more than its context of "
                f"{member.context_length}; shorten the context, or score the text in shorter pieces"
            )
        ends = _byte_ends(member, context + text, whole, character_ends)
        before = self.first - added  # tokens of context and text that are not scored
        self.begin = ends[before - 1] if before else 0
        self.ends = ends[before:]
        self._lanes: ReadingLanes | None = None
        self._lane = 0  # the text's own
        self._context_of: Reading | None = None  # another reading of the same context, which scores it
        self._earlier: PromptScore | None = None  # of a context that this one may begin like
        self._score: PromptScore | None = None  # of the context, where it was asked for
        # Numbers in `said` after ids that the text does not begin with.
        self._elsewhere: dict[tuple[int, ...], int] = {}

    def after_prefix(self, ids: list[int]) -> list[int]:
        """The ids of a text's begin, after `prefix` unless they begin with it."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    @property
    def scored(self) -> list[int]:
        """The ids of the scored tokens; number i of `said` is what the member says before the i-th."""
        return self.ids[self.first :]

    def read(self) -> None:
        """Run the model over the text, once.

        Raises:
            ModelError: its forward pass failed.
        """
        if len(self.said):
            return
        try:
            # Without the last token: what follows it is not scored.
            session = self._opened().session
            for block in session.read(self._lane, self.ids[:-1], self.first - 1, self.most):
                self.said.add(block)
        except BaseException:
            self.close()
            raise

    def go_on_from(self, other: Reading) -> None:
        """Take another reading's cache over: what both begin with is not fed again. It keeps its logits."""
        owner = other if other._context_of is None else other._context_of
        self._earlier = owner._score
        if self._lanes is None:
            self._lanes, self._lane = other._lanes, other._lane
            other._lanes = None

    def join(self, lanes: ReadingLanes, lane: int) -> None:
        """Read the text in this lane from now on."""
        lanes.join()
        self.release()
        self._lanes, self._lane = lanes, lane

    @property
    def lanes(self) -> ReadingLanes | None:
        """The session that it holds, if any."""
        return self._lanes

    def release(self) -> None:
        """Free the cache and keep the logits; what was never asked for then takes the whole text again."""
        if self._lanes is not None:
            self._lanes.leave()
        self._lanes = None

    def close(self) -> None:
        """Free the cache and the logits."""
        self.release()
        self.said = SaidRows(self._unwritable)
        self._elsewhere.clear()

    def numbers_after(self, all_ids: Iterable[Sequence[int]]) -> list[int]:
        """Numbers in `said` after each of these ids; those that the text does not begin with are read now."""
        self.read()
        keys = [tuple(ids) for ids in all_ids]
        numbers = {}
        # The longest first: each then only rolls back what the one before has left.
        for ids in sorted(set(keys), key=len, reverse=True):
            if self.first <= len(ids) < len(self.ids) and list(ids) == self.ids[: len(ids)]:
                numbers[ids] = len(ids) - self.first
                continue
            if ids not in self._elsewhere:
                lanes = self._opened()
                said = lanes.session.ask({lanes.beside: list(ids)}, self.most).wait()
                # A copy: the session may write what it says next to the same place.
                self._elsewhere[ids] = self.said.add(said.clone())[0]
            numbers[ids] = self._elsewhere[ids]
        return [numbers[ids] for ids in keys]

    @property
    def prompt_score(self) -> PromptScore:
        """How well the member reads the context, as a prompt: for weights that come from it."""
        if self._context_of is not None:
            return self._context_of.prompt_score
        if self._score is None:
            lanes = self._opened()
            # Before the text is read its own lane is free for that, and keeps the context.
            _score_contexts(lanes, {lanes.beside if len(self.said) else self._lane: self})
            assert self._score is not None
        return self._score

    def _opened(self) -> ReadingLanes:
        """The session, opened when it is first needed."""
        if self._lanes is None:
            self.join(ReadingLanes(self.member, 1, len(self.ids) - 1), 0)
            assert self._lanes is not None
        return self._lanes

    @property
    def most(self) -> int:
        """How many tokens a backend without logits is asked for; of logits any top-k is taken later."""
        return self.member.backend.capabilities.max_topk or 1


def read_together(readings: Sequence[Reading], *, contexts: bool = False) -> None:
    """Let a member read several texts in few forward passes; what some begin with alike is read once.

    Args:
        readings: of one member. Those that have been read stay as they are. If one holds a session with
            enough lanes, from texts before these, all go on in that.
        contexts: somebody will ask for `prompt_score`: the context is read with its logits then, once.

    Raises:
        ModelError: a forward pass failed.
    """
    firsts: dict[tuple[int, ...], Reading] = {}
    for one in readings:
        first = firsts.setdefault(tuple(one.context_ids), one)
        if first is not one:
            one._context_of = first
    unread = [one for one in readings if not len(one.said)]
    for batch in _batches(unread):
        held = (one.lanes for one in unread if one.lanes is not None)
        lanes = next((one for one in held if one.texts >= len(batch)), None)
        if lanes is None:
            longest = max(len(one.ids) for one in batch)
            lanes = ReadingLanes(batch[0].member, len(batch), longest - 1)
        for lane, one in enumerate(batch):
            one.join(lanes, min(lane, lanes.texts - 1))
        if lanes.texts < len(batch) or len(batch) == 1:
            for one in batch:
                if contexts:
                    _ = one.prompt_score
                one.read()
            continue
        if contexts:
            _score_contexts(lanes, dict(enumerate(batch)))
        targets = {lane: one.ids[:-1] for lane, one in enumerate(batch)}
        counts = {lane: len(one.scored) for lane, one in enumerate(batch)}
        said = lanes.session.ask(targets, batch[0].most, counts).wait().clone()
        at = 0
        for one in batch:
            one.said.add(said.at(range(at, at + len(one.scored))))
            at += len(one.scored)


def _score_contexts(lanes: ReadingLanes, readings: Mapping[int, Reading]) -> None:
    """Score the contexts that nobody has scored, each in its lane, which holds it then."""
    wanted = {}
    for lane, one in readings.items():
        if one._context_of is None and one._score is None:
            if one.context_ids == one.prefix:
                one._score = PromptScore([], [])
            else:
                wanted[lane] = one.context_ids
    if wanted:
        first = readings[next(iter(wanted))]
        scores = read_prompts(lanes.session, first.member, wanted, last_prompts(first._earlier))
        for lane, score in scores.items():
            readings[lane]._score = score


def _batches(readings: Sequence[Reading]) -> Iterator[list[Reading]]:
    """The readings in their order, together where their scored tokens are few."""
    batch: list[Reading] = []
    for one in readings:
        if batch and sum(len(each.scored) for each in (*batch, one)) > _TOGETHER:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _first_id(member: Member) -> list[int]:
    """What a text begins after where the tokenizer puts nothing before it: as lm-eval's `prefix_token_id`."""
    tokenizer = member.tokenizer
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id, *member.eos_ids):
        if isinstance(found, int):
            return [found]
    raise InputError(
        f"{member.name}: has neither a BOS nor an EOS token that a first token could follow; give a context"
    )


def _byte_ends(member: Member, text: str, ids: list[int], character_ends: list[int]) -> list[int]:
    """Where each token ends in the text, in bytes.

    Raises:
        InputError: the tokens' bytes are not the text's.
    """
    vocabulary, data = member.vocabulary, text.encode()
    ends = []
    end = 0
    for i, (token, character_end) in enumerate(zip(ids, character_ends, strict=True)):
        piece = vocabulary.decode([token], continues=i > 0)  # the first is without the dummy space
        if vocabulary.tokens[token] is None:  # a special token that the text names
            piece = text[:character_end].encode()[end:]
        if data[end : end + len(piece)] != piece:
            break
        end += len(piece)
        ends.append(end)
    if end != len(data):
        raise InputError(
            f"{member.name}: its tokenizer loses byte {end} (0x{data[end]:02x}) of context and text, so it "
            "cannot score the text; take such characters out"
        )
    return ends
