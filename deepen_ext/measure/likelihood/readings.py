"""A text as one member reads it under teacher forcing: its tokens, and the logits before each of them.

Nothing here depends on how members are fused: what is read once serves every ensemble of the same members.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch

from deepen_ext.decoding.assistants import forward
from deepen_ext.decoding.boundary import CANDIDATES, BoundaryRule, candidates_of
from deepen_ext.errors import InputError, ModelError, failures_of
from deepen_ext.fusers.weights import PromptScore, read_prompts
from deepen_ext.members.hf.session import BatchSession
from deepen_ext.members.member import Member, forbid
from deepen_ext.ops.topk_softmax import TopK, check_status, launch
from deepen_ext.text.characters import Utf8Stream
from deepen_ext.text.growing_text import GrowingText


class LogitRows:
    """Rows of a member's logits, kept as the blocks [n, V] they came in, and their most probable tokens.

    As a main model's, `written`, they have -inf for what cannot be written.
    """

    def __init__(self, name: str, unwritable: torch.Tensor) -> None:
        self._name = name
        self._unwritable = unwritable
        self._blocks: list[torch.Tensor] = []
        self._begins: list[int] = []
        self._top: dict[
            tuple[int, torch.device, bool], tuple[int, TopK]
        ] = {}  # with the blocks that are in it
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, block: torch.Tensor) -> range:
        """Keep these rows; returns their numbers."""
        self._blocks.append(block)
        self._begins.append(self._rows)
        self._rows += len(block)
        return range(self._rows - len(block), self._rows)

    def take(self, rows: Sequence[int], *, written: bool = False) -> torch.Tensor:
        """The logits [n, V] of these rows: read only, a view where they follow one another in a block."""
        found = []
        for number, group in groupby(rows, key=lambda row: bisect_right(self._begins, row) - 1):
            block, local = self._blocks[number], [row - self._begins[number] for row in group]
            if local == list(range(local[0], local[0] + len(local))):
                found.append(block[local[0] : local[0] + len(local)])
            else:
                found.append(block.index_select(0, torch.tensor(local).to(block.device)))
        taken = found[0] if len(found) == 1 else torch.cat(found)
        return forbid(taken, self._unwritable) if written else taken

    def top(self, rows: Sequence[int], k: int, device: torch.device, *, written: bool = False) -> TopK:
        """The k most probable tokens of these rows, on a device; each row is looked at once for every k."""
        done, found = self._top.get((k, device, written), (0, None))
        if done < len(self._blocks):
            blocks = [
                launch(forbid(block, self._unwritable) if written else block, min(k, block.shape[1]))
                for block in self._blocks[done:]
            ]
            for begin, block in zip(self._begins[done:], blocks, strict=True):
                status = block.status.tolist()
                check_status(f"logits of {self._name}", status, range(begin, begin + len(status)))
            moved = [TopK(*(one.to(device) for one in block)) for block in blocks]
            parts = moved if found is None else [found, *moved]
            found = TopK(*(torch.cat(same) for same in zip(*parts, strict=True)))
            self._top[k, device, written] = len(self._blocks), found
        assert found is not None
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return TopK(*(one[rows[0] : rows[0] + len(rows)] for one in found))
        chosen = torch.tensor(rows).to(device)
        return TopK(*(one[chosen] for one in found))


class Reading:
    """Context and text, read by one member.

    Attributes:
        ids: of context and text together, after what the member's tokenizer puts before every text; where
            that is nothing and there is no context, after its BOS or else EOS id (lm-eval's convention). A
            text that begins with these ids gets no second ones.
        first: the first scored token's place in `ids`: scored are those beyond the context's own.
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
        added = len(self.ids) - len(whole)
        self.first = max(added + len(own), len(self.prefix))
        # Special tokens that the text itself names can be written in it.
        self._unwritable = member.unwritable(self.ids)
        self.logits = LogitRows(member.name, self._unwritable)
        if self.first >= len(self.ids):
            raise InputError(
                f"{member.name}: the text has no token of its own after this context, its characters go to "
                f"the {len(own)} tokens of the context; cut where a word begins"
            )
        if member.context_length is not None and len(self.ids) - 1 > member.context_length:
            raise InputError(
                f"{member.name}: context and text have {len(self.ids)} tokens, more than its context of "
                f"{member.context_length}; shorten the context, or score the text in shorter pieces"
            )
        ends = _byte_ends(member, context + text, whole, character_ends)
        before = self.first - added  # tokens of context and text that are not scored
        self.begin = ends[before - 1] if before else 0
        self.ends = ends[before:]
        self._session: BatchSession | None = None
        self._score: PromptScore | None = None
        self._elsewhere: dict[tuple[int, ...], int] = {}  # rows after ids that the text does not begin with

    def after_prefix(self, ids: list[int]) -> list[int]:
        """The ids of a text's begin, after `prefix` unless they begin with it."""
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    @property
    def scored(self) -> list[int]:
        """The ids of the scored tokens; row i of `logits` is what the member says before the i-th."""
        return self.ids[self.first :]

    def read(self) -> None:
        """Run the model over the text, once.

        Raises:
            ModelError: its forward pass failed.
        """
        if len(self.logits):
            return
        session = self._session or _session(self.member, len(self.ids) - 1)
        try:
            with failures_of(self.member.name):
                # Without the last token: what follows it is not scored.
                for block in session.read(0, self.ids[:-1], self.first - 1):
                    self.logits.add(block)
        except BaseException:
            session.close()
            self._session = None
            self.logits = LogitRows(self.member.name, self._unwritable)
            raise
        self._session = session

    def go_on_from(self, other: Reading) -> None:
        """Take another reading's cache over: what both begin with is not fed again. It keeps its logits."""
        if self._session is None:
            self._session, other._session = other._session, None

    def release(self) -> None:
        """Free the cache and keep the logits; what was never asked for then takes the whole text again."""
        if self._session is not None:
            self._session.close()
        self._session = None

    def close(self) -> None:
        """Free the cache and the logits."""
        self.release()
        self.logits = LogitRows(self.member.name, self._unwritable)
        self._elsewhere.clear()

    def rows_after(self, all_ids: Iterable[Sequence[int]]) -> list[int]:
        """Rows of `logits` after each of these ids; those that the text does not begin with are read now."""
        self.read()
        keys = [tuple(ids) for ids in all_ids]
        missing = {ids for ids in keys if self._row_in_text(ids) is None} - self._elsewhere.keys()
        # The longest first: each then only rolls back what the one before has left.
        for ids in sorted(missing, key=len, reverse=True):
            session, row = self._beside()
            block = forward(session, {row: list(ids)}, self.member.name)
            self._elsewhere[ids] = self.logits.add(block)[0]
        rows = [self._row_in_text(ids) for ids in keys]
        return [self._elsewhere[ids] if row is None else row for ids, row in zip(keys, rows, strict=True)]

    def prompt_score(self) -> PromptScore:
        """How well the member reads the context, as a prompt: for weights that come from it."""
        if self._score is None:
            context = self.ids[: self.first]
            if context == self.prefix:
                self._score = PromptScore([], [])
            else:
                self.read()
                session, row = self._beside()
                self._score = read_prompts(session, self.member, {row: context})[row]
        return self._score

    def _beside(self) -> tuple[BatchSession, int]:
        """The session, and a row of it for something else than the text; where there is one, another row."""
        if self._session is None:
            self._session = _session(self.member, len(self.ids) - 1)
        return self._session, self._session.rows - 1

    def _row_in_text(self, ids: tuple[int, ...]) -> int | None:
        here = self.first <= len(ids) < len(self.ids) and ids == tuple(self.ids[: len(ids)])
        return len(ids) - self.first if here else None


class Accompaniment:
    """What an assistant has to say at each scored token of the main model, by the rules of the loop."""

    def __init__(self, main: Reading, assistant: Reading) -> None:
        self._main = main
        self._assistant = assistant
        self._found: dict[tuple[BoundaryRule | None, int], list[tuple[int, int]]] = {}

    def speaks(self, rule: BoundaryRule | None, candidates: int) -> list[tuple[int, int]]:
        """(scored token of the main model, row of the assistant's logits) wherever the assistant speaks.

        Args:
            rule: the ensemble's.
            candidates: k of the ensemble's fuser: the rule looks at no more.
        """
        key = rule, min(candidates, CANDIDATES) if rule is not None else 0
        if key not in self._found:
            takes_part = self._takes_part(rule, candidates)
            rows = self._assistant.rows_after(ids for _, ids in takes_part)
            self._found[key] = [(place, row) for (place, _), row in zip(takes_part, rows, strict=True)]
        return self._found[key]

    def _takes_part(self, rule: BoundaryRule | None, candidates: int) -> list[tuple[int, list[int]]]:
        """The places, and what the assistant has read there: as in `Assistants.step`."""
        main, assistant = self._main, self._assistant
        main.read()
        places = range(len(main.ends))
        known = {}
        if rule is not None:
            top = main.logits.top(places, candidates, main.member.device, written=True)
            known = candidates_of(top, places)
        characters = Utf8Stream()
        text = GrowingText(
            assistant.member.vocabulary, characters.feed(main.data[: main.begin]), prefix=False
        )
        found = []
        begin = main.begin
        for place, end in enumerate(main.ends):
            if not characters.pending and (rule is None or not rule.sits_out(text, known[place])):
                found.append((place, list(assistant.after_prefix(text.ids))))
            text.append(characters.feed(main.data[begin:end]))
            begin = end
        return found


def _session(member: Member, tokens: int) -> BatchSession:
    """With a row for the text, and one for other endings of its beginning."""
    try:
        return BatchSession(member, 2, capacity=tokens)
    except ModelError:  # a model that cannot run two rows in one forward: one row serves both, with more work
        return BatchSession(member, capacity=tokens)


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
