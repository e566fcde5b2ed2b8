"""The preflight of an ensemble: what its members share, what they cost, and whether fusing them pays.

The verdict is about a measured gain: bits a byte of a sample text, fused against the best single member, by
the likelihood that `nll` and `tune` use too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch

from deepen_ext.decoding.make_team import check_loaded, main_first
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError, shown
from deepen_ext.ground.numbers import whole_number
from deepen_ext.measure.doctor.coverage import coverage, mean_distribution, row_shapes
from deepen_ext.measure.doctor.diagnosis import (
    AnchorFacts,
    Diagnosis,
    Fused,
    MemberFacts,
    RowFacts,
    Speed,
    give_verdict,
    is_sure,
)
from deepen_ext.measure.doctor.draft_model import WIDTHS
from deepen_ext.measure.doctor.draft_times import SAMPLE_TOKENS, draft_times
from deepen_ext.measure.doctor.member_facts import device_memory, is_same_model, member_facts
from deepen_ext.measure.doctor.sample_text import SAMPLE_TEXT, split_sample
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.measure.likelihood.token_likelihoods import Difference, TokenLikelihoods
from deepen_ext.members.loading import Progress
from deepen_ext.members.member import Member, unique_names
from deepen_ext.members.memory import find_shortage
from deepen_ext.space.anchors import Anchors, PrefixColumns, shared_anchors
from deepen_ext.space.recipes import RECIPES

MOST_CHARACTERS = 4000  # that are read of a text: more costs time and memory, and says little more
PROMPT_CHARACTERS = 300
_PROMPTS = 4  # from different places of the sample text
_MAIN_WEIGHT = 0.8  # the weights tried beside the ensemble's own: the main model's; the others share the rest
_HOPELESS = 2.0  # times the best member's bits a byte
# An anchor's relative row that spreads over more than this share of the anchors hardly says which it is.
_UNIFORM = 0.1
_LOW_COVERAGE = 0.5  # share of a member's probability that should be on anchors


def diagnose(
    members: Sequence[Member],
    *,
    text: str | None = None,
    new_tokens: int = 16,
    batch: int = 1,
    progress: Progress | None = None,
) -> Diagnosis:
    """Examine members before they become an ensemble with the default settings.

    Members that cannot be fused are diagnosed too; `obstacle` and the verdict then say why.

    Args:
        members: two or more; the main model is the one that the default takes (see
            `Ensemble.from_pretrained`).
        text: what the models read; None for a built-in text of prose, arithmetic, code and questions. Only
            what fits every context is read, 4,000 characters at most.
        new_tokens: how many are written of each text to take the time.
        batch: how many texts are written side by side to take the time, and in the time model of drafts.
        progress: called with a line of text as each stage starts.

    Raises:
        InputError: fewer than two members or names in their place, fewer than two new tokens, no batch, a
            batch that exceeds the memory, a text that is no str, is too short to split in two or has bytes
            that some tokenizer loses.
        ModelError: a forward pass failed.
    """
    check_loaded(members)
    if len(members) < 2:
        raise InputError(
            f"a diagnosis needs two or more members, not {len(members)}; name at least two models"
        )
    members = main_first(members, {})
    new_tokens = whole_number("new_tokens", new_tokens, 2)  # the first step reads the prompt
    batch = whole_number("batch", batch, 1)
    if text is not None and not isinstance(text, str):
        raise InputError(f"text is {shown(text)}; give a text, or None for the built-in one")
    say = progress or (lambda _: None)
    whole = SAMPLE_TEXT if text is None else text
    sample = _fitting(members, whole)
    context, scored = split_sample(sample)
    prompts = _prompts(members, sample, max(new_tokens, SAMPLE_TOKENS, WIDTHS[-1]))
    _check_memory(members, prompts, batch, new_tokens)
    say("Matching vocabularies")
    anchors = _anchors(members)
    prefixes = PrefixColumns(anchors, [member.vocabulary for member in members])
    rows: tuple[RowFacts, ...] = ()
    fused: tuple[Fused, ...] = ()
    speed = drafts = ensemble = obstacle = None
    means, alone = [], []
    with TextReading(members, context, scored) as reading:
        for member in members:
            say(f"Reading the sample text with {member.name}")
            alone.append(reading.member(member))
            means.append(mean_distribution(reading.logits(member)))
        try:
            ensemble = Ensemble(members)
            say("Looking at the relative rows")
            rows = tuple(_rows(ensemble, means))
            say("Measuring the gain")
            fused = tuple(_fused(ensemble, reading, alone))
        except InputError as error:  # a diagnosis, not a failure: it is what the verdict says
            obstacle = str(error)
    if ensemble is not None and obstacle is None:
        say("Taking the time")
        speed = _speed(ensemble, prompts, batch, new_tokens)
        say("Trying drafts")
        drafts = draft_times(ensemble, prompts, speed.fusion_ms + speed.handoff_ms, lanes=batch)
    names = unique_names(members)
    facts = tuple(
        member_facts(name, member, own, coverage(anchors, prefixes, i, mean))
        for i, (name, member, own, mean) in enumerate(zip(names, members, alone, means, strict=True))
    )
    same = tuple(
        (names[i], names[j])
        for i, j in combinations(range(len(members)), 2)
        if is_same_model(members[i], members[j], alone[i], alone[j])
    )
    shared = AnchorFacts(len(anchors), tuple(_with_main(members, anchors)), anchors.eos_column is not None)
    return Diagnosis(
        members=facts,
        characters=len(sample),
        characters_given=len(whole),
        method="" if ensemble is None else ensemble.method,
        anchors=shared,
        rows=rows,
        fused=fused,
        speed=speed,
        drafts=drafts,
        memory=tuple(device_memory(members, ensemble)),
        same=same,
        obstacle=obstacle,
        warnings=tuple(_warnings(facts, rows, same)),
        verdict=give_verdict(facts, fused, same, obstacle),
    )


def _fitting(members: Sequence[Member], text: str, spare: int = 0) -> str:
    """The beginning of the text that every member can read, with `spare` tokens after it."""
    room = min(len(text), MOST_CHARACTERS)
    for member in members:
        if member.context_length is not None:
            # The last word may be cut, and have more tokens then.
            most = max(member.context_length - len(member.vocabulary.prefix_ids) - spare - 8, 1)
            ends = member.vocabulary.encode_spans(text[:room])[1]
            room = min(room, ends[most - 1]) if len(ends) > most else room
    return text[:room]


def _prompts(members: Sequence[Member], sample: str, spare: int) -> list[str]:
    """Pieces of the sample text that begin with a word, and have room for `spare` tokens after them."""
    count = max(1, min(_PROMPTS, len(sample) // PROMPT_CHARACTERS))
    words = (sample.rfind(" ", 0, i * len(sample) // count) + 1 for i in range(count))
    return [_fitting(members, sample[at : at + PROMPT_CHARACTERS], spare) for at in words]


def _check_memory(members: Sequence[Member], prompts: Sequence[str], batch: int, new_tokens: int) -> None:
    """That the batch fits the memory: seen before minutes of reading, and before a list of so many texts.

    Raises:
        InputError: it does not.
    """
    vocabularies = [member.vocabulary for member in members]
    longest = [
        len(one.prefix_ids) + max(len(one.encode(prompt)) for prompt in prompts) + new_tokens
        for one in vocabularies
    ]
    if (short := find_shortage(batch, zip(members, longest, strict=True))) is not None:
        raise InputError(f"{batch:,} texts side by side {short}; choose a smaller batch (--batch)")


def _with_main(members: Sequence[Member], anchors: Anchors) -> list[int]:
    """How many tokens each assistant shares with the main model."""
    if len(members) == 2:
        return [len(anchors)]
    return [len(_anchors([members[0], assistant])) for assistant in members[1:]]


def _anchors(members: Sequence[Member]) -> Anchors:
    """The tokens that these members share, however few."""
    return shared_anchors([one.vocabulary for one in members], [one.eos_ids for one in members], minimum=0)


def _rows(ensemble: Ensemble, means: Sequence[torch.Tensor]) -> Iterator[RowFacts]:
    for recipe in RECIPES:
        # Relative rows that only the doctor looks at are not kept on disk.
        same = recipe == ensemble.recipe
        maps = (ensemble if same else ensemble.variant(recipe=recipe, cache=False)).maps
        for i, (name, mean) in enumerate(zip(ensemble.names, means, strict=True)):
            source = maps[i].source
            assert source is not None
            of_anchors, of_others = row_shapes(ensemble.anchors, source, i, mean)
            uniform = of_anchors.effective > _UNIFORM * source.anchors
            yield RowFacts(recipe, name, of_anchors, of_others, uniform)


def _fused(ensemble: Ensemble, reading: TextReading, alone: Sequence[TokenLikelihoods]) -> Iterator[Fused]:
    """With each member as the main model, by the ensemble's own weights and with more for the main model.

    A member that is hopelessly weak by itself is not tried as the main model, unless it is the default's.
    """
    members = ensemble.members
    single = min(alone, key=lambda own: own.bits_per_byte)
    as_named: TokenLikelihoods | None = None
    for main in range(len(members)):
        if main > 0 and alone[main].bits_per_byte > _HOPELESS * single.bits_per_byte:
            continue
        order = [main, *(i for i in range(len(members)) if i != main)]
        own = ensemble if main == 0 else Ensemble([members[i] for i in order])
        others = (1 - _MAIN_WEIGHT) / (len(members) - 1)
        for weights in (None, [_MAIN_WEIGHT] + [others] * (len(members) - 1)):
            likelihood = reading.fused(own, weights)
            as_named = as_named or likelihood
            gain = Difference.of([single], [likelihood]).bits_per_byte
            over_named = Difference.of([as_named], [likelihood]).bits_per_byte
            yield Fused(
                main=ensemble.names[main],
                weights=tuple(
                    weight for _, weight in sorted(zip(order, weights or own.weights, strict=True))
                ),
                weights_rule=None if weights else own.team.weights_rule,
                as_named=likelihood is as_named,
                bits_per_byte=likelihood.bits_per_byte,
                gain=gain.value,
                gain_error=gain.error,
                beats_named=is_sure(over_named.value, over_named.error),
            )
        own.save_rows()


def _speed(ensemble: Ensemble, prompts: Sequence[str], batch: int, new_tokens: int) -> Speed:
    texts = [prompts[i % len(prompts)] for i in range(batch)]
    # Without drafts a member's forwards are of one token each, and so are the times by member.
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    timings = ensemble.generate(texts, draft=0, **length).timings
    later = timings.later_tokens
    return Speed(
        texts=batch,
        tokens=timings.tokens,
        ms_per_token=timings.ms_per_token,
        members_ms={name: ms / later for name, ms in timings.members_ms.items()},
        fusion_ms=timings.fusion_ms_per_token,
        handoff_ms=timings.handoff_ms / later,
    )


def _warnings(
    members: Sequence[MemberFacts], rows: Sequence[RowFacts], same: Sequence[tuple[str, str]]
) -> Iterator[str]:
    if len(members) > 2:  # of two the verdict says so
        for one, other in same:
            yield f"{one} and {other} are the same model: naming it twice only makes it count double"
    for recipe in dict.fromkeys(row.recipe for row in rows):
        flat = [row for row in rows if row.recipe == recipe and row.uniform]
        if flat:
            listed = ", ".join(f"{row.member} {row.anchors.effective:,.0f}" for row in flat)
            yield (
                f"the {recipe} recipe degenerates here: an anchor's row is all but uniform (spread over "
                f"{listed} anchors), so that it can hardly tell the anchors apart"
            )
    for member in members:
        own = member.coverage
        if own.anchors < _LOW_COVERAGE:
            yield (
                f"only {own.anchors:.0%} of what {member.name} says is on shared tokens; {own.prefixes:.0%} "
                f"counts for the shared token that its text begins with, {own.rest:.0%} for nothing"
            )
        yield from (f"{member.name}: {trap.text}" for trap in member.traps if trap.serious)
