"""What a tokenizer's splitting regex can see: an automaton that over-estimates its matches.

A splitter goes through a text from left to right. At each place it tries to match; where a match ends, the
next attempt begins. Two questions about neighbouring characters, c before a place s of the text and d after
it, are answered here for any text around them:

- `transparent(c, d)`: no match that begins before s goes on beyond s or looks beyond it. Then what is left of
  s is split as if the text ended there. The regex looks at nothing left of a match, so what is right of s is
  split as if the text began there.
- `alone(c)`: at a place before c there is always a match, whatever follows, because c by itself is one.

The automaton is Thompson's, without priorities and counts (`\\p{N}{1,3}` is taken as `\\p{N}+`). It has every
thread that the backtracking engine could have, and more; a thread too many only makes a place go unused.
Whether a character belongs to a class is asked of the engine itself, so the version of Unicode is the
engine's own.

The syntax is Oniguruma's (Ruby). `NotUnderstood` is raised for what looks left (look-behind, `\\b`, `^`), for
back-references, and for a regex that matches the empty text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tokenizers import Regex, normalizers

_ONE_CHARACTER = frozenset("sSdDwWhHrntfvae")  # escapes that stand for one character
_QUANTIFIER = re.compile(r"\{(\d*)(,?)(\d*)\}")
_KEPT = 1 << 14  # characters whose answers are kept


class NotUnderstood(Exception):
    """The regex has something that the automaton does not cover."""


@dataclass(frozen=True)
class _Atom:
    """Matches one character."""

    number: int
    pattern: str
    fold: bool  # upper and lower case alike


@dataclass(frozen=True)
class _Sequence:
    items: tuple[_Node, ...]


@dataclass(frozen=True)
class _Choice:
    branches: tuple[_Node, ...]


@dataclass(frozen=True)
class _Repeat:
    item: _Node
    least: int
    once_at_most: bool
    gives_back: bool  # False: possessive


@dataclass(frozen=True)
class _Atomic:
    item: _Node


@dataclass(frozen=True)
class _Look:
    """A look-ahead, or (no item) the end of the line or the text."""

    item: _Node | None


_Node = _Atom | _Sequence | _Choice | _Repeat | _Atomic | _Look


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._text, self._at = pattern, 0
        self.atoms: list[_Atom] = []

    def parse(self) -> _Node:
        node = self._choice(fold=False)
        if self._at < len(self._text):
            raise NotUnderstood(f"')' at {self._at}")
        return node

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, count: int = 1) -> str:
        taken = self._text[self._at : self._at + count]
        if len(taken) < count:
            raise NotUnderstood("the regex ends early")
        self._at += count
        return taken

    def _choice(self, *, fold: bool) -> _Node:
        branches = [self._sequence(fold=fold)]
        while self._peek() == "|":
            self._take()
            branches.append(self._sequence(fold=fold))
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def _sequence(self, *, fold: bool) -> _Node:
        items: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            items.append(self._repeated(self._item(fold=fold)))
        return items[0] if len(items) == 1 else _Sequence(tuple(items))

    def _repeated(self, item: _Node) -> _Node:
        while True:
            sign = self._peek()
            counted = _QUANTIFIER.match(self._text, self._at) if sign == "{" else None
            if counted is not None and (counted[1] or counted[3]):
                self._take(len(counted[0]))
                least = int(counted[1] or 0)
                most = least if not counted[2] else int(counted[3]) if counted[3] else None
                # Ruby's {n}? is a choice between n times and nothing; {n,m}+ is a repeated repetition.
                if self._peek() == "?":
                    self._take()
                    least = least if counted[2] else 0
                item = _Repeat(item, least, most is not None and most <= 1, gives_back=True)
            elif sign and sign in "*+?":
                self._take()
                suffix = self._take() if self._peek() and self._peek() in "+?" else ""
                item = _Repeat(item, int(sign == "+"), sign == "?", gives_back=suffix != "+")
            else:
                return item

    def _item(self, *, fold: bool) -> _Node:
        sign = self._take()
        if sign == "(":
            return self._group(fold=fold)
        if sign == "[":
            return self._atom(self._class(), fold=fold)
        if sign == "\\":
            return self._escape(fold=fold)
        if sign == "$":
            return _Look(None)
        if sign == "^":
            raise NotUnderstood("'^' looks left")
        return self._atom(sign if sign == "." else re.escape(sign), fold=fold, literal=sign != ".")

    def _atom(self, pattern: str, *, fold: bool, literal: bool = False) -> _Atom:
        if fold and not (pattern.isascii() and (literal or pattern[1:-1].isalpha())):
            raise NotUnderstood(f"{pattern!r} with case ignored")
        self.atoms.append(_Atom(len(self.atoms), pattern, fold))
        return self.atoms[-1]

    def _escape(self, *, fold: bool) -> _Node:
        start = self._at - 1
        sign = self._take()
        if sign in "zZ":
            return _Look(None)
        if (sign in "pP" and self._peek() == "{") or sign in "xu":
            closed = re.compile(r"\{[^}]*\}|[0-9a-fA-F]{1,4}").match(self._text, self._at)
            if closed is None or (sign == "x" and len(closed[0]) > 2 and closed[0][0] != "{"):
                raise NotUnderstood(f"'\\{sign}' at {start}")
            self._take(len(closed[0]))
            return self._atom(self._text[start : self._at], fold=fold)
        if sign in _ONE_CHARACTER:
            return self._atom(f"\\{sign}", fold=fold)
        if sign.isalnum():
            raise NotUnderstood(f"'\\{sign}'")
        return self._atom(re.escape(sign), fold=fold, literal=True)

    def _class(self) -> str:
        """A character class with the classes in it, as it stands: the engine reads it."""
        start, depth = self._at - 1, 1
        self._after_bracket()
        while depth:
            sign = self._take()
            if sign == "\\":
                self._take()
            elif sign == "[":
                depth += 1
                self._after_bracket()
            elif sign == "]":
                depth -= 1
        return self._text[start : self._at]

    def _after_bracket(self) -> None:
        if self._peek() == "^":
            self._take()
        if self._peek() == "]":  # the first one in a class is a character
            self._take()

    def _group(self, *, fold: bool) -> _Node:
        kind = ""
        if self._peek() == "?":
            found = re.compile(r"\?(?:i:|:|>|=|!)").match(self._text, self._at)
            if found is None:
                raise NotUnderstood(f"the group at {self._at - 1}")
            kind = self._take(len(found[0]))
        item = self._choice(fold=fold or kind == "?i:")
        if self._peek() != ")":
            raise NotUnderstood("a group is not closed")
        self._take()
        if kind in ("?=", "?!"):
            return _Look(item)
        return _Atomic(item) if kind == "?>" else item


@dataclass
class _State:
    """A thread's place. `looks`: whatever comes next matters to it, be it the end of the text."""

    looks: bool = False
    free: list[int] = field(default_factory=list)  # states that it is in at once
    reads: list[tuple[_Atom, int]] = field(default_factory=list)


