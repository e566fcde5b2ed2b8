"""What in a member's tokenizer and configuration is known to surprise whoever joins it with others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deepen_ext.members.member import Member

_DECOMPOSED = "e\u0301"  # two characters that NFC makes one of


@dataclass(frozen=True)
class Trap:
    """One finding: a short name, what it means, and whether it can spoil a run."""

    name: str
    text: str
    serious: bool = False


def tokenizer_traps(member: Member) -> list[Trap]:
    """Everything worth knowing before this member takes part in an ensemble, serious findings first."""
    found = [*_ends(member), *_text(member), *_prefix(member), *_sizes(member)]
    return sorted(found, key=lambda trap: not trap.serious)


def _ends(member: Member) -> Iterator[Trap]:
    count = len(member.eos_ids)
    if count == 0:
        text = (
            "no token ends its text: EOS cannot be an anchor, so no assistant can end the text either; set "
            "eos_token_id in its generation_config.json, or generate with stop_strings"
        )
        yield Trap("no EOS", text, serious=True)
    if count > 1:
        names = ", ".join(token_names(member, member.eos_ids))
        yield Trap("several EOS", f"{count} tokens end its text ({names}); they are one anchor")


def _text(member: Member) -> Iterator[Trap]:
    vocabulary, tokenizer = member.vocabulary, member.tokenizer
    if vocabulary.encode("a") != vocabulary.encode_part("a", 0)[0]:
        text = "its tokenizer puts a space before every text; it is put before the whole text only"
        yield Trap("dummy prefix", text)
    if vocabulary.encode(_DECOMPOSED) != list(tokenizer.encode(_DECOMPOSED, add_special_tokens=False)):
        text = "its tokenizer composes characters (Unicode NFC); this is left out, to keep text byte for byte"
        yield Trap("NFC left out", text)
    if vocabulary.lost_bytes:
        listed = " ".join(f"{byte:02X}" for byte in sorted(vocabulary.lost_bytes))
        text = f"its tokenizer drops {len(vocabulary.lost_bytes)} bytes, none of printable text: {listed}"
        yield Trap("lost bytes", text)
    if not vocabulary.cuts.incremental:
        text = (
            "its way of splitting text is not understood: each token of the others encodes the whole text "
            "again, which takes milliseconds a token where the text is long"
        )
        yield Trap("whole text again", text, serious=True)
    if not tokenizer.chat_template:
        yield Trap("no chat template", "chats need --without-template plain")


def _prefix(member: Member) -> Iterator[Trap]:
    if ids := member.vocabulary.prefix_ids:
        yield Trap("BOS", f"{' '.join(token_names(member, ids))} stands before every text")
    else:
        text = "nothing stands before its text; the first token of an empty prompt has nothing to follow"
        yield Trap("no BOS", text)


def _sizes(member: Member) -> Iterator[Trap]:
    known, size = member.vocabulary.id_bound, member.vocab_size
    if size > known:
        text = f"{size - known} of its {size} logits have no token behind them; they never count as text"
        yield Trap("padding rows", text)
    if unfit := member.vocabulary.unfit:
        names = ", ".join(unfit.values())
        text = f"its {size} logits have none for {names}: left out, and their names are read as other text"
        yield Trap("missing rows", text)
    embedding = member.backend.embedding()
    if embedding is not None and len(embedding) != size:
        text = f"its embedding has {len(embedding)} rows for {size} logits; similarity rows need as many"
        yield Trap("embedding rows", text, serious=len(embedding) < size)


def token_names(member: Member, ids: Iterable[int]) -> list[str]:
    """How the tokenizer writes these tokens."""
    return [str(member.tokenizer.convert_ids_to_tokens(i)) for i in ids]
