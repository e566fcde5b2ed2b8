"""What a member is and takes by itself, and whether two members are the same model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from deepen_ext.ensemble import Ensemble
from deepen_ext.measure.doctor.coverage import Coverage
from deepen_ext.measure.doctor.diagnosis import DeviceMemory, MemberFacts
from deepen_ext.measure.doctor.tokenizer_traps import token_names, tokenizer_traps
from deepen_ext.measure.likelihood.token_likelihoods import Score, TokenLikelihoods
from deepen_ext.members.member import Member
from deepen_ext.members.memory import available_bytes
from deepen_ext.space.relative_map import RelativeMap

# Nats a token by which the predictions of one model may differ: by rounding, and in two bytes.
_ROUNDING, _ROUNDING_OF_TWO_BYTES = 1e-3, 0.05


def member_facts(name: str, member: Member, own: TokenLikelihoods, share: Coverage) -> MemberFacts:
    """Everything about one member: `own` is its likelihood of the sample text."""
    model = member.backend.describe()
    return MemberFacts(
        name=name,
        backend=model.backend,
        architecture=model.architecture,
        parameters=model.parameters,
        non_embedding_parameters=model.non_embedding_parameters,
        dtype=model.dtype,
        device=str(member.device),
        tokenizer=member.vocabulary.kind,
        vocab_size=member.vocab_size,
        context_length=member.context_length,
        end_tokens=tuple(token_names(member, member.eos_ids)),
        weights_bytes=model.weights_bytes,
        cache_bytes=model.cache_bytes,
        bytes_per_token=own.nbytes / len(own.logprobs),
        bits_per_byte=own.bits_per_byte,
        bits_per_byte_error=Score.of([own]).bits_per_byte.error,
        coverage=share,
        traps=tuple(tokenizer_traps(member)),
    )


def device_memory(members: Sequence[Member], ensemble: Ensemble | None) -> Iterator[DeviceMemory]:
    """What is taken on each device; a member that is named twice as one object is there once."""
    each = {id(member.backend): member for member in members}.values()
    facts = [(member.device, member.backend.describe()) for member in each]
    for device in dict.fromkeys(member.device for member in members):
        maps = ensemble.maps if ensemble is not None and ensemble.device == device else []
        yield DeviceMemory(
            device=str(device),
            weights_bytes=sum(one.weights_bytes or 0 for where, one in facts if where == device),
            rows_bytes=sum(_rows_bytes(one) for one in maps),
            cache_bytes=sum(one.cache_bytes or 0 for where, one in facts if where == device),
            available_bytes=available_bytes(device),
        )


def _rows_bytes(relative: RelativeMap) -> int:
    """Bytes of the relative rows that are known: the pages of others are not taken yet."""
    rows = relative.rows
    parts = (part for part in (rows.columns, rows.values, rows.rest) if part is not None)
    return sum(part.nbytes for part in parts) * relative.rows_known // relative.vocab_size


def is_same_model(a: Member, b: Member, of_a: TokenLikelihoods, of_b: TokenLikelihoods) -> bool:
    """Whether two members are the same model: by tokenizer, weights and predictions.

    Weights are compared in the coarser dtype of the two, so that copies in other precisions are found, and
    predictions too, because a configuration can differ where all weights are equal.
    """
    if a.backend is b.backend:
        return True
    if a.vocabulary.tokens != b.vocabulary.tokens or a.vocabulary.fingerprint != b.vocabulary.fingerprint:
        return False
    dtypes = [getattr(torch, one.backend.describe().dtype or "", torch.float32) for one in (a, b)]
    coarse = min(dtypes, key=lambda dtype: (dtype.itemsize, -torch.finfo(dtype).eps))
    apart = sum(abs(x - y) for x, y in zip(of_a.logprobs, of_b.logprobs, strict=True)) / len(of_a.logprobs)
    if apart > (_ROUNDING if coarse.itemsize > 2 else _ROUNDING_OF_TWO_BYTES):
        return False
    return a.backend.fingerprint(coarse) == b.backend.fingerprint(coarse)
