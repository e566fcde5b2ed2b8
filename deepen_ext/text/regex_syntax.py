"""A tokenizer's splitting regex as a tree of nodes, and what a node can match.

The syntax is Oniguruma's (Ruby), which `tokenizers` uses. What a character class means is left to the engine:
an `Atom` keeps the class as it is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_ONE_CHARACTER = frozenset("sSdDwWhHrntfvae")  # escapes that stand for one character
# Limits of what is understood; no real tokenizer comes near them. The tree is walked by recursion, so its
# depth is limited. Each atom is looked at with each other, which takes 0.6 s for 2,000 atoms.
_MOST_ATOMS, _MOST_GROUPS_DEEP, _MOST_QUANTIFIERS = 2000, 32, 3
_QUANTIFIER = re.compile(r"\{(?=,?\d)(\d*)(,?)(\d*)\}(\??)")


class NotUnderstood(Exception):
    """The regex has something that `SplitRegex` does not cover."""


@dataclass(frozen=True)
class Atom:
    """Matches one character; `fold`: in upper and lower case alike."""

    number: int  # its index among the atoms of the regex
    pattern: str
    fold: bool


@dataclass(frozen=True)
class Concatenation:
    """All items, one after the other."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Alternation:
    """The first of the items that lets the rest of the regex match."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Repetition:
    """The item `least` times or more; with `once_at_most`, no more than once. `(?>...)` is the item once."""

    item: Node
    least: int
    once_at_most: bool
    gives_back: bool  # False: possessive or atomic


@dataclass(frozen=True)
class LookAhead:
    """`(?=...)` or `(?!...)`; without an item, the end of the line or of the text."""

    item: Node | None


Node = Atom | Concatenation | Alternation | Repetition | LookAhead


def parse(pattern: str) -> tuple[Node, list[Atom]]:
    """The regex as a tree, and the atoms in it by their number.

    Raises:
        NotUnderstood: the regex looks left (`^`, a look-behind, `\\b`), refers back, is not well formed, or
            is longer or deeper than any of a real tokenizer.
    """
    parser = _Parser(pattern)
    return parser.parse(), parser.atoms


class _Parser:
    """Recursive descent, one method for each construct. `fold`: inside `(?i:...)`, where case is ignored."""

    def __init__(self, pattern: str) -> None:
        self._text, self._at, self._depth = pattern, 0, 0
        self.atoms: list[Atom] = []

    def parse(self) -> Node:
        node = self._alternation(fold=False)
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

    def _taken(self, pattern: str) -> str:
        """Take what a regex of Python finds here; "" where it finds nothing."""
        found = re.compile(pattern).match(self._text, self._at)
        return self._take(len(found[0])) if found else ""

    def _alternation(self, *, fold: bool) -> Node:
        branches = [self._concatenation(fold=fold)]
        while self._taken(r"\|"):
            branches.append(self._concatenation(fold=fold))
        return branches[0] if len(branches) == 1 else Alternation(tuple(branches))

    def _concatenation(self, *, fold: bool) -> Node:
        items: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            items.append(self._repetition(self._item(fold=fold)))
        return items[0] if len(items) == 1 else Concatenation(tuple(items))

    def _repetition(self, item: Node) -> Node:
        for _ in range(_MOST_QUANTIFIERS + 1):
            if counted := _QUANTIFIER.match(self._text, self._at):
                self._at = counted.end()
                fewest, comma, most, lazy = counted.groups()
                # Ruby's {n}? is a choice between n times and nothing; {n,m}+ is a repeated repetition.
                least = 0 if lazy and not comma else int(fewest or 0)
                once_at_most = int((most or 2) if comma else fewest) <= 1
                item = Repetition(item, least, once_at_most, gives_back=True)
            elif sign := self._taken("[*+?]"):
                suffix = self._taken("[+?]")
                item = Repetition(item, int(sign == "+"), sign == "?", gives_back=suffix != "+")
            else:
                return item
        raise NotUnderstood(f"more than {_MOST_QUANTIFIERS} quantifiers in a row")

    def _item(self, *, fold: bool) -> Node:
        sign = self._take()
        if sign == "(":
            return self._group(fold=fold)
        if sign == "[":
            return self._atom(self._class(), fold=fold)
        if sign == "\\":
            return self._escape(fold=fold)
        if sign == "$":
            return LookAhead(None)
        if sign == "^":
            raise NotUnderstood("'^' looks left")
        return self._atom(sign if sign == "." else re.escape(sign), fold=fold, literal=sign != ".")

    def _atom(self, pattern: str, *, fold: bool, literal: bool = False) -> Atom:
        if fold and not (pattern.isascii() and (literal or pattern[1:-1].isalpha())):
            raise NotUnderstood(f"{pattern!r} with case ignored")
        if len(self.atoms) == _MOST_ATOMS:
            raise NotUnderstood(f"more than {_MOST_ATOMS} characters and classes")
        self.atoms.append(Atom(len(self.atoms), pattern, fold))
        return self.atoms[-1]

    def _escape(self, *, fold: bool) -> Node:
        start = self._at - 1
        sign = self._take()
        if sign == "z":
            return LookAhead(None)
        if (sign in "pP" and self._peek() == "{") or sign in "xu":
            closed = self._taken(r"\{[^}]*\}|[0-9a-fA-F]{1,4}")
            if not closed or (sign == "x" and len(closed) > 2 and closed[0] != "{"):
                raise NotUnderstood(f"'\\{sign}' at {start}")
            return self._atom(self._text[start : self._at], fold=fold)
        if sign in _ONE_CHARACTER:
            return self._atom(f"\\{sign}", fold=fold)
        if sign.isalnum():
            raise NotUnderstood(f"'\\{sign}'")
        return self._atom(re.escape(sign), fold=fold, literal=True)

    def _class(self) -> str:
        """A character class as it is written, with the classes inside it: the engine reads it."""
        start, depth, sign = self._at - 1, 1, "["
        while depth:
            if sign == "[":
                self._taken(r"\^?\]?")  # a ] right after the [ is a character
            sign = self._take()
            if sign == "\\":
                self._take()
            depth += (sign == "[") - (sign == "]")
        return self._text[start : self._at]

    def _group(self, *, fold: bool) -> Node:
        kind = self._taken(r"\?(?:i:|:|>|=|!)")
        if not kind and self._peek() == "?":
            raise NotUnderstood(f"the group at {self._at - 1}")
        if self._depth == _MOST_GROUPS_DEEP:
            raise NotUnderstood(f"more than {_MOST_GROUPS_DEEP} groups in one another")
        self._depth += 1
        item = self._alternation(fold=fold or kind == "?i:")
        self._depth -= 1
        if not self._taken(r"\)"):
            raise NotUnderstood("a group is not closed")
        if kind in ("?=", "?!"):
            return LookAhead(item)
        return Repetition(item, 1, once_at_most=True, gives_back=False) if kind == "?>" else item


def can_be_left_out(node: Node, *, looks: bool = False) -> bool:
    """Whether the node matches the empty text anywhere: `a*` does, `a` and `(?=a)` do not.

    `looks`: count a look-ahead as such a node, because it may match without reading a character.
    """
    if isinstance(node, Concatenation):
        return all(can_be_left_out(item, looks=looks) for item in node.items)
    if isinstance(node, Alternation):
        return any(can_be_left_out(item, looks=looks) for item in node.items)
    if isinstance(node, Repetition):
        return node.least == 0 or can_be_left_out(node.item, looks=looks)
    return looks and isinstance(node, LookAhead)


def gives_back(node: Node) -> bool:
    """Whether no part of the node is possessive or atomic."""
    if isinstance(node, Repetition):
        return node.gives_back and gives_back(node.item)
    if isinstance(node, Concatenation | Alternation):
        return all(map(gives_back, node.items))
    return True


def atoms_of(node: Node | None) -> list[Atom]:
    """All atoms of the node, those of look-aheads included."""
    if node is None:
        return []
    if isinstance(node, Atom):
        return [node]
    if isinstance(node, Concatenation | Alternation):
        return [atom for item in node.items for atom in atoms_of(item)]
    return atoms_of(node.item)