class SplitRegex:
    """A splitting regex; see the module's text."""

    def __init__(self, pattern: str) -> None:
        """Parse it.

        Raises:
            NotUnderstood: see the module's text.
        """
        parser = _Parser(pattern)
        self._root = parser.parse()
        if _can_be_empty(self._root):
            raise NotUnderstood("it matches the empty text")
        self._classes = [
            normalizers.Replace(Regex(f"(?i:{atom.pattern})" if atom.fold else atom.pattern), "")
            for atom in parser.atoms
        ]
        self._atoms = parser.atoms
        self._states: list[_State] = [_State()]
        self._build(self._root, 0, looking=False)
        closures = [self._closure(i) for i in range(len(self._states))]
        # For the atom that a thread has just read: whether it looks at what follows, and what it may read.
        looks = [0] * len(self._atoms)
        following = [0] * len(self._atoms)
        for state in self._states:
            for atom, there in state.reads:
                looks[atom.number] |= any(self._states[i].looks for i in closures[there])
                following[atom.number] |= self._readable(closures[there])
        self._looks, self._following = looks, following
        self._first = self._readable(closures[0])
        self._members: dict[str, int] = {}
        self._after: dict[str, int] = {}
        self._alone: dict[str, bool] = {}

    def transparent(self, left: str, right: str) -> bool:
        """Whether no match from before the place between the two reaches or looks beyond it."""
        after = self._after.get(left)
        if after is None:
            after = self._read(left)
        return after >= 0 and not after & self.members(right)

    def alone(self, character: str) -> bool:
        """Whether the character by itself is a match for certain, whatever follows it."""
        found = self._alone.get(character)
        if found is None:
            found = self._is_alone(self._root, character)
            _room(self._alone)[character] = found
        return found

    def begins(self, character: str) -> bool:
        """Whether a match may begin with this character."""
        return bool(self._first & self.members(character))

    def members(self, character: str) -> int:
        """The atoms that may match this character, one bit each."""
        found = self._members.get(character)
        if found is None:
            found = sum(1 << atom.number for atom in self._atoms if self._may_match(atom, character))
            _room(self._members)[character] = found
        return found

    def _read(self, left: str) -> int:
        """What a thread that has just read this character may read next; -1 where one looks at it."""
        members, after = self.members(left), 0
        for atom in self._atoms:
            if members >> atom.number & 1:
                if self._looks[atom.number]:
                    after = -1
                    break
                after |= self._following[atom.number]
        _room(self._after)[left] = after
        return after

    def _may_match(self, atom: _Atom, character: str) -> bool:
        # Case folds some characters into two or three (the ligature of s and t), of which each may match.
        if atom.fold and not character.isascii():
            return any(part.isascii() for part in character.casefold())
        return str(self._classes[atom.number].normalize_str(character)) == ""

    def _is_alone(self, node: _Node, character: str) -> bool:
        if isinstance(node, _Atom):
            return (character.isascii() or not node.fold) and self._may_match(node, character)
        if isinstance(node, _Choice):
            return any(self._is_alone(branch, character) for branch in node.branches)
        if isinstance(node, _Repeat):
            return node.least <= 1 and self._is_alone(node.item, character)
        if isinstance(node, _Atomic):
            return self._is_alone(node.item, character)
        if isinstance(node, _Sequence):
            for i, item in enumerate(node.items):
                if self._is_alone(item, character) and all(
                    _can_be_left_out(one) for one in node.items[i + 1 :]
                ):
                    return True
                # An item before it may be left out, unless it keeps the character for itself.
                if not _can_be_left_out(item) or (not _gives_back(item) and self._holds(item, character)):
                    return False
        return False

    def _holds(self, node: _Node, character: str) -> bool:
        """Whether the character may be part of what the node matches."""
        members = self.members(character)
        return any(members >> atom.number & 1 for atom in _atoms_of(node))

    def _build(self, node: _Node, start: int, *, looking: bool) -> int:
        """Add the node's states after `start`; returns the one at its end."""
        if isinstance(node, _Sequence):
            for item in node.items:
                start = self._build(item, start, looking=looking)
            return start
        end = self._new(looking)
        if isinstance(node, _Atom):
            self._states[start].reads.append((node, end))
        elif isinstance(node, _Choice):
            for branch in node.branches:
                self._states[self._build(branch, self._step(start, looking), looking=looking)].free.append(
                    end
                )
        elif isinstance(node, _Repeat):
            begin = self._step(start, looking)
            last = self._build(node.item, begin, looking=looking)
            self._states[last].free.append(end)
            if not node.once_at_most:
                self._states[last].free.append(begin)
            if node.least == 0:
                self._states[start].free.append(end)
        elif isinstance(node, _Atomic):
            self._states[self._build(node.item, self._step(start, looking), looking=looking)].free.append(end)
        else:
            self._states[start].looks = True
            self._states[start].free.append(end)
            if node.item is not None:
                # Its threads look until it is decided; then they are nobody's.
                decided = self._build(node.item, self._step(start, True), looking=True)
                self._states[decided].looks = False
        return end

    def _new(self, looking: bool) -> int:
        self._states.append(_State(looks=looking))
        return len(self._states) - 1

    def _step(self, start: int, looking: bool) -> int:
        new = self._new(looking)
        self._states[start].free.append(new)
        return new

    def _closure(self, start: int) -> set[int]:
        found, pending = {start}, [start]
        while pending:
            for there in self._states[pending.pop()].free:
                if there not in found:
                    found.add(there)
                    pending.append(there)
        return found

    def _readable(self, states: set[int]) -> int:
        readable = 0
        for i in states:
            for atom, _ in self._states[i].reads:
                readable |= 1 << atom.number
        return readable


