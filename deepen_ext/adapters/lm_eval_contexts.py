"""What the harness hands on as a context: a text, perhaps too long, or a chat in the shape of a text."""

from __future__ import annotations

import json
from collections.abc import Sequence

from deepen_ext.decoding.prompts import Prompt
from deepen_ext.errors import InputError
from deepen_ext.members.chat import Message, PromptText
from deepen_ext.members.member import Member

# What a context begins with that is a chat: the harness hands on text alone, and each member has a template
# of its own. No task's text begins so, and one that does is refused, not misread.
_CHAT = "deepen-ext chat "


def write_chat(messages: Sequence[Message]) -> str:
    """A chat as a context."""
    return _CHAT + json.dumps(list(messages), ensure_ascii=False)


def read_chat(context: str) -> list[Message] | None:
    """The messages of a context that is a chat."""
    if not context.startswith(_CHAT):
        return None
    try:
        messages: list[Message] = json.loads(context.removeprefix(_CHAT))
    except (ValueError, RecursionError) as error:
        raise InputError(
            "this context is a chat with something after it, which no chat template can take: "
            f"{context[-80:]!r}. Leave --apply_chat_template out for this task"
        ) from error
    return messages


def prompt_of(members: Sequence[Member], context: str) -> Prompt:
    """The context as each member reads it: with one BOS where it begins with the member's own (`<s>`).

    So do the harness's own models.
    """
    texts = []
    for member in members:
        prefix = member.vocabulary.prefix_ids
        has_prefix = member.vocabulary.encode(context)[: len(prefix)] == prefix
        texts.append(PromptText(context, prefix=not has_prefix))
    main = members[0].vocabulary
    return Prompt((main.prefix_ids if texts[0].prefix else []) + main.encode(context), texts[1:])


def fitting(members: Sequence[Member], context: str, text: str, new_tokens: int = 0) -> str:
    """The context, without as much of its beginning as is too long for some member.

    Raises:
        InputError: the text alone is too long.
    """
    for member in members:
        others = len(member.vocabulary.prefix_ids) + new_tokens
        room = (member.context_length or 0) - others
        # No token is shorter than a byte, but for a dummy space: most texts need not be encoded to be sure.
        while not member.fits(len((context + text).encode()) + 1 + others):
            ends = member.vocabulary.encode_spans(context + text)[1]
            if member.fits(len(ends) + others):
                break
            if room < 1 or ends[-room - 1] > len(context) or not context:
                raise InputError(
                    f"{member.name}: its context of {member.context_length} tokens is too short for "
                    f"{f'{new_tokens} new tokens' if new_tokens else f'the text {text[:60]!r}'}"
                )
            context = context[max(ends[-room - 1], 1) :]
    return context
