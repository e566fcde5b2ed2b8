"""What the assistants read as the prompt, where the prompt comes as the main model's ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from deepen_ext.chat import PromptText, WithoutTemplate, chat_texts
from deepen_ext.errors import InputError
from deepen_ext.member import Member
from deepen_ext.prompts import Messages, is_batch

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble


class AssistantsPrompts:
    """What the assistants read as the prompt: a chat in their own templates, or the text of the main ids."""

    def __init__(
        self,
        ensemble: Ensemble,
        messages: Messages | Sequence[Messages] | None,
        without_template: WithoutTemplate,
    ) -> None:
        self._main, *self._assistants = ensemble.members
        self._chats: list[list[PromptText]] | None = None
        if messages is not None:
            chats = cast("Sequence[Messages]", messages if is_batch(messages) else [messages])
            self._chats = [
                chat_texts(self._assistants, chat, without_template=without_template) for chat in chats
            ]

    def texts(self, rows: Sequence[Sequence[int]]) -> list[list[PromptText]]:
        """Of each row of main ids, the prompt of each assistant; rows may share a chat, as beams do."""
        if self._chats is None:
            written = [PromptText(text_of(self._main, ids)) for ids in rows]
            return [[text] * len(self._assistants) for text in written]
        if len(rows) % len(self._chats):
            raise InputError(f"there are {len(self._chats)} chats for {len(rows)} prompts; give one for each")
        copies = len(rows) // len(self._chats)
        return [chat for chat in self._chats for _ in range(copies)]


def text_of(member: Member, ids: Sequence[int]) -> str:
    """The text of a prompt's ids, without what the tokenizer puts before it, special tokens written out."""
    vocabulary, start = member.vocabulary, len(member.vocabulary.prefix_ids)
    ids = ids[start:] if list(ids[:start]) == vocabulary.prefix_ids else ids
    special = [i for i, token in enumerate(ids) if vocabulary.tokens[token] is None]
    first = special[0] if special else len(ids)
    data = vocabulary.decode(ids[:first])  # a dummy space stands at the very beginning only
    for token in ids[first:]:
        data += vocabulary.bytes_of(token) or _name_of(member, token).encode()
    return data.decode(errors="replace")


def _name_of(member: Member, token: int) -> str:
    """How a special token is written; "" where the id has no token."""
    name = member.tokenizer.convert_ids_to_tokens(token)
    return name if isinstance(name, str) else ""
