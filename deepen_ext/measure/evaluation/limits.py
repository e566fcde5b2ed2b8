"""What an evaluation can be seen to lack before anything is run: context for a prompt, memory for a batch."""

from __future__ import annotations

from collections.abc import Sequence

from deepen_ext.errors import InputError
from deepen_ext.measure.evaluation.jobs import Job
from deepen_ext.members.member import Member
from deepen_ext.members.memory import find_shortage


def check_contexts(job: Job, members: Sequence[Member]) -> None:
    """Check that every prompt with its new tokens fits the context of every member.

    No token has less than a byte, so most prompts need not be tokenised for that.

    Raises:
        InputError: a prompt does not fit.
    """
    for member in members:
        prefix, new = len(member.vocabulary.prefix_ids), job.task.max_new_tokens
        for item in job.items:
            if member.fits(prefix + len(item.prompt.encode()) + new):
                continue
            tokens = prefix + len(member.vocabulary.encode(item.prompt))
            if not member.fits(tokens + new):
                raise InputError(
                    f"{job.task.name}, item {item.index}: the prompt's {tokens} tokens of {member.name} and "
                    f"{new} new ones exceed its context of {member.context_length}; leave out the task, or "
                    "take another model"
                )


def check_memory(job: Job, groups: Sequence[Sequence[Member]], batch_size: int, texts: int = 1) -> None:
    """Check that the KV caches of each group of members fit the memory, for a batch of the longest prompt.

    Args:
        job: the task.
        groups: members whose caches are there at once.
        batch_size: texts that are written side by side.
        texts: how many are written for an item.

    Raises:
        InputError: they do not; the message says which batch size would.
    """
    longest = max(job.items, key=lambda item: len(item.prompt.encode()))
    prompts = min(batch_size, texts * len(job.items))
    for members in groups:
        vocabularies = [one.vocabulary for one in members]
        prompt = [len(one.prefix_ids) + len(one.encode(longest.prompt)) for one in vocabularies]
        lengths = [(one, own + job.task.max_new_tokens) for one, own in zip(members, prompt, strict=True)]
        if (short := find_shortage(prompts, lengths)) is None:
            continue
        fitting = next((n for n in range(prompts - 1, 0, -1) if find_shortage(n, lengths) is None), None)
        advice = "leave out the task"
        if fitting is not None:
            advice = f"choose a batch size of {fitting} or less (--batch-size)"
        most = max(prompt) + job.task.max_new_tokens
        raise InputError(
            f"{job.task.name}: {prompts} prompts at a time, with their new tokens up to {most} long, "
            f"{short}; {advice}"
        )
