"""What `doctor` found out about some members, and the verdict that follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from deepen_ext.measure.doctor.coverage import Coverage, RowShape
from deepen_ext.measure.doctor.draft_times import DraftTimes
from deepen_ext.measure.doctor.tokenizer_traps import Trap

Outcome = Literal["worth fusing", "little to gain", "not worth fusing"]

SURE = 2.0  # standard errors that a difference has to exceed
WORTHWHILE = 0.01  # share of the best single member's bits a byte that a gain should reach


@dataclass(frozen=True)
class MemberFacts:
    """One member by itself.

    Attributes:
        backend: what computes it, such as "transformers 5.23.0".
        architecture: the model's family, such as "llama".
        parameters: how many; as the next one, the dtype, the weights and the cache None where the backend
            cannot know.
        non_embedding_parameters: of them outside of the embeddings: the default's weights start from these.
        tokenizer: "byte_level" or "sentencepiece".
        vocab_size: logits, padding included.
        context_length: positions; None where the config does not say.
        end_tokens: names of the tokens that end its text.
        weights_bytes: parameters and buffers.
        cache_bytes: KV cache of one text of 1,000 tokens.
        bytes_per_token: of the sample text.
        bits_per_byte: of the sample text by this member alone, and the standard error (None: text too short).
        coverage: where its probability lies.
    """

    name: str
    backend: str
    architecture: str
    parameters: int | None
    non_embedding_parameters: int | None
    dtype: str | None
    device: str
    tokenizer: str
    vocab_size: int
    context_length: int | None
    end_tokens: tuple[str, ...]
    weights_bytes: int | None
    cache_bytes: int | None
    bytes_per_token: float
    bits_per_byte: float
    bits_per_byte_error: float | None
    coverage: Coverage
    traps: tuple[Trap, ...]


@dataclass(frozen=True)
class AnchorFacts:
    """The tokens that all members share.

    Attributes:
        shared: how many tokens.
        with_main: for each assistant, how many tokens it shares with the main model.
        end: whether the end of the text is an anchor.
    """

    shared: int
    with_main: tuple[int, ...]
    end: bool


@dataclass(frozen=True)
class RowFacts:
    """A member's relative rows under a recipe; `uniform`: an anchor's row hardly tells it from the others."""

    recipe: str
    member: str
    anchors: RowShape
    others: RowShape | None
    uniform: bool


@dataclass(frozen=True)
class Fused:
    """The fused distribution on the sample text.

    Attributes:
        main: the main model's name.
        weights: of the members, in the order of `Diagnosis.members`.
        weights_rule: where a rule found them for the text, its name, and the weights are those to start from.
        as_named: whether this is the main model of the default, with the ensemble's own weights.
        bits_per_byte: of the sample text.
        gain: how many bits a byte fewer than the best single member, above 0 where fusing is better.
        gain_error: standard error of the gain over blocks of text; None where the text is too short.
        beats_named: whether it needs fewer bits than the ensemble as named, beyond the error.
    """

    main: str
    weights: tuple[float, ...]
    weights_rule: str | None
    as_named: bool
    bits_per_byte: float
    gain: float
    gain_error: float | None
    beats_named: bool

    @property
    def gains(self) -> bool:
        """Whether the gain is beyond the error."""
        return is_sure(self.gain, self.gain_error)

    @property
    def harms(self) -> bool:
        """Whether the loss is beyond the error."""
        return is_sure(-self.gain, self.gain_error)


@dataclass(frozen=True)
class Speed:
    """A short run without drafts and without certified skip: milliseconds a token of each text.

    Attributes:
        texts: how many were written side by side.
        tokens: how many were written, over all texts.
        ms_per_token: as the rest without the step that reads the prompts.
        members_ms: forwards, by member.
        fusion_ms: top-k, relative rows, search.
        handoff_ms: bytes, re-tokenisation.
    """

    texts: int
    tokens: int
    ms_per_token: float
    members_ms: dict[str, float]
    fusion_ms: float
    handoff_ms: float


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device: weights, relative rows computed so far, KV caches of a text of 1,000 tokens."""

    device: str
    weights_bytes: int
    rows_bytes: int
    cache_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Verdict:
    """The outcome and why, in a sentence or two."""

    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `diagnose` found out.

    Attributes:
        members: the default's main model first, the others in the order they were named.
        characters: how many characters of the sample text were read.
        characters_given: how many characters the sample text has.
        method: how the ensemble fuses.
        anchors: the shared tokens.
        rows: by recipe and member; empty where the members cannot be fused.
        fused: by main model and weights, as named first; without main models that by themselves are far
            weaker than the best member; empty where the members cannot be fused.
        speed: None where the members cannot be fused.
        drafts: what drafts are expected to bring; None where the members cannot be fused.
        memory: by device.
        same: pairs of members that are the same model.
        obstacle: why the members cannot be fused, or None.
        warnings: what to look at before a run.
        verdict: whether to fuse them.
    """

    members: tuple[MemberFacts, ...]
    characters: int
    characters_given: int
    method: str
    anchors: AnchorFacts
    rows: tuple[RowFacts, ...]
    fused: tuple[Fused, ...]
    speed: Speed | None
    drafts: DraftTimes | None
    memory: tuple[DeviceMemory, ...]
    same: tuple[tuple[str, str], ...]
    obstacle: str | None
    warnings: tuple[str, ...]
    verdict: Verdict

    @property
    def best_single(self) -> MemberFacts:
        """The member with the fewest bits a byte."""
        return best_single(self.members)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the same names; bytes, milliseconds and bits a byte as they are."""
        return asdict(self)


