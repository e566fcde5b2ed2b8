"""Text hand-off: bytes in, the same bytes out, and ids that grow exactly as afresh, on real tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import AutoTokenizer

from deepen_ext.errors import InputError, ModelError
from deepen_ext.text.characters import Utf8Stream, whole_characters
from deepen_ext.text.cuts import _no_token_spans
from deepen_ext.text.growing_text import GrowingText
from deepen_ext.text.vocabulary import Vocabulary

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

NATURAL = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 3.14159 (roughly).",
    "Don't panic; they'll've been there since 1984 — “quoted” text… and naïve façades.",
    "def fusion(x: list[int]) -> dict:\n\treturn {k: v**2 for k, v in enumerate(x) if v >= 10}  # ok\n",
    '<div class="a-b_c">\n    <b>bold</b>\r\n</div>\n\n\n#include <stdio.h>\nfor (int i=0;i<10;++i) {}\n',
    "今天天气很好，我们去公园吧。日本語の文章もカタカナもあります！한국어 문장도 있어요. 中文English混合123",
    "👩‍👩‍👧‍👦 family 🇫🇷 👍🏽❤️ ☂️ 𝔘𝔫𝔦 \U0001f9ff",
    "e\u0301 n\u0303a\u0308\u0323 \u1e0b\u0323 क्षत्रिय สวัสดีชาวโลก مَرْحَبًا שָׁלוֹם Привет, мир!",
    "  leading\n\n\n\n  runs   of     spaces\t\t\tand tabs \r\n\r\n \n \u00a0\u2003\u200b x",
    "0 12 345 6789 0123456789 1,000,000.00 1e-9 ²½ Ⅳ ٣",
    "AAAAAAAAAAAAAAAAAAAA----------==========__________..........",
    "a\u2581b\u2581\u2581 \u2581c",
]
# Names of special and other added tokens of the three tokenizers, and pieces of them.
ADDED = [
    "<|im_end|>",
    "<|im_start|>user\n",
    "<start_of_turn>",
    "<eos>",
    "<unused12>",
    "<b>",
    "</b>",
    "[multimodal]",
]
ADDED += [
    "<|endoftext|>",
    "<tool_call>",
    "<repo_name>",
    "<|im",
    "_end|>",
    "<start_of",
    "<unused",
    "\n\n\n\n",
    "<",
]
# No text here has bytes that SmolLM2 has no token for: control characters, the unassigned planes 4 to 11.
CHARACTERS = st.characters(codec="utf-8").filter(
    lambda c: c in "\t\n\r" or (c.isprintable() and not "\U00040000" <= c < "\U000c0000")
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(NATURAL).flatmap(
            lambda text: st.tuples(st.integers(0, len(text)), st.integers(1, 40)).map(
                lambda span: text[span[0] : span[0] + span[1]]
            )
        ),
        st.sampled_from(ADDED),
        st.sampled_from([" ", "  ", "\n", "\t", "\r\n", "'", "'s", ".", "，", "1", "的"]),
        st.sampled_from(["\u0301", "\u200d", "a", "The", "s", ">", "/"]),
        st.text(CHARACTERS, max_size=12),
        st.binary(max_size=12).map(lambda data: data.decode("utf-8", "replace")),
    ),
    max_size=10,
).map("".join)
QUICK = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def vocabulary_at(path: Path) -> Vocabulary:
    return Vocabulary.from_tokenizer(AutoTokenizer.from_pretrained(path))


@pytest.fixture(scope="session")
def real(smollm2_dir: Path, gemma_dir: Path, qwen_tokenizer_dir: Path) -> dict[str, Vocabulary]:
    return {
        "smollm2": vocabulary_at(smollm2_dir),
        "gemma": vocabulary_at(gemma_dir),
        "qwen": vocabulary_at(qwen_tokenizer_dir),
    }


@pytest.fixture(scope="session", params=["smollm2", "gemma", "qwen"])
def vocabulary(request: pytest.FixtureRequest, real: dict[str, Vocabulary]) -> Vocabulary:
    return real[request.param]


def carried(vocabulary: Vocabulary, text: str) -> bytes:
    """The bytes of a text less those the tokenizer has no token for."""
    return bytes(byte for byte in text.encode() if byte not in vocabulary.lost_bytes)


def without_special(vocabulary: Vocabulary, text: str) -> bool:
    return all(vocabulary.tokens[i] is not None for i in vocabulary.encode(text))


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def assert_grows(vocabulary: Vocabulary, pieces: list[str]) -> None:
    """Ids as afresh after every append; the returned prefix unchanged, and known before if it is all."""
    growing = GrowingText(vocabulary, pieces[0])
    whole = pieces[0]
    for piece in pieces[1:]:
        before = list(growing.ids)
        foreseen = growing.keeps_ids(piece)
        assert growing.ids == before
        kept = growing.append(piece)
        assert foreseen == (kept == len(before))
        whole += piece
        assert growing.ids == vocabulary.prefix_ids + vocabulary.encode(whole)
        assert growing.ids[:kept] == before[:kept]
        assert kept == len(before) or kept == len(growing.ids) or growing.ids[kept] != before[kept]
    assert growing.text == whole


def assert_cuts_hold(vocabulary: Vocabulary, text: str) -> int:
    """Every single cut that is offered divides the ids; returns their number."""
    ids, ends = vocabulary.encode_spans(text)
    assert ends == sorted(ends)
    found = 0
    for cut in range(1, len(text)):
        if vocabulary.cuts.last(text[: cut + 1], cut - 1) == cut:
            left, right = vocabulary.encode(text[:cut]), vocabulary.encode_part(text[cut:], cut)[0]
            assert left + right == ids, text[max(0, cut - 9) : cut] + "|" + text[cut : cut + 9]
            assert sum(end <= cut for end in ends) == len(left)
            found += 1
    return found


# ---------------------------------------------------------------- real tokenizers


def test_what_the_tokenizers_are(real: dict[str, Vocabulary]) -> None:
    assert {name: v.kind for name, v in real.items()} == {
        "smollm2": "byte_level",
        "gemma": "sentencepiece",
        "qwen": "byte_level",
    }
    assert {name: v.vocab_size for name, v in real.items()} == {
        "smollm2": 49152,
        "gemma": 262144,
        "qwen": 151665,  # the model has 151,936 rows; the file calls the last tokens unused
    }
    assert {name: v.prefix_ids for name, v in real.items()} == {"smollm2": [], "gemma": [2], "qwen": []}
    assert all(v.cuts.incremental for v in real.values())


def test_every_byte_of_text_has_a_token(vocabulary: Vocabulary) -> None:
    single = {token[0] for token in vocabulary.tokens if token is not None and len(token) == 1}
    assert single == set(range(256)) - vocabulary.lost_bytes


def test_special_tokens_have_no_text(real: dict[str, Vocabulary]) -> None:
    gemma, qwen = real["gemma"], real["qwen"]
    assert [gemma.tokens[i] for i in (0, 1, 2, 3)] == [None] * 4
    assert gemma.bytes_of(2) == b""
    assert gemma.tokens[gemma.encode("<b>")[0]] == b"<b>"  # an added token, but one of text
    assert len(qwen.encode("<|im_end|>")) == 1
    assert qwen.tokens[qwen.encode("<|im_end|>")[0]] is None
    assert qwen.tokens[qwen.encode("<tool_call>")[0]] == b"<tool_call>"
    with pytest.raises(InputError, match="token id 262144 is outside"):
        gemma.bytes_of(262144)


def test_lone_surrogates_are_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(InputError, match="lone surrogate at character 1"):
        GrowingText(vocabulary, "a\ud800")


def test_ids_beyond_the_tokenizer_are_empty(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    padded = Vocabulary.from_tokenizer(tokenizer, 49152 + 64)
    assert padded.vocab_size == 49216
    assert padded.tokens[49152:] == [None] * 64
    with pytest.raises(ModelError, match="only 1000 rows"):
        Vocabulary.from_tokenizer(tokenizer, 1000)


def test_ids_are_the_tokenizers_own(
    smollm2_dir: Path, gemma_dir: Path, qwen_tokenizer_dir: Path, real: dict[str, Vocabulary]
) -> None:
    texts = [text for text in NATURAL if "\u0301" not in text and "\u2581" not in text] + ADDED
    for name, path in (("smollm2", smollm2_dir), ("gemma", gemma_dir), ("qwen", qwen_tokenizer_dir)):
        tokenizer = AutoTokenizer.from_pretrained(path)
        for text in texts:
            assert real[name].encode(text) == tokenizer.encode(text, add_special_tokens=False)
            assert real[name].prefix_ids + real[name].encode(text) == tokenizer.encode(text)


def test_fingerprints_differ(real: dict[str, Vocabulary], smollm2_dir: Path) -> None:
    assert len({v.fingerprint for v in real.values()}) == 3
    assert vocabulary_at(smollm2_dir).fingerprint == real["smollm2"].fingerprint


def test_bytes_round_trip(vocabulary: Vocabulary) -> None:
    @QUICK
    @given(TEXTS)
    def check(text: str) -> None:
        ids = vocabulary.encode(text)
        if without_special(vocabulary, text):
            assert vocabulary.decode(ids) == carried(vocabulary, text)
            assert b"".join(map(vocabulary.bytes_of, ids)) == vocabulary.decode(vocabulary.prefix_ids + ids)

    check()
    for text in NATURAL:
        assert vocabulary.decode(vocabulary.encode(text)) == text.encode()


def test_growing_text_equals_afresh(vocabulary: Vocabulary) -> None:
    @QUICK
    @given(TEXTS, st.lists(st.integers(0, 10_000), max_size=12))
    def check(text: str, cuts: list[int]) -> None:
        assert_grows(vocabulary, pieces_of(text, cuts))

    check()


@pytest.mark.parametrize("text", [*NATURAL, "".join(ADDED), " ".join(ADDED), "\n".join(["x" * 40] * 20)])
def test_growing_by_single_characters(vocabulary: Vocabulary, text: str) -> None:
    assert_grows(vocabulary, ["", *text])


def test_every_cut_divides_the_ids(vocabulary: Vocabulary) -> None:
    @QUICK
    @given(TEXTS)
    def check(text: str) -> None:
        assert_cuts_hold(vocabulary, text)

    check()
    assert sum(assert_cuts_hold(vocabulary, text) for text in NATURAL) > 60


def test_growing_without_the_prefix(real: dict[str, Vocabulary]) -> None:
    """A chat template writes BOS itself: it is there once, and appends know where the text begins."""
    gemma = real["gemma"]
    assert gemma.prefix_ids
    growing = GrowingText(gemma, "<bos>Hel", prefix=False)
    growing.append("lo wor")
    growing.append("ld")
    assert growing.ids == gemma.prefix_ids + gemma.encode("Hello world")


def test_a_copy_goes_its_own_way(vocabulary: Vocabulary) -> None:
    growing = GrowingText(vocabulary, "Hello wor")
    twin = growing.copy()
    twin.append("ld, and")
    growing.append("k")
    assert growing.ids == GrowingText(vocabulary, "Hello work").ids
    assert twin.ids == GrowingText(vocabulary, "Hello world, and").ids
    growing.append(" is")
    twin.append(" more")
    for one, text in ((growing, "Hello work is"), (twin, "Hello world, and more")):
        assert one.text == text
        assert one.ids == GrowingText(vocabulary, text).ids


def test_an_append_encodes_only_the_end(vocabulary: Vocabulary) -> None:
    """Not in time but in work: the cut lies within the last words of ordinary text, Chinese included."""
    for text in NATURAL[:5]:
        longest = max(n - vocabulary.cuts.last(text[: n + 1]) for n in range(20, len(text)))
        assert longest <= 24, text


def test_special_token_in_pieces(real: dict[str, Vocabulary]) -> None:
    for name, token in (("qwen", "<|im_end|>"), ("gemma", "<start_of_turn>"), ("gemma", "\n" * 9)):
        vocabulary = real[name]
        growing = GrowingText(vocabulary, "say " + token[:4])
        for char in token[4:]:
            growing.append(char)
        assert growing.ids[-1:] == vocabulary.encode(token)
        assert growing.ids == vocabulary.prefix_ids + vocabulary.encode("say " + token)


def benchmark_texts() -> Iterator[str]:
    """Records of the paper's benchmarks where they are there."""
    for path in sorted(DATA.glob("*/*")):
        if path.suffix in (".jsonl", ".json", ".csv", ".txt", ".tsv"):
            with path.open(encoding="utf-8") as lines:
                for _, line in zip(range(3), lines, strict=False):
                    yield line[:1500]


