"""Cuts that the automaton of a splitting regex allows, against the tokenizer's own splitter."""

from __future__ import annotations

import random

import pytest
from tokenizers import Regex, pre_tokenizers

from deepen_ext.text.cuts import _RegexSplitter
from deepen_ext.text.regex_syntax import NotUnderstood
from deepen_ext.text.split_regex import SplitRegex

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_HAN = r"&&[^\p{Han}]]"
# The patterns of families whose splitters differ, as their tokenizer.json has them.
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt-4": CL100K,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen3.5": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek-v3": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "kimi": r"[\p{Han}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER[:-1]}{_NO_HAN}*{_LOWER[:-1]}{_NO_HAN}+(?i:'s|'t|'re)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER[:-1]}{_NO_HAN}+{_LOWER[:-1]}{_NO_HAN}*(?i:'s|'t|'re)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "groups of three, from the right": r"\d{1,3}(?=(?:\d{3})*\b)|\D+",
    "cjk": r"[一-龥぀-ゟ゠-ヿ]+",
}
ALPHABET = "aabZ  1 2.,'\n\r\t-(é́̃ßſKﬅİ的日ก็ำ한ا🦙\u200d\u00a0_/"
BEHAVIORS = ["isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous"]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randint(2, 14)))


def pieces(splitter: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in splitter.pre_tokenize_str(text)] if text else []


def check_cuts(pattern: str, behavior: str, rng: random.Random, texts: int) -> int:
    """Every position said to split a text divides its pieces; returns how many positions were said to."""
    ours = _RegexSplitter(pattern, behavior.title().replace("_", ""))
    both = [pre_tokenizers.Split(Regex(pattern), behavior, invert) for invert in (False, True)]
    found = 0
    for i in range(texts):
        text, theirs = random_text(rng), both[i % 2]
        whole = pieces(theirs, text)
        for cut in range(1, len(text)):
            pair = text[cut - 1], text[cut]
            if ours.transparent(*pair) and ours.splits(*pair):
                found += 1
                apart = pieces(theirs, text[:cut]) + pieces(theirs, text[cut:])
                assert apart == whole, (pattern, behavior, text[:cut], text[cut:])
    return found


@pytest.mark.parametrize("behavior", BEHAVIORS)
@pytest.mark.parametrize("name", PATTERNS)
def test_families(name: str, behavior: str) -> None:
    pattern = PATTERNS[name]
    if "\\b" in pattern:
        with pytest.raises(NotUnderstood):
            SplitRegex(pattern)
        return
    found = check_cuts(pattern, behavior, random.Random(1), 300)
    if behavior in ("isolated", "removed"):
        assert found > 50
    elif behavior.startswith("merged"):
        assert found == 0


def random_regex(rng: random.Random, depth: int = 3) -> str:
    """From the whole of the grammar that is understood."""
    atoms = ["a", "b", "1", " ", r"\s", r"\S", r"\p{L}", r"\P{L}", r"\p{N}", r"\d", r"\n", r"\.", ".", "'"]
    atoms += ["[a-z]", r"[^\s\p{L}]", r"[\r\n]", r"[\p{L}&&[^a]]", "[^ab]", "é", "的"]
    kind = rng.random()
    if kind < 0.02:
        item = rng.choice(["$", r"\z"])
    elif depth == 0 or kind < 0.35:
        item = rng.choice(atoms)
    elif kind < 0.6:
        item = "".join(random_regex(rng, depth - 1) for _ in range(rng.randint(1, 3)))
    elif kind < 0.75:
        inner = "|".join(random_regex(rng, depth - 1) for _ in range(rng.randint(2, 3)))
        item = f"{rng.choice(['(?:', '(', '(?>'])}{inner})"
    elif kind < 0.8:
        item = f"(?i:{rng.choice(['st', 'ab|k', '[sdmt]', 'i'])})"
    elif kind < 0.85:
        item = f"{rng.choice(['(?=', '(?!'])}{random_regex(rng, depth - 1)})"
    else:
        inner = random_regex(rng, depth - 1)
        signs = [
            "*",
            "+",
            "?",
            "{1,3}",
            "{2}",
            "{2,}",
            "*?",
            "+?",
            "??",
            "*+",
            "++",
            "?+",
            "{1,2}+",
            "{2}?",
            "{1,2}?",
            "{,2}",
        ]
        item = f"(?:{inner}){rng.choice(signs)}"
    return item


