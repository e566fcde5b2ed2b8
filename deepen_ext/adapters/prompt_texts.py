"""What the assistants read as the prompt, where the prompt comes as the main model's ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from deepen_ext.decoding.prompt_ids import text_of, written
from deepen_ext.decoding.prompts import Messages, is_batch
from deepen_ext.errors import InputError, shown
from deepen_ext.members.chat import PromptText, WithoutTemplate, chat_texts, check_without_template
from deepen_ext.members.member import Member


class AssistantsPrompts:
    """What the assistants read as the prompt: a chat in their own templates, or the text of the main ids."""

    def __init__(
        self,
        members: Sequence[Member],
        messages: Messages | Sequence[Messages] | None,
        without_template: WithoutTemplate,
    ) -> None:
        check_without_template(without_template)
        self._main, *self._assistants = members
        self._chats: list[list[PromptText]] | None = None
        if messages is not None and not isinstance(messages, Sequence):
            raise InputError(f"messages is {shown(messages)}; give a chat, or a list of chats")
        if messages is not None:
            chats = cast("Sequence[Messages]", messages if is_batch(messages) else [messages])
            self._chats = [
                chat_texts(self._assistants, chat, without_template=without_template) for chat in chats
            ]

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """That texts which share a chat, as beams do, have one prompt.

        Args:
            prompts: the main model's ids of each text, without padding.

        Raises:
            InputError: a chat is that of two prompts.
        """
        if self._chats is None or len(prompts) % len(self._chats):  # `read` refuses the latter
            return
        share = len(prompts) // len(self._chats)
        for i, prompt in enumerate(prompts):
            if list(prompt) != list(prompts[i - i % share]):
                raise InputError(
                    f"prompts {i - i % share} and {i} differ, but `messages` has one chat for both; give a "
                    "list of chats, one for each"
                )

    def read(
        self, i: int, count: int, prompt: Sequence[int], later: Sequence[int] = ()
    ) -> tuple[list[PromptText], bytes]:
        """What each assistant reads of one text: a prompt, and the bytes that go on from it.

        The bytes are what there is of an unfinished character, and in a chat what was written since. Without
        chats it does not matter where the prompt ends.

        Args:
            i: the text's number in the batch.
            count: how many texts there are; several may share a chat, as beams do.
            prompt: the main model's ids, without padding.
            later: those written since.

        Raises:
            InputError: the chats are not one for each prompt.
        """
        if self._chats is None:
            text, rest = text_of(self._main, [*prompt, *later])
            return [PromptText(text)] * len(self._assistants), rest
        if count % len(self._chats):
            raise InputError(f"there are {len(self._chats)} chats for {count} prompts; give one for each")
        return self._chats[i * len(self._chats) // count], written(self._main, later)


def check_not_empty(prompts: Sequence[Sequence[object]]) -> None:
    """Raises InputError where a prompt is nothing but padding."""
    for i, ids in enumerate(prompts):
        if not ids:
            raise InputError(f"prompt {i} is empty; give some text to continue")