def test_growing_over_the_benchmarks(vocabulary: Vocabulary) -> None:
    for text in [*benchmark_texts(), " ".join(NATURAL)]:
        assert_grows(vocabulary, pieces_of(text, list(range(0, len(text), 7))))


@pytest.mark.parametrize(
    ("main", "assistant"), [("smollm2", "gemma"), ("gemma", "qwen"), ("qwen", "smollm2")]
)
def test_hand_over_of_any_tokens(real: dict[str, Vocabulary], main: str, assistant: str) -> None:
    """The main model may write any ids, half characters among them."""
    sender, receiver = real[main], real[assistant]
    partial = [i for i, token in enumerate(sender.tokens) if token and max(token) >= 0x80][:2000]
    ids = st.one_of(st.integers(0, sender.vocab_size - 1), st.sampled_from(partial))
    natural = st.sampled_from(NATURAL).map(sender.encode)

    @QUICK
    @given(st.lists(st.one_of(ids.map(lambda i: [i]), natural), max_size=8))
    def check(runs: list[list[int]]) -> None:
        written = [i for run in runs for i in run]
        stream, growing = Utf8Stream(), GrowingText(receiver, "Q: ")
        whole = b""
        for i in written:
            data = sender.bytes_of(i)
            whole += data
            growing.append(stream.feed(data))
        text = whole.decode("utf-8", "replace")
        if not stream.pending:
            assert growing.text == "Q: " + text
        assert growing.ids == receiver.prefix_ids + receiver.encode(growing.text)

    check()


