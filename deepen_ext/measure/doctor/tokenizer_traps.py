"""What in a member's tokenizer and configuration is known to surprise whoever joins it with others."""

from __future__ import annotations

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


def _ends(member: Member) -> list[Trap]:
    names = ", ".join(_token(member, i) for i in member.eos_ids)
    if not member.eos_ids:
        text = (
            "no token ends its text: EOS cannot be an anchor, so no assistant can end the text either; set "
            "eos_token_id in its generation_config.json, or generate with stop_strings"
        )
        return [Trap("no EOS", text, serious=True)]
    if len(member.eos_ids) > 1:
        return [
            Trap("several EOS", f"{len(member.eos_ids)} tokens end its text ({names}); they are one anchor")
        ]
    return []


def _text(member: Member) -> list[Trap]:
    vocabulary, tokenizer = member.vocabulary, member.tokenizer
    found = []
    if vocabulary.encode("a") != vocabulary.encode_part("a", 0)[0]:
        text = "its tokenizer puts a space before every text; it is put before the whole text only"
        found.append(Trap("dummy prefix", text))
    if vocabulary.encode(_DECOMPOSED) != list(tokenizer.encode(_DECOMPOSED, add_special_tokens=False)):
        text = "its tokenizer composes characters (Unicode NFC); this is left out, to keep text byte for byte"
        found.append(Trap("NFC left out", text))
    if vocabulary.lost_bytes:
        listed = " ".join(f"{byte:02X}" for byte in sorted(vocabulary.lost_bytes))
        text = f"its tokenizer drops {len(vocabulary.lost_bytes)} bytes, none of printable text: {listed}"
        found.append(Trap("lost bytes", text))
    if not vocabulary.cuts.incremental:
        text = (
            "its way of splitting text is not understood: each token of the others encodes the whole text "
            "again, which takes milliseconds a token where the text is long"
        )
        found.append(Trap("whole text again", text, serious=True))
    if not tokenizer.chat_template:
        found.append(Trap("no chat template", "chats need --without-template plain"))
    return found


def _prefix(member: Member) -> list[Trap]:
    ids = member.vocabulary.prefix_ids
    if ids:
        names = " ".join(_token(member, i) for i in ids)
        return [Trap("BOS", f"{names} stands before every text")]
    text = "nothing stands before its text; the first token of an empty prompt has nothing to follow"
    return [Trap("no BOS", text)]


def _sizes(member: Member) -> list[Trap]:
    known, size = member.vocabulary.id_bound, member.vocab_size
    found = []
    if size > known:
        text = f"{size - known} of its {size} logits have no token behind them; they never count as text"
        found.append(Trap("padding rows", text))
    if unfit := member.vocabulary.unfit:
        names = ", ".join(unfit.values())
        text = f"its {size} logits have none for {names}: left out, and their names are read as other text"
        found.append(Trap("missing rows", text))
    embedding = member.backend.embedding()
    if embedding is not None and len(embedding) != size:
        text = f"its embedding has {len(embedding)} rows for {size} logits; similarity rows need as many"
        found.append(Trap("embedding rows", text, serious=len(embedding) < size))
    return found


def _token(member: Member, token_id: int) -> str:
    return str(member.tokenizer.convert_ids_to_tokens(token_id))
