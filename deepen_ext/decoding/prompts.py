"""What a generation starts from: texts or chats, as the main model's tokens and the assistants' texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from deepen_ext.errors import InputError
from deepen_ext.members.chat import Message, PromptText, WithoutTemplate, chat_texts, check_without_template
from deepen_ext.members.member import Member

Messages: TypeAlias = Sequence[Message]


@dataclass(frozen=True)
class Prompt:
    """A text's beginning: the main model's tokens, and the text that each assistant reads.

    `unfinished` is what the tokens have of a character after that text.
    """

    main_ids: list[int]
    texts: list[PromptText]
    unfinished: bytes = b""


Prompts: TypeAlias = str | Messages | Sequence[str] | Sequence[Messages] | Sequence[Prompt]


def is_batch(prompt: Prompts) -> bool:
    """Whether it is a list of prompts, and not one text or one chat."""
    return not isinstance(prompt, str | bytes) and not (
        isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
    )


def read_prompts(
    members: Sequence[Member], prompt: Prompts, without_template: WithoutTemplate = "error"
) -> list[Prompt]:
    """The prompts of a batch, one where there is one prompt.

    Raises:
        InputError: no prompt, an empty one, a chat that a member's template does not take, or no such
            `without_template`.
    """
    check_without_template(without_template)
    if not is_batch(prompt):
        return [_read(members, prompt, without_template, "the prompt")]
    if not isinstance(prompt, Sequence):
        raise InputError(
            f"the prompt is a {type(prompt).__name__}; give a text, a chat, or a list of them "
            "(of a generator list(...))"
        )
    if not prompt:
        raise InputError("there is no prompt; give a text, a chat, or a list of them")
    return [_read(members, one, without_template, f"prompt {i}") for i, one in enumerate(prompt)]


def _read(members: Sequence[Member], prompt: object, without_template: WithoutTemplate, name: str) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        if not prompt:
            raise InputError(f"{name} is empty; give some text to continue")
        texts = [PromptText(prompt)] * len(members)
    elif isinstance(prompt, bytes):
        raise InputError(f"{name} is bytes; give a text, prompt.decode()")
    elif isinstance(prompt, Sequence) and prompt:
        texts = chat_texts(members, prompt, without_template=without_template)
    else:
        raise InputError(f"{name} is {prompt!r}; give a text, or a chat (a list of messages)")
    main, own = members[0].vocabulary, texts[0]
    return Prompt((main.prefix_ids if own.prefix else []) + main.encode(own.text), texts[1:])