# ---------------------------------------------------------------- characters out of bytes


@settings(QUICK, max_examples=300)
@given(st.one_of(TEXTS.map(str.encode), st.binary(max_size=40)))
def test_utf8_stream(data: bytes) -> None:
    stream = Utf8Stream()
    text = "".join(stream.feed(data[i : i + 1]) for i in range(len(data)))
    assert (text + ("\ufffd" if stream.pending else "")) == data.decode("utf-8", "replace")


def test_whole_characters() -> None:
    assert whole_characters("aé€".encode()) == "aé€"
    assert whole_characters("aé€".encode()[:-1]) == "aé"
    assert whole_characters(b"a\xffb") == "a"  # nothing is left out of the middle
    assert whole_characters(b"\x82") == ""


def test_a_copied_utf8_stream_goes_its_own_way() -> None:
    stream = Utf8Stream()
    assert stream.feed("é".encode()[:1]) == ""
    twin = stream.copy()
    assert twin.feed("é".encode()[1:]) == "é"
    assert stream.pending
    assert stream.feed("è".encode()[1:]) == "è"


def test_utf8_stream_waits() -> None:
    stream = Utf8Stream()
    assert [stream.feed(bytes([byte])) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert not stream.pending
    assert stream.feed(b"ok\xf0\x9f") == "ok"
    assert stream.pending
    assert stream.feed(b"") == ""
    assert stream.feed(b"\x99\x82!") == "🙂!"


# ---------------------------------------------------------------- other families, trained here

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASES = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASES[0]}*{_CASES[1]}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_CASES[0]}+{_CASES[1]}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LOOKS_LEFT = r"(?<= )\w+|\s+|[^\s\w]+"  # not understood: no cut is known here


