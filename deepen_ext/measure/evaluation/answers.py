"""What a model's output says: the last number, a letter, a short text; and whether that is right.

The metrics are those of the benchmark data's README, read strictly: what counts is in the output, up to the
stop, where the metric looks for it. Nothing is searched for that would do as well.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

# Commas group three digits each; a decimal point needs a digit after it, so that a sentence may end in "12.".
_NUMBER = re.compile(
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"|(?<![\w.])\.[0-9]+"
)
_MINUS = ("-", "\N{MINUS SIGN}")
_DASHES = "-\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}"
_CURRENCY = "$£€¥"
_CLOSING = ")]}%"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def up_to_stop(output: str, stop_strings: Sequence[str]) -> str:
    """The output before the first stop string in it; generations keep the stop string that ended them."""
    found = [start for stop in stop_strings if (start := output.find(stop)) >= 0]
    return output[: min(found, default=len(output))]


def last_number(text: str) -> str | None:
    """The last number of a text, written in one way; None if there is none.

    "1,234.50" is "1234.5", "$18.00" is "18", "-0" is "0", "007" is "7" and ".5" is "0.5". A dot that ends a
    sentence, currency and percent signs, markup and units do not count: "**50%**." is "50". "3/4" is two
    numbers, of which the last is 4, and so it is in the authors' own scorer: a metric by the last number does
    no arithmetic. A minus belongs to the number that it touches ("-5", "-$5", "$-5"), unless it takes that
    number away from something: the last number of "9-5", "9 -5", "(4) -5" and "A-5" is 5. The authors' scorer
    leaves out every sign; no answer of GSM8K is negative, so this matters for wrong outputs only.

    Digits are compared as they are written, not as binary floating point: 0.1 and 0.10 are the same number,
    0.1 and 0.1000000000000000001 are not.
    """
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007 - the last one is what counts
        pass
    if last is None:
        return None
    whole, _, decimals = last.group().replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    return f"-{number}" if number != "0" and _is_negative(text[: last.start()]) else number


def _is_negative(before: str) -> bool:
    """Whether a number is negative, after the text before it."""
    if before and before[-1] in _CURRENCY and before[:-1].endswith(_MINUS):
        before = before[:-1]
    if not before.endswith(_MINUS):
        return False
    left = before[:-1]
    if left and (left[-1].isalnum() or left[-1] in _CLOSING + _DASHES):
        return False
    operand = left.rstrip(" \t")
    return not (operand and (operand[-1].isdigit() or operand[-1] in _CLOSING))


def first_letter(text: str, letters: str) -> str | None:
    """The letter a text begins with, if it is one of `letters` and stands alone; otherwise None.

    Spaces, line ends and punctuation may come before it: " A", "(B", "\\nC" and "**D." are answers. "Answer"
    and " Apple" are not, nor is " a", which is an article more often than an answer. A letter further on
    ("The answer is B") is not looked for: the paper's setting is one new token.
    """
    found = re.match(rf"[\W_]*([{letters}])(?![^\W_])", text)
    return found[1] if found else None


def normalised(text: str) -> str:
    """SQuAD's normalisation, in its order: lower case, no punctuation, no articles, single spaces.

    As in the script of Rajpurkar et al. (2016): punctuation is that of ASCII, taken out without a space
    ("O'Neill" is "oneill"), accents stay, and "the", "a" and "an" become spaces as words of their own.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


class Answers:
    """How one kind of answer is read, compared and written. Kinds hold no state."""

    def references(self, answer: object) -> tuple[str, ...]:
        """What is right, from the data's `answer`.

        Raises:
            ValueError: it is not an answer of this kind; the message says what it should be.
        """
        raise NotImplementedError

    def find(self, text: str) -> str | None:
        """What the text (up to the stop) says; None if it holds no answer."""
        raise NotImplementedError

    def matches(self, found: str, reference: str) -> bool:
        """Whether they are the same answer: equal, where `find` writes an answer in one way only."""
        return found == reference

    def written(self, answer: object) -> str:
        """The data's `answer` as a right output would write it, without the stop."""
        raise NotImplementedError


class LastNumber(Answers):
    """A worked answer, of which the last number counts."""

    def references(self, answer: object) -> tuple[str, ...]:
        """The last number of the worked answer."""
        number = last_number(answer) if isinstance(answer, str) else None
        if number is None:
            raise ValueError("a text with a number in it")
        return (number,)

    def find(self, text: str) -> str | None:
        """The last number of the text."""
        return last_number(text)

    def written(self, answer: object) -> str:
        """The worked answer, directly after "Answer:" as in the demos."""
        return str(answer).rstrip("\n")


@dataclass(frozen=True)
class Letter(Answers):
    """The letter of one of several options.

    ARC has items whose options are numbered, not lettered (9 of `test`, 23 of `dev`), and in the data their
    options are empty. Such an item stays, as in the data of the paper's authors, and no output is right: its
    options are not in the prompt, and a guess that happens to be right says nothing.
    """

    letters: str

    def references(self, answer: object) -> tuple[str, ...]:
        """The letter, or the number of an item that cannot be answered."""
        numbers = (str(number) for number, _ in enumerate(self.letters, start=1))
        if not isinstance(answer, str) or answer not in [*self.letters, *numbers]:
            raise ValueError(f"one of {', '.join(self.letters)}")
        return (answer,)

    def find(self, text: str) -> str | None:
        """The letter that the text begins with."""
        return first_letter(text, self.letters)

    def written(self, answer: object) -> str:
        """The letter after a space, as in MMLU's demos."""
        return f" {answer}"


class ShortText(Answers):
    """A name, a date, a few words: exact match with any reference after SQuAD's normalisation."""

    def references(self, answer: object) -> tuple[str, ...]:
        """All texts that are right."""
        if not isinstance(answer, list) or not answer or not all(isinstance(one, str) for one in answer):
            raise ValueError("a list of one text or more")
        return tuple(answer)

    def find(self, text: str) -> str | None:
        """The text without spaces around it; None if that is empty."""
        return text.strip() or None

    def matches(self, found: str, reference: str) -> bool:
        """Whether they are equal when normalised.

        Of a few references nothing is left then ("A+", "+-*/", "--"). SQuAD's script takes any text that is
        normalised away for them ("the" for "A+"); here such texts are compared as they are, in lower case.
        """
        one, other = normalised(found), normalised(reference)
        if not one and not other:
            return found.lower().split() == reference.lower().split()
        return one == other

    def written(self, answer: object) -> str:
        """The first reference, directly after "Answer:" as in the demos. (They are in no order of merit.)"""
        return self.references(answer)[0].strip()