def is_sure(difference: float, error: float | None) -> bool:
    """Whether a difference is above 0 beyond the error."""
    return difference == math.inf or (error is not None and difference > SURE * error)


def with_error(value: float, error: float | None) -> str:
    """For readers."""
    return f"{value:.3f} ± " + ("?" if error is None else f"{error:.3f}")


def best_single(members: Sequence[MemberFacts]) -> MemberFacts:
    """The member with the fewest bits a byte."""
    return min(members, key=lambda member: member.bits_per_byte)


def give_verdict(
    members: Sequence[MemberFacts],
    fused: Sequence[Fused],
    same: Sequence[tuple[str, str]],
    obstacle: str | None,
) -> Verdict:
    """Whether to fuse, from what was measured.

    Worth fusing is what beats the best single member by more than two standard errors and by one hundredth.
    The members as named count first; another main model or other weights are only recommended.
    """
    best = best_single(members)
    if len(same) == len(members) * (len(members) - 1) // 2:
        names = " and ".join(member.name for member in members)
        return Verdict(
            "not worth fusing",
            f"Not worth fusing: {names} are the same model (same tokenizer, same weights), so "
            "there is nothing to gain.",
        )
    if obstacle is not None:
        return Verdict("not worth fusing", f"Not worth fusing: these members cannot be fused. {obstacle}.")
    named = next(one for one in fused if one.as_named)
    first = min(fused, key=lambda one: one.bits_per_byte)
    found = f", at {first.bits_per_byte:.3f}: {_setting(first, members)}."
    hint = f" Better than as named{found}" if first.beats_named else ""
    enough = WORTHWHILE * best.bits_per_byte
    if named.gains and named.gain >= enough:
        return Verdict("worth fusing", f"Worth fusing: {_measured(named, best)}.{hint}")
    if first.gains and first.gain >= enough:
        text = f"Worth fusing with {_setting(first, members)}: {_measured(first, best)}."
        return Verdict(
            "worth fusing", f"{text} As named it is {named.bits_per_byte:.3f}, {_compared(named)}."
        )
    if named.harms:
        text = f"Not worth fusing: {_measured(named, best)}. Use {best.name} alone."
        if hint and first.gain > 0:  # or it would be better than as named, and worse than what is advised
            text += f" A little better still{found}"
        return Verdict("not worth fusing", text)
    return Verdict("little to gain", f"Little to gain: {_measured(named, best)}.{hint}")


def _measured(one: Fused, best: MemberFacts) -> str:
    return (
        f"on the sample text the ensemble needs {one.bits_per_byte:.3f} bits a byte, {_compared(one)} than "
        f"{best.name} alone ({best.bits_per_byte:.3f})"
    )


def _compared(one: Fused) -> str:
    return with_error(abs(one.gain), one.gain_error) + (" fewer" if one.gain >= 0 else " more")


def _setting(one: Fused, members: Sequence[MemberFacts]) -> str:
    if one.weights_rule is not None:
        return f"{one.main} as the main model (named first, with --fuser follow)"
    weights = " and ".join(
        f"{weight:.2g} for {member.name}" for member, weight in zip(members, one.weights, strict=True)
    )
    return f"{one.main} as the main model and weights of {weights}"
