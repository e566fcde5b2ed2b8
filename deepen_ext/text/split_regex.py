"""What a tokenizer's splitting regex can see: an automaton that over-estimates its matches.

A splitter goes through a text from left to right. At each position it tries to match; where a match ends, the
next attempt begins. Two questions about neighbouring characters, c before a position s of the text and d
after it, are answered here for any text around them:

- `transparent(c, d)`: no match that begins before s goes on beyond s or looks beyond it. Then what is left of
  s is split as if the text ended there. The regex looks at nothing left of a match, so what is right of s is
  split as if the text began there.
- `alone(c)`: at a position before c there is always a match, whatever follows, because c by itself is one.

The automaton is Thompson's, without priorities and counts (`\\p{N}{1,3}` is taken as `\\p{N}+`). It has every
thread that the backtracking engine could have, and more; a thread too many only makes a position go unused.
Whether a character belongs to a class is asked of the engine itself, so the version of Unicode is the
engine's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from tokenizers import Regex, normalizers

from deepen_ext.text.regex_syntax import (
    Alternation,
    Atom,
    Atomic,
    Concatenation,
    Node,
    NotUnderstood,
    Repetition,
    atoms_of,
    can_be_empty,
    can_be_left_out,
    gives_back,
    parse,
)

_KEPT = 1 << 14  # characters whose answers are kept
_T = TypeVar("_T")


class SplitRegex:
    """A splitting regex; see the module's text."""

    def __init__(self, pattern: str) -> None:
        """Parse it.

        Raises:
            NotUnderstood: the regex looks left (look-behind, `\\b`, `^`), refers back, or matches the empty
                text.
        """
        self._root, self._atoms = parse(pattern)
        if can_be_empty(self._root):
            raise NotUnderstood("it matches the empty text")
        self._classes = [
            normalizers.Replace(Regex(f"(?i:{atom.pattern})" if atom.fold else atom.pattern), "")
            for atom in self._atoms
        ]
        self._automaton = _Automaton(self._root, len(self._atoms))
        self._matching: dict[str, int] = {}
        self._after: dict[str, int] = {}
        self._alone: dict[str, bool] = {}

    def transparent(self, left: str, right: str) -> bool:
        """Whether no match that begins before the position between the two reaches or looks beyond it."""
        after = self._after.get(left)
        if after is None:
            after = self._read(left)
            _room(self._after)[left] = after
        return after >= 0 and not after & self.matching(right)

    def alone(self, character: str) -> bool:
        """Whether the character by itself is a match for certain, whatever follows it."""
        found = self._alone.get(character)
        if found is None:
            found = self._is_alone(self._root, character)
            _room(self._alone)[character] = found
        return found

    def begins(self, character: str) -> bool:
        """Whether a match may begin with this character."""
        return bool(self._automaton.first & self.matching(character))

    def matching(self, character: str) -> int:
        """The atoms that may match this character, one bit each."""
        found = self._matching.get(character)
        if found is None:
            found = sum(1 << atom.number for atom in self._atoms if self._may_match(atom, character))
            _room(self._matching)[character] = found
        return found

    def _read(self, left: str) -> int:
        """The atoms that may match after this character was read, one bit each; -1 where a thread looks."""
        matching, after = self.matching(left), 0
        for atom in self._atoms:
            if matching >> atom.number & 1:
                if self._automaton.looks[atom.number]:
                    return -1
                after |= self._automaton.following[atom.number]
        return after

    def _may_match(self, atom: Atom, character: str) -> bool:
        # Case folds some characters into two or three (the ligature of s and t), of which each may match.
        if atom.fold and not character.isascii():
            return any(part.isascii() for part in character.casefold())
        return str(self._classes[atom.number].normalize_str(character)) == ""

    def _is_alone(self, node: Node, character: str) -> bool:
        if isinstance(node, Atom):
            return (character.isascii() or not node.fold) and self._may_match(node, character)
        if isinstance(node, Alternation):
            return any(self._is_alone(item, character) for item in node.items)
        if isinstance(node, Repetition):
            return node.least <= 1 and self._is_alone(node.item, character)
        if isinstance(node, Atomic):
            return self._is_alone(node.item, character)
        if isinstance(node, Concatenation):
            for i, item in enumerate(node.items):
                if self._is_alone(item, character) and all(map(can_be_left_out, node.items[i + 1 :])):
                    return True
                # An item before it may be left out, unless it keeps the character for itself.
                if not can_be_left_out(item) or (not gives_back(item) and self._holds(item, character)):
                    return False
        return False

    def _holds(self, node: Node, character: str) -> bool:
        """Whether the character may be part of what the node matches."""
        matching = self.matching(character)
        return any(matching >> atom.number & 1 for atom in atoms_of(node))


