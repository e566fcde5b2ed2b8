"""What an evaluation can be seen to lack before anything is run: context for a prompt, memory for a batch."""

from __future__ import annotations

from collections.abc import Sequence

from deepen_ext.errors import InputError
from deepen_ext.evaluation.jobs import Job
from deepen_ext.graphs import idle_bytes
from deepen_ext.member import Member
from deepen_ext.memory import Shortage, estimate_bytes, find_shortage


def check_contexts(job: Job, members: Sequence[Member]) -> None:
    """That every prompt with its new tokens fits every member.

    No token has less than a byte, so most prompts need not be tokenised for that.

    Raises:
        InputError: one does not.
    """
    for member in members:
        limit, prefix = member.context_length, len(member.vocabulary.prefix_ids)
        if limit is None:
            continue
        room = limit - prefix - job.task.max_new_tokens
        for item in job.items:
            if len(item.prompt.encode()) <= room or (n := len(member.vocabulary.encode(item.prompt))) <= room:
                continue
            raise InputError(
                f"{job.task.name}, item {item.index}: the prompt's {prefix + n} tokens of {member.name} and "
                f"{job.task.max_new_tokens} new ones exceed its context of {limit}; leave out the task, or "
                "take another model"
            )


def check_memory(job: Job, members: Sequence[Member], batch_size: int) -> None:
    """That the members' caches fit the memory side by side, for the batch with the longest prompt.

    Raises:
        InputError: they do not; it says which batch size would.
    """
    sizes = [len(item.prompt.encode()) for item in job.items]
    place = max(range(len(sizes)), key=lambda one: sizes[one])
    rows = min(batch_size, len(sizes) - place // batch_size * batch_size)
    prompt = job.items[place].prompt
    tokens = [
        len(one.vocabulary.prefix_ids) + len(one.vocabulary.encode(prompt)) + job.task.max_new_tokens
        for one in members
    ]

    def shortage(rows: int) -> Shortage | None:
        return find_shortage(
            (one.device, max(estimate_bytes(one, rows, length) - idle_bytes(one), 0))
            for one, length in zip(members, tokens, strict=True)
        )

    if (short := shortage(rows)) is None:
        return
    fitting = next((fewer for fewer in range(rows - 1, 0, -1) if shortage(fewer) is None), 0)
    advice = f"choose a batch size of {fitting} or less (--batch-size)" if fitting else "leave out the task"
    raise InputError(
        f"{job.task.name}: {rows} prompts at a time, with their new tokens up to {max(tokens)} long, "
        f"{short}; {advice}"
    )
