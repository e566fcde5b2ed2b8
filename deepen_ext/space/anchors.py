"""Which tokens the members share, by their bytes, and which anchor any other token begins with."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepen_ext.errors import InputError
from deepen_ext.text.characters import whole_characters
from deepen_ext.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Anchors:
    """The shared tokens of n members, main model first, as A columns of the relative space.

    Attributes:
        token_ids: per member, int64 [A]: the token that stands for each anchor. Column `a` of all members is
            the same byte string, or the end of the text (EOS). Ascending in the main model's ids.
        columns: per member, int32 [V_i]: the column a token stands for, else -1. Tokens with equal bytes
            (`<0x41>` and `A`) have the same column, and so have all EOS ids of a member.
        eos_column: the column of EOS; None if some member has no EOS id.
        fingerprint: sha256 (hex) of the above.
    """

    token_ids: tuple[torch.Tensor, ...]
    columns: tuple[torch.Tensor, ...]
    eos_column: int | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.token_ids[0])


def shared_anchors(
    vocabularies: Sequence[Vocabulary], eos_ids: Sequence[Sequence[int]], *, minimum: int = 100
) -> Anchors:
    """The tokens that all members have, compared by bytes, plus EOS by its role.

    Where several tokens of a member have the same bytes, `token_ids_of` says which of them is the anchor.

    Args:
        vocabularies: main model first; two or more.
        eos_ids: per member, the ids that end its text; may be empty. The first id is the anchor.
        minimum: fewer anchors than this are refused: the relative space would say too little.

    Raises:
        InputError: fewer than two members, fewer than `minimum` anchors, or EOS ids outside a vocabulary.
    """
    if len(vocabularies) < 2 or len(eos_ids) != len(vocabularies):
        raise InputError(
            f"anchors need two or more vocabularies and EOS ids for each: "
            f"got {len(vocabularies)} and {len(eos_ids)}"
        )
    for vocabulary, ids in zip(vocabularies, eos_ids, strict=True):
        if outside := [i for i in ids if not 0 <= i < vocabulary.vocab_size]:
            raise InputError(
                f"{vocabulary.name}: EOS ids {outside} are outside its {vocabulary.vocab_size} tokens; "
                "correct eos_token_id in its generation_config.json"
            )

    key = (tuple(one.fingerprint for one in vocabularies), tuple(map(tuple, eos_ids)))
    with _knowing:
        if (known := _known.get(key)) is None:
            if len(_known) >= _MOST_KNOWN:
                del _known[next(iter(_known))]
            known = _known[key] = _find(vocabularies, eos_ids)
    if len(known) < minimum:
        names = ", ".join(vocabulary.name for vocabulary in vocabularies)
        raise InputError(
            f"{names} share only {len(known)} tokens, and at least {minimum} are needed; "
            "choose members of closer vocabularies"
        )
    return known


# The last ones found, by fingerprints and EOS ids: the same members are often fused in several ways, one
# after the other. To find them takes 0.2 s, to keep them some 3 MB each.
_known: dict[tuple[tuple[str, ...], tuple[tuple[int, ...], ...]], Anchors] = {}
_MOST_KNOWN = 8
_knowing = threading.Lock()  # ensembles may be made in several threads


def _find(vocabularies: Sequence[Vocabulary], eos_ids: Sequence[Sequence[int]]) -> Anchors:
    shared = set.intersection(*map(_texts, vocabularies, eos_ids))
    anchor_ids = [token_ids_of(*member, shared) for member in zip(vocabularies, eos_ids, strict=True)]
    order: list[bytes | None] = [*sorted(shared, key=anchor_ids[0].__getitem__)]
    eos_column = None
    if all(eos_ids):  # None stands for EOS in `order`
        eos_column = sum(anchor_ids[0][text] < eos_ids[0][0] for text in shared)
        order.insert(eos_column, None)
    token_ids = tuple(
        torch.tensor(
            [eos[0] if text is None else ids[text] for text in order], dtype=torch.int64, device="cpu"
        )
        for ids, eos in zip(anchor_ids, eos_ids, strict=True)
    )

    column_of = {text: column for column, text in enumerate(order) if text is not None}
    columns = []
    for vocabulary, ids in zip(vocabularies, eos_ids, strict=True):
        found = [column_of.get(text, -1) if text else -1 for text in vocabulary.tokens]
        column = torch.tensor(found, dtype=torch.int32, device="cpu")
        column[list(ids)] = -1 if eos_column is None else eos_column
        columns.append(column)

    digest = hashlib.sha256(f"{len(vocabularies)} {len(order)} {eos_column} ".encode())
    for tensor in (*token_ids, *columns):
        digest.update(tensor.numpy().tobytes())
    return Anchors(token_ids, tuple(columns), eos_column, digest.hexdigest())


def _texts(vocabulary: Vocabulary, eos_ids: Sequence[int]) -> set[bytes]:
    """The byte strings of the tokens that have text; an EOS token has a role instead."""
    ends = set(eos_ids)
    return {text for i, text in enumerate(vocabulary.tokens) if text and i not in ends}


def token_ids_of(vocabulary: Vocabulary, eos_ids: Sequence[int], texts: set[bytes]) -> dict[bytes, int]:
    """The id of the token of each of these byte strings; a byte string that is no token is left out.

    EOS tokens do not count. Where several tokens have the same bytes (`<0x31>` and `1`), the id is that of
    the token that the tokenizer itself gives for the text, or the lowest id if it gives none of them alone.
    """
    ends = set(eos_ids)
    ids: dict[bytes, int] = {}
    repeated: dict[bytes, set[int]] = {}
    for i, text in enumerate(vocabulary.tokens):
        if text in texts and i not in ends:
            first = ids.setdefault(text, i)
            if first != i:
                repeated.setdefault(text, {first}).add(i)
    for text, candidates in repeated.items():
        if whole := whole_characters(text):
            own = vocabulary.encode_part(whole, 0)[0]
            if len(own) == 1 and own[0] in candidates:
                ids[text] = own[0]
    return ids


def first_token(vocabulary: Vocabulary, data: bytes) -> int | None:
    """The first token of the vocabulary's tokenisation of the bytes; None if the bytes do not begin with it.

    Bytes that begin in the middle of a UTF-8 character have none either.
    """
    if not (text := whole_characters(data)):
        return None
    ids = vocabulary.encode_part(text, 0)[0]
    token = vocabulary.tokens[ids[0]] if ids else None
    return ids[0] if token and data.startswith(token) else None


class PrefixColumns:
    """The anchor that a token begins with: what a token that is not shared says about the next main token.

    A token of an assistant: the main model tokenises the token's bytes. The first token that comes out is
    what the main model would have to produce next. If it is an anchor, its column is the answer; if it is not
    shared either, the answer is the column of the anchor that it begins with.

    A token of the main model: the main model would tokenise its bytes as the token itself, so the first
    assistant (member 1) tokenises them. If the first token that comes out is an anchor, its column is the
    answer, otherwise the column of the longest anchor that the bytes begin with.

    The longest anchor that the bytes begin with is also the answer where no tokenizer can tell: the bytes
    begin in the middle of a UTF-8 character, or the first token is not the beginning of the bytes (a special
    token's name written as text). Special tokens have no bytes and no column.

    A column takes 10 to 20 µs. Nothing is computed ahead but a dictionary of the anchors (about 5 MB).
    """

    def __init__(self, anchors: Anchors, vocabularies: Sequence[Vocabulary]) -> None:
        self._vocabularies = list(vocabularies)
        self._columns = [columns.numpy() for columns in anchors.columns]
        tokens = vocabularies[0].tokens
        texts = (tokens[i] for i in anchors.token_ids[0].tolist())
        self._column_of = {
            text: column for column, text in enumerate(texts) if text and column != anchors.eos_column
        }
        self._longest = max(map(len, self._column_of), default=0)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the members' tokenizers: what the columns depend on besides the anchors."""
        return hashlib.sha256(" ".join(one.fingerprint for one in self._vocabularies).encode()).hexdigest()

    def column(self, member: int, token_id: int) -> int:
        """The column that a token begins with (an anchor's own), or -1; `member` is the member index."""
        own = int(self._columns[member][token_id])
        data = self._vocabularies[member].tokens[token_id]
        if own >= 0 or not data:
            return own
        first = first_token(self._vocabularies[1 if member == 0 else 0], data)
        if first is not None and member != 0:
            return self.column(0, first)
        if first is not None and (column := int(self._columns[1][first])) >= 0:
            return column
        beginnings = (data[:length] for length in range(min(len(data), self._longest), 0, -1))
        return next((self._column_of[text] for text in beginnings if text in self._column_of), -1)
