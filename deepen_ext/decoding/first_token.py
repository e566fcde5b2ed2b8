"""A text does not end before it has begun, unless every member that has a say would end it there.

A chat model given a prompt without a chat template often ends it at once. Were its end of text only one token
among others, the whole ensemble would give an empty text, however ready the other members are to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from deepen_ext.fusers import FusedStep
from deepen_ext.members.member import Member
from deepen_ext.ops.topk_softmax import launch
from deepen_ext.ops.transfer import to_device

# Below the largest logit by more than any model's are apart, so never chosen and never drawn; finite, so that
# an end of text is still there where processors of the caller's, which come later, allow nothing else.
_LAST = -1e4


def put_ends_last(step: FusedStep, firsts: Sequence[int], members: Sequence[Member]) -> FusedStep:
    """The step with ends of text put last, in rows where a member that has a say would write something.

    What a member would do is its most probable token. Nothing waits for the device.

    Args:
        step: of B rows; its logits are written in place.
        firsts: rows that are first tokens of texts.
        members: the main model first.
    """
    at = {row: i for i, row in enumerate(step.fused_rows)}
    rows = [row for row in firsts if row in at]
    ends = members[0].eos_ids
    if step.weights is None or not rows or not ends:
        return step
    device = step.logits.device
    has_say = step.weights[to_device([at[row] for row in rows], device)] > 0
    goes_on = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for column, part in enumerate(step.parts):
        own = {row: i for i, row in enumerate(part.rows)}
        places = to_device([own.get(row, 0) for row in rows], device)  # a row without it has a weight of 0
        would = part.topk.ids[places, 0].long()
        goes_on |= has_say[:, column] & ~torch.isin(would, _without_text(members[part.member], device))
    there = to_device(rows, device)
    first = step.logits[there]
    last = first.clone()
    lowest = torch.finfo(first.dtype).min
    last[:, to_device(ends, device)] = (first.amax(dim=1, keepdim=True) + _LAST).clamp(min=lowest)
    # What is forbidden already, -inf, stays so.
    first = torch.where(goes_on[:, None], torch.minimum(first, last), first)
    step.logits.index_copy_(0, there, first)
    return replace(step, chosen=step.chosen.index_copy(0, there, launch(first, 1).ids[:, 0]))


def _without_text(member: Member, device: torch.device) -> torch.Tensor:
    """A member's ends of text, and tokens that nobody writes, int64 [n]."""
    return torch.cat([member.unwritable().to(device), to_device(member.eos_ids, device)])