def trained(tokenizer: Tokenizer, vocab_size: int = 900) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if tokenizer.decoder is None else []
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(NATURAL[:9] * 3, trainer)
    return tokenizer


def byte_level(
    *splits: pre_tokenizers.PreTokenizer, ignore_merges: bool = False, **options: bool
) -> Tokenizer:
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    own = pre_tokenizers.ByteLevel(
        add_prefix_space=options.get("add_prefix_space", False),
        use_regex=options.get("use_regex", not splits),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, own]) if splits else own
    trained(tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    rstrip = options.get("rstrip", False)
    for name in ("<|eot|>", "<s>"):
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False, rstrip=rstrip)])
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False, rstrip=rstrip)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def sentencepiece(scheme: str, *, split: bool = False, rstrip: bool = False) -> Tokenizer:
    """Llama 2's two forms: a Prepend normalizer, or a Metaspace pre-tokenizer."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split)
    trained(tokenizer)
    state = json.loads(tokenizer.to_str())  # the trainer cannot make byte tokens
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *state["model"]["vocab"]]
    state["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    for name in names[:3]:
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False, rstrip=rstrip)])
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False, rstrip=rstrip)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


SYNTHETIC = {
    "llama3": lambda: byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), ignore_merges=True),
    "o200k": lambda: byte_level(pre_tokenizers.Split(Regex(O200K), "isolated")),
    "gpt2-prefix-space": lambda: byte_level(add_prefix_space=True),
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "looks-left": lambda: byte_level(pre_tokenizers.Split(Regex(LOOKS_LEFT), "isolated")),
    "prepend": lambda: sentencepiece("prepend"),
    "metaspace-first": lambda: sentencepiece("first"),
    "metaspace-always": lambda: sentencepiece("always", split=True),
    "rstrip-sentencepiece": lambda: sentencepiece("prepend", rstrip=True),
    "rstrip-bytes": lambda: byte_level(rstrip=True),
}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_other_families(name: str) -> None:
    vocabulary = Vocabulary.from_tokenizer(SYNTHETIC[name](), name=name)
    assert vocabulary.prefix_ids == vocabulary.encode("<s>")
    assert vocabulary.cuts.incremental == (name != "looks-left")

    @settings(QUICK, max_examples=80)
    @given(
        st.lists(
            st.one_of(TEXTS, st.sampled_from(["<tag>", "<s>", " ", "<|eot|>", "</s>  ", "<t"])), max_size=4
        ),
        st.lists(st.integers(0, 10_000), max_size=8),
    )
    def check(texts: list[str], cuts: list[int]) -> None:
        text = "".join(texts)
        assert_grows(vocabulary, pieces_of(text, cuts))
        assert_cuts_hold(vocabulary, text)
        if without_special(vocabulary, text):
            assert vocabulary.decode(vocabulary.encode(text)) == text.encode()
            assert vocabulary.decode(vocabulary.prefix_ids + vocabulary.encode(text)) == text.encode()

    check()
    for text in [*NATURAL, "a<tag>  b <s> c</s>\n d <|eot|>e <tag>"]:
        assert_grows(vocabulary, ["", *text])
        assert_cuts_hold(vocabulary, text)


def with_parts(tokenizer: Tokenizer, **parts: object) -> Tokenizer:
    """The tokenizer with another normalizer or pre-tokenizer."""
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_token(tokenizer: Tokenizer, **settings: bool) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<tag2>", normalized=False, **settings)])
    return tokenizer


def ignoring_merges(tokenizer: Tokenizer) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(state))


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TRIPLE = normalizers.Replace("qqq", "q")  # of no probe
SPACES = normalizers.Replace(" ", "▁")
PAIRS = ["a1", "1a", "11", ",a", "a,", ",,", "aa", "a(", "a "]
# A splitter, and which of `PAIRS` it lets us cut.
ONE_SPLITTER = {
    "digits": (pre_tokenizers.Digits(individual_digits=True), ["a1", "1a", "11"]),
    "runs of digits": (pre_tokenizers.Digits(individual_digits=False), ["a1", "1a"]),
    "punctuation": (pre_tokenizers.Punctuation("isolated"), [",a", "a,", ",,", "a("]),
    "runs of punctuation": (pre_tokenizers.Punctuation("contiguous"), [",a", "a,", "a("]),
    "punctuation with what follows": (pre_tokenizers.Punctuation("merged_with_next"), []),
    "a string": (pre_tokenizers.Split("(", "isolated"), ["a("]),
}


@pytest.mark.parametrize("name", ONE_SPLITTER)
def test_cuts_of_one_splitter(name: str) -> None:
    splitter, cut = ONE_SPLITTER[name]
    vocabulary = Vocabulary.from_tokenizer(byte_level(splitter), name=name)
    assert [pair for pair in PAIRS if vocabulary.cuts.at(*pair)] == cut
    for text in NATURAL:
        assert_grows(vocabulary, ["", *text])
        assert_cuts_hold(vocabulary, text)


UNKNOWN = {
    "a token that must be a word": lambda: with_token(byte_level(), single_word=True),
    "bytes, normalized": lambda: with_parts(byte_level(), normalizer=TRIPLE),
    "a splitter of bytes": lambda: with_parts(
        byte_level(), pre_tokenizer=pre_tokenizers.Sequence([BYTES, pre_tokenizers.Punctuation()])
    ),
    "sentencepiece, normalized": lambda: with_parts(
        sentencepiece("prepend"), normalizer=normalizers.Sequence([SPACES, TRIPLE])
    ),
    "sentencepiece, split": lambda: with_parts(
        sentencepiece("prepend"), pre_tokenizer=pre_tokenizers.Split(",", "isolated")
    ),
    "sentencepiece without merges": lambda: ignoring_merges(sentencepiece("prepend")),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_cut_where_no_rule_is_known(name: str) -> None:
    vocabulary = Vocabulary.from_tokenizer(UNKNOWN[name](), name=name)
    assert not vocabulary.cuts.incremental
    assert_grows(vocabulary, ["", *NATURAL[0], " qqq<tag2>", "a <tag2> b"])


def test_no_cut_inside_any_token() -> None:
    """Tokens are looked at some thousand at a time."""
    may_cut = _no_token_spans([*["cd"] * 8191, "ab", "e", "fg"])
    assert [pair for pair in ("ab", "ba", "be", "cd", "dc", "ef", "fg") if may_cut(*pair)] == [
        "ba",
        "be",
        "dc",
        "ef",
    ]


def test_cuts_beside_a_token_that_takes_spaces_along() -> None:
    left = byte_level(pre_tokenizers.Punctuation("isolated"))
    left.add_special_tokens([AddedToken("<1>", special=True, normalized=False, lstrip=True)])
    right = sentencepiece("prepend", rstrip=True)
    plain = [byte_level(pre_tokenizers.Punctuation("isolated")), sentencepiece("prepend")]
    pairs = [" <", "\n\u2003"]
    for stripping, other, pair in zip((left, right), plain, pairs, strict=True):
        assert Vocabulary.from_tokenizer(other, name="plain").cuts.at(*pair)
        vocabulary = Vocabulary.from_tokenizer(stripping, name="strips")
        assert not vocabulary.cuts.at(*pair)
        for text in ("a <1>b \t<1>", "a<s>\n\u2003b <s> \n c"):
            assert_grows(vocabulary, ["", *text])
            assert_cuts_hold(vocabulary, text)


@pytest.mark.parametrize("name", ["prepend", "metaspace-first", "gpt2-prefix-space"])
def test_dummy_prefix(name: str) -> None:
    vocabulary = Vocabulary.from_tokenizer(SYNTHETIC[name](), name=name)
    ids = vocabulary.encode("the")
    assert vocabulary.tokens[ids[0]].startswith(b" ")  # type: ignore[union-attr]
    assert vocabulary.decode(ids) == b"the"
    assert vocabulary.decode(ids, continues=True) == b" the"
    assert vocabulary.encode(" the") != ids
    assert vocabulary.decode(vocabulary.encode(" the")) == b" the"


# ---------------------------------------------------------------- refusals


def normalised(step: normalizers.Normalizer) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = step
    return tokenizer


@pytest.mark.parametrize(
    ("step", "failing"),
    [
        (normalizers.Lowercase(), "Hello world"),
        (normalizers.NFKC(), "²½"),
        (normalizers.Strip(), "ok"),
        (normalizers.StripAccents(), "e\u0301"),
        (normalizers.Replace(Regex(r"\s+"), " "), r"\\t"),
    ],
)
def test_a_tokenizer_that_changes_text_is_refused(step: normalizers.Normalizer, failing: str) -> None:
    with pytest.raises(ModelError, match="model-x: text does not survive") as refused:
        Vocabulary.from_tokenizer(normalised(step), name="model-x")
    assert failing.replace("\\\\", "\\") in str(refused.value)


def test_other_models_are_refused() -> None:
    piece = Tokenizer(WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(ModelError, match="bert-like: WordPiece tokenizers cannot carry text"):
        Vocabulary.from_tokenizer(piece, name="bert-like")
    with pytest.raises(ModelError, match="Unigram"):
        Vocabulary.from_tokenizer(Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)), name="t5-like")
    with pytest.raises(ModelError, match="not a fast tokenizer"):
        Vocabulary.from_tokenizer(object(), name="slow")
    with pytest.raises(ModelError, match="neither a byte-level BPE nor"):
        Vocabulary.from_tokenizer(Tokenizer(BPE({"a": 0}, [])), name="letters")


def test_missing_bytes_are_refused() -> None:
    tokenizer = byte_level()
    state = json.loads(tokenizer.to_str())
    del state["model"]["vocab"]["É"]  # byte 0xC9
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "É" not in "".join(pair)]
    state["model"]["vocab"] = {t: i for t, i in state["model"]["vocab"].items() if "É" not in t}
    state["added_tokens"] = []
    state["post_processor"] = None
    with pytest.raises(ModelError, match="no token for the bytes 0xC9"):
        Vocabulary.from_tokenizer(Tokenizer.from_str(json.dumps(state)), name="gap")


def test_work_of_an_append_does_not_grow_with_the_text(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in characters that are encoded, by an append and by a question."""
    given: list[str] = []
    original = Vocabulary.encode_part
    monkeypatch.setattr(
        Vocabulary, "encode_part", lambda self, text, at: given.append(text) or original(self, text, at)
    )
    most = []
    for repetitions in (2, 40):
        growing = GrowingText(vocabulary, " ".join(NATURAL[:5]) * repetitions)
        given.clear()
        for word in (NATURAL[0] + NATURAL[2] + "0123456789abcdef" * 8).split():
            growing.keeps_ids(" " + word)
            growing.append(" " + word)
            growing.keeps_ids(word)
        most.append(max(map(len, given)))
        assert growing.ids == vocabulary.prefix_ids + vocabulary.encode(growing.text)
    assert most[0] == most[1] < 300


def test_a_lone_surrogate_changes_nothing(vocabulary: Vocabulary) -> None:
    growing = GrowingText(vocabulary, "Hello")
    ids = list(growing.ids)
    with pytest.raises(InputError, match="surrogate"):
        growing.append("\ud800")
    assert growing.ids == ids
    assert growing.text == "Hello"