def _room(kept: dict[str, object] | dict[str, int] | dict[str, bool]) -> dict[str, object]:
    """The dictionary, emptied where it has grown large."""
    if len(kept) >= _KEPT:
        kept.clear()
    return kept  # type: ignore[return-value]


def _can_be_empty(node: _Node, *, looks: bool = True) -> bool:
    """Whether it may match without reading a character; `looks`: a look-ahead may."""
    if isinstance(node, _Sequence):
        return all(_can_be_empty(item, looks=looks) for item in node.items)
    if isinstance(node, _Choice):
        return any(_can_be_empty(branch, looks=looks) for branch in node.branches)
    if isinstance(node, _Repeat):
        return node.least == 0 or _can_be_empty(node.item, looks=looks)
    if isinstance(node, _Atomic):
        return _can_be_empty(node.item, looks=looks)
    return looks and isinstance(node, _Look)


def _can_be_left_out(node: _Node) -> bool:
    """Whether it matches for certain, be it nothing, wherever it stands."""
    return _can_be_empty(node, looks=False)


def _gives_back(node: _Node) -> bool:
    """Whether nothing in it is possessive or atomic."""
    if isinstance(node, _Repeat):
        return node.gives_back and _gives_back(node.item)
    if isinstance(node, _Sequence | _Choice):
        return all(map(_gives_back, node.items if isinstance(node, _Sequence) else node.branches))
    return not isinstance(node, _Atomic)


def _atoms_of(node: _Node | None) -> list[_Atom]:
    if node is None:
        return []
    if isinstance(node, _Atom):
        return [node]
    if isinstance(node, _Sequence | _Choice):
        items = node.items if isinstance(node, _Sequence) else node.branches
        return [atom for item in items for atom in _atoms_of(item)]
    return _atoms_of(node.item)
