"""What an evaluation can be seen to lack before anything is run: a fitting fuser, context, memory."""

from __future__ import annotations

from collections.abc import Sequence

from deepen_ext.errors import InputError
from deepen_ext.fusers import Fuser
from deepen_ext.fusers.spans import NO_DISTRIBUTION
from deepen_ext.measure.evaluation.jobs import Job
from deepen_ext.measure.evaluation.votes import Votes
from deepen_ext.members.member import Member
from deepen_ext.members.memory import find_shortage


def check_fuser(kind: type[Fuser], by_likelihood: bool, votes: Votes | None) -> None:
    """Check that a fuser can answer: by likelihood, by one greedy text, or by sampled texts that vote.

    Raises:
        InputError: it cannot.
    """
    if by_likelihood:
        if kind.spans:
            raise InputError(NO_DISTRIBUTION)
        return
    if kind.draws and votes is None:
        raise InputError(
            f"fuser='{kind.name}' is a way to sample, and one text an item is written greedily; give votes=2 "
            "or more (--votes), or use fuser='union-vocab', whose average it samples from"
        )
    if kind.spans and votes is not None:
        raise InputError(
            f"fuser='{kind.name}' writes the most probable words, and texts that vote are sampled; leave out "
            "votes (--votes), or use another fuser"
        )


def check_contexts(job: Job, members: Sequence[Member]) -> None:
    """Check that every prompt with its choices or new tokens fits the context of every member.

    No token has less than a byte, so most prompts need not be tokenised for that.

    Raises:
        InputError: a prompt does not fit.
    """
    for member in members:
        prefix, new = len(member.vocabulary.prefix_ids), job.task.max_new_tokens
        for item in job.items:
            if member.fits(prefix + len(item.to_read.encode()) + new):
                continue
            tokens = prefix + len(member.vocabulary.encode(item.to_read))
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
    longest = max((item.to_read for item in job.items), key=lambda text: len(text.encode()))
    new = job.task.max_new_tokens
    # A text that is scored takes a lane, and its other endings a second one, whatever the batch size.
    lanes = min(batch_size, texts * len(job.items)) if new else 2
    for members in groups:
        vocabularies = [one.vocabulary for one in members]
        prompt = [len(one.prefix_ids) + len(one.encode(longest)) for one in vocabularies]
        lengths = [(one, own + new) for one, own in zip(members, prompt, strict=True)]
        if (short := find_shortage(lanes, lengths)) is None:
            continue
        fewer = range(lanes - 1, 0, -1) if new else ()
        fitting = next((n for n in fewer if find_shortage(n, lengths) is None), None)
        advice = "leave out the task"
        if fitting is not None:
            advice = f"choose a batch size of {fitting} or less (--batch-size)"
        what = f"{lanes} prompts at a time, with their new tokens" if new else "a prompt with a choice,"
        raise InputError(f"{job.task.name}: {what} up to {max(prompt) + new} long, {short}; {advice}")