@pytest.mark.parametrize("seed", range(20))
def test_any_regex(seed: int) -> None:
    """Some thousand regexes, each understood and right, or refused."""
    rng = random.Random(seed)
    understood = cuts = 0
    for _ in range(60):
        pattern = "|".join(random_regex(rng) for _ in range(rng.randint(1, 4)))
        try:
            Regex(pattern)
        except Exception:  # not one of Oniguruma's: the bindings raise no other class
            continue
        try:
            SplitRegex(pattern)
        except NotUnderstood:
            continue
        understood += 1
        cuts += check_cuts(pattern, rng.choice(BEHAVIORS), rng, 25)
    assert understood >= 10
    assert cuts >= 20


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<=a)b",
        r"(?<!a)b",
        r"\ba",
        r"\Bb",
        "^a",
        r"\Aa",
        r"\Ga",
        r"a\Z",  # looks beyond the line's end, for the end of the text
        r"(a)\1",
        "a*",
        "a?|b",
        "a{1}?",  # once or not at all, to Oniguruma
        "(?=a)",
        "a|",
        "(?x:a)",
        "(?i:ß)",  # matches "ss" too, two characters
        "(?i:[^a])",
        r"\x61b",
        "(" * 300 + "a" + ")" * 300,  # too deep to be walked by recursion
        "(?=" * 33 + "a" + ")" * 33 + "a",
        "a" + "+" * 2000,
        "a{1}{1}{1}{1}",
        "a" * 2001,  # each atom is looked at with each other
    ],
)
def test_not_understood(pattern: str) -> None:
    with pytest.raises(NotUnderstood):
        SplitRegex(pattern)


@pytest.mark.parametrize("pattern", ["(?:" * 32 + "a" + "){1}{1}{1}" * 32, "a" * 2000])
def test_the_longest_and_deepest_that_is_understood(pattern: str) -> None:
    regex = SplitRegex(pattern)
    assert regex.begins("a")
    assert regex.alone("a") == (len(pattern) < 2000)
    assert not regex.begins("b")


@pytest.mark.parametrize(
    ("pattern", "alone"),
    [
        ("a?a", True),
        ("a?+a", False),  # it takes the only one, and does not give it back
        ("(?>a?)a", False),
        ("b?+a", True),
        ("aa?", True),
        ("(?:a?+){1}a", False),
        ("(?:a?+|b)a", False),
        ("a{2}", False),
        ("ab+?", False),  # lazy, but there is one
        ("ab{1,2}?", False),
        ("a{0,2}b|a", True),
        ("a(?=b)", False),
    ],
)
def test_a_character_that_is_a_match_by_itself(pattern: str, alone: bool) -> None:
    assert SplitRegex(pattern).alone("a") == alone


@pytest.mark.parametrize(
    ("pattern", "pair", "transparent"),
    [
        ("a?b", "aa", True),
        ("a{0,1}b", "aa", True),
        ("a{1,}", "aa", False),
        ("a{2}", "aa", False),
        ("a(?:b?)+c", "ac", False),
        ("[]a]b", "]b", False),
        ("(?i:(?:a))b", "Ab", False),
        ("a(?!b)c", "ab", False),
        ("a(?!b)c", "ac", False),
        ("a(?=bc)", "bc", False),
        ("a(?!bc)", "bd", True),  # the look-ahead fails, as at the end of the text
        ("a$|a", "ab", False),  # at the end of the text `a$` is a match
        (r"a(?=b\z)|a", "bc", False),
    ],
)
def test_what_a_match_can_see_beyond_a_position(pattern: str, pair: str, transparent: bool) -> None:
    assert SplitRegex(pattern).transparent(*pair) == transparent


@pytest.mark.parametrize(
    ("behavior", "where"),
    [
        ("Isolated", ["aa", "ab", "ba"]),
        ("Removed", ["aa", "ab", "ba"]),
        ("Contiguous", ["ab", "ba"]),
        ("MergedWithNext", []),
    ],
)
def test_where_a_piece_surely_ends(behavior: str, where: list[str]) -> None:
    splitter = _RegexSplitter("a", behavior)
    assert [pair for pair in ("aa", "ab", "ba", "bb") if splitter.splits(*pair)] == where


def test_case_folds_into_several_characters() -> None:
    regex = SplitRegex("(?i:st)x")
    assert not regex.transparent("ﬅ", "x")
    assert not regex.transparent("ſ", "t")
    assert regex.transparent("é", "x")
