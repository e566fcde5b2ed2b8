"""What a run can be seen to lack before anything is computed: context, memory, capabilities, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepen_ext.decoding.settings import Settings
from deepen_ext.decoding.team import Team
from deepen_ext.decoding.text_in_progress import TextInProgress
from deepen_ext.errors import InputError
from deepen_ext.fusers import Fuser
from deepen_ext.members.memory import Held, find_shortage


class NoRoom(InputError):
    """The memory that is free does not hold a run with its longest texts.

    Attributes:
        why: the same without advice.
        advice: what to do.
    """

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(why, advice)  # both of them: so that it can be pickled
        self.why = why
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.why}; {self.advice}"


def check_main_model(team: Team, settings: Settings) -> None:
    """That what picks the tokens can do with what the main model says.

    Of a main model without logits only its most probable tokens are known: greedy decoding works, and
    sampling among those.

    Raises:
        InputError: it cannot; the message says what to change.
    """
    capabilities = team.main.backend.capabilities
    if capabilities.logits:
        return
    name = team.main.name
    known = min(team.fuser.candidates, capabilities.max_topk or team.fuser.candidates)
    if (unfit := settings.processors_of_all_scores()) is not None:
        raise InputError(
            f"{name}: {unfit} needs the capability 'logits' of the main model, and its backend has only the "
            "most probable tokens; leave the setting out, or run this member in process"
        )
    if settings.do_sample and not 0 < settings.top_k <= known:
        raise InputError(
            f"{name}: sampling from all tokens needs the capability 'logits' of the main model, and its "
            f"backend has only the {known} most probable tokens; set top_k to 1 to {known}"
        )


def check_choice(team: Team, settings: Settings) -> None:
    """That the fuser goes with how tokens are picked.

    Raises:
        InputError: greedy decoding of a fuser that draws; of one that chooses words anything else.
    """
    check_sampling(type(team.fuser), team.method, settings.do_sample)
    if team.fuser.spans and (asked := settings.processors([0])):
        raise _picks_tokens(team.method, type(asked[0]).__name__, "the setting")


def check_sampling(kind: type[Fuser], method: str, do_sample: bool) -> None:
    """The part of `check_choice` that needs no models.

    Args:
        kind: the fuser's class.
        method: what messages call it.
        do_sample: whether tokens are drawn.

    Raises:
        InputError: greedy decoding of a fuser that draws; sampling by one that chooses words.
    """
    if kind.draws and not do_sample:
        raise InputError(
            f"fuser='{method}' is a way to sample; set do_sample=True (--sample), or for greedy decoding use "
            "fuser='union-vocab', whose average it samples from"
        )
    if kind.spans and do_sample:
        raise _picks_tokens(method, "do_sample", "do_sample (--sample)")


def _picks_tokens(method: str, what: str, setting: str) -> InputError:
    return InputError(
        f"fuser='{method}' writes whole words, the most probable ones, and {what} picks single "
        f"tokens in another way; leave {setting} out, or use another fuser"
    )


def check_lengths(
    team: Team,
    texts: Mapping[int, TextInProgress],
    tokens: Mapping[int, Sequence[int]],
    at_once: int,
    held: Held | None,
    used: int | None = None,
    kept: Sequence[Sequence[int]] = (),
) -> None:
    """That every prompt with its new tokens fits every member's context, and the batch the memory.

    Args:
        team: the members.
        texts: of the run, by number.
        tokens: of each text, how many tokens its prompt has for each assistant.
        at_once: how many texts are written side by side.
        held: bytes by device that sessions of a member with so many lanes hold already.
        used: how many of the lanes hold states; None for all.
        kept: of each lane that holds a text which has ended, how many tokens each member has there.

    Raises:
        NoRoom: the memory does not hold them.
        InputError: a text exceeds a context, or gives a member no tokens at all.
    """
    longest = [max(lengths) for lengths in zip(*kept, strict=True)] or [0] * len(team.members)
    for number, text in texts.items():
        new, lengths = text.new_tokens, [text.prompt_length, *tokens[number]]
        for i, (member, length) in enumerate(zip(team.members, lengths, strict=True)):
            longest[i] = max(longest[i], length + new)
            if length == 0:
                which = "the prompt" if len(texts) == 1 else f"prompt {number}"
                raise InputError(
                    f"{member.name}: {which} gives no tokens: it has no text, or none that its tokenizer has "
                    "tokens for; give some text to continue"
                )
            if not member.fits(length + new):
                which = f"the prompt's {length}" if len(texts) == 1 else f"prompt {number}'s {length}"
                limit = member.context_length or 0
                fewer = f" or ask for at most {limit - length}" if limit > length else ""
                raise InputError(
                    f"{member.name}: {which} tokens and {new} new ones exceed its context of {limit}; "
                    f"shorten the prompt{fewer}"
                )
    of_members = zip(team.members, longest, strict=True)
    if (short := find_shortage(at_once, of_members, held, used)) is not None:
        fewer = "choose a smaller batch_size, or " if at_once > 1 else ""
        raise NoRoom(
            f"{used or at_once} prompts at a time, with their new tokens up to {max(longest)} long, {short}",
            f"{fewer}ask for fewer new tokens",
        )