@dataclass
class _State:
    """A state of the automaton.

    `looks`: a thread in this state depends on whatever comes next, even on the end of the text.
    `free`: states that a thread in this state is in as well.
    `reads`: each atom that the thread may read, and the state after it.
    """

    looks: bool = False
    free: list[int] = field(default_factory=list)
    reads: list[tuple[Atom, int]] = field(default_factory=list)


class _Automaton:
    """Thompson's automaton of a regex.

    Attributes:
        first: the atoms that a match may begin with, one bit each.
        looks: by the atom that a thread has just read: whether the thread looks at what follows.
        following: by the atom that a thread has just read: the atoms it may read next, one bit each.
    """

    def __init__(self, root: Node, atoms: int) -> None:
        self._states = [_State()]
        self._build(root, 0, looking=False)
        closures = [self._closure(i) for i in range(len(self._states))]
        self.first = self._readable(closures[0])
        self.looks = [False] * atoms
        self.following = [0] * atoms
        for state in self._states:
            for atom, after in state.reads:
                self.looks[atom.number] |= any(self._states[i].looks for i in closures[after])
                self.following[atom.number] |= self._readable(closures[after])

    def _build(self, node: Node, start: int, *, looking: bool) -> int:
        """Add the node's states after `start`; returns the state at its end."""
        if isinstance(node, Concatenation):
            for item in node.items:
                start = self._build(item, start, looking=looking)
            return start
        end = self._new(looking)
        if isinstance(node, Atom):
            self._states[start].reads.append((node, end))
        elif isinstance(node, Alternation | Atomic):
            for item in node.items if isinstance(node, Alternation) else (node.item,):
                last = self._build(item, self._step(start, looking), looking=looking)
                self._states[last].free.append(end)
        elif isinstance(node, Repetition):
            begin = self._step(start, looking)
            last = self._build(node.item, begin, looking=looking)
            self._states[last].free.append(end)
            if not node.once_at_most:
                self._states[last].free.append(begin)
            if node.least == 0:
                self._states[start].free.append(end)
        else:
            self._states[start].looks = True
            self._states[start].free.append(end)
            if node.item is not None:
                # Threads inside a look-ahead look at the text until it is decided, and end there.
                decided = self._build(node.item, self._step(start, True), looking=True)
                self._states[decided].looks = False
        return end

    def _new(self, looking: bool) -> int:
        self._states.append(_State(looks=looking))
        return len(self._states) - 1

    def _step(self, start: int, looking: bool) -> int:
        """A new state that a thread in `start` is in as well."""
        new = self._new(looking)
        self._states[start].free.append(new)
        return new

    def _closure(self, start: int) -> set[int]:
        """All states that a thread in `start` is in."""
        found, pending = {start}, [start]
        while pending:
            for state in self._states[pending.pop()].free:
                if state not in found:
                    found.add(state)
                    pending.append(state)
        return found

    def _readable(self, states: set[int]) -> int:
        """The atoms that a thread in one of these states may read, one bit each."""
        readable = 0
        for i in states:
            for atom, _ in self._states[i].reads:
                readable |= 1 << atom.number
        return readable


def _room(kept: dict[str, _T]) -> dict[str, _T]:
    """The dictionary, emptied where it has grown large."""
    if len(kept) >= _KEPT:
        kept.clear()
    return kept
