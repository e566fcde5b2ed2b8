"""What a tokenizer's splitting regex can see: an automaton that over-estimates its matches.

A splitter goes through a text from left to right. At each position it tries to match; where a match ends, the
next attempt begins. Two questions about neighbouring characters, c before a position s of the text and d
after it, are answered here for any text around them:

- `transparent(c, d)`: no match that begins before s goes on beyond s or depends on what it sees there. Then
  what is left of s is split as if the text ended there. The regex looks at nothing left of a match, so what
  is right of s is split as if the text began there.
- `alone(c)`: at a position before c there is always a match, whatever follows, because c by itself is one.

The automaton is Glushkov's: after an atom was read, it knows only which atoms may be read next. It has no
priorities and counts (`\\p{N}{1,3}` is taken as `\\p{N}+`). It has every thread that the backtracking engine
could have, and more; a thread too many only makes a position go unused.
Whether a character belongs to a class is asked of the engine itself, so the version of Unicode is the
engine's own.
"""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Regex, normalizers

from deepen_ext.text.regex_syntax import (
    Alternation,
    Atom,
    Concatenation,
    Node,
    NotUnderstood,
    Repetition,
    atoms_of,
    can_be_left_out,
    gives_back,
    parse,
)

_KEPT = 1 << 14  # characters whose answers are kept


class SplitRegex:
    """A splitting regex; see the module's text.

    Attributes:
        matching: of a character, the atoms that may match it, one bit each.
        alone: whether a character by itself is a match for certain, whatever follows it.
    """

    def __init__(self, pattern: str) -> None:
        """Parse it.

        Raises:
            NotUnderstood: the regex looks left (look-behind, `\\b`, `^`), refers back, matches the empty
                text, or is longer or deeper than any of a real tokenizer.
        """
        self._root, self._atoms = parse(pattern)
        if can_be_left_out(self._root, looks=True):
            raise NotUnderstood("it matches the empty text")
        self._classes = [
            normalizers.Replace(Regex(f"(?i:{atom.pattern})" if atom.fold else atom.pattern), "")
            for atom in self._atoms
        ]
        self._look = 1 << len(self._atoms)  # among the atoms: a look whether the text or the line ends
        self._following = [0] * len(self._atoms)  # by the atom read last: the atoms that may be read next
        self._first, _ = self._joined(self._root)
        # The answers are kept as long as this regex, not as long as the class.
        self.matching = lru_cache(_KEPT)(self._atoms_matching)
        self.alone = lru_cache(_KEPT)(lambda character: self._is_alone(self._root, character))
        self._after = lru_cache(_KEPT)(self._atoms_after)

    def transparent(self, left: str, right: str) -> bool:
        """Whether no match that begins before the position between the two depends on what is beyond it."""
        return not self._after(left) & (self.matching(right) | self._look)

    def begins(self, character: str) -> bool:
        """Whether a match may begin with this character."""
        return bool(self._first & self.matching(character))

    def _atoms_matching(self, character: str) -> int:
        return sum(1 << atom.number for atom in self._atoms if self._may_match(atom, character))

    def _atoms_after(self, left: str) -> int:
        """What a thread may read or look at after it has read this character."""
        matching, after = self.matching(left), 0
        for number, following in enumerate(self._following):
            if matching >> number & 1:
                after |= following
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

    def _joined(self, node: Node) -> tuple[int, int]:
        """Set what may follow each atom inside the node; returns the atoms that it may begin and end with."""
        first = last = 0
        if isinstance(node, Atom):
            first = last = 1 << node.number
        elif isinstance(node, Alternation):
            for item in node.items:
                begins, ends = self._joined(item)
                first, last = first | begins, last | ends
        elif isinstance(node, Repetition):
            first, last = self._joined(node.item)
            if not node.once_at_most:
                self._follow(last, first)
        elif isinstance(node, Concatenation):
            for i, item in enumerate(node.items):
                begins, ends = self._joined(item)
                self._follow(last, begins)
                if all(can_be_left_out(one, looks=True) for one in node.items[:i]):
                    first |= begins
                last = ends | last if can_be_left_out(item, looks=True) else ends
        else:
            # What no atom of a look-ahead can match looks to it like the end of the text.
            first = self._look if node.item is None else self._joined(node.item)[0]
        return first, last

    def _follow(self, before: int, after: int) -> None:
        """The atoms `after` may be read right after each of the atoms `before`."""
        for number in range(len(self._atoms)):
            if before >> number & 1:
                self._following[number] |= after
