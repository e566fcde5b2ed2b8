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

# Below every logit of a model, so never chosen and never drawn; finite, so that an end of text is still there
# for a caller whose processors allow nothing else.
_LAST = -1e4


def without_lone_end(step: FusedStep, rows: Sequence[int], members: Sequence[Member]) -> FusedStep:
    """Put the ends of text last, in the rows where a member that has a say would write something.

    What a member would do is its most probable token. Nothing waits for the device.

    Args:
        step: of B rows.
        rows: which of them are first tokens of texts.
        members: the main model first.
    """
    at = {row: i for i, row in enumerate(step.fused_rows)}
    rows = [row for row in rows if row in at]
    if step.weights is None or not rows or not members[0].eos_ids:
        return step
    device = step.logits.device
    says = step.weights[to_device([at[row] for row in rows], device)] > 0
    writes = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for column, part in enumerate(step.parts):
        own = {row: i for i, row in enumerate(part.rows)}
        places = to_device([own.get(row, 0) for row in rows], device)  # a row without it has a weight of 0
        ends = to_device(members[part.member].eos_ids, device)
        writes |= says[:, column] & ~torch.isin(part.topk.ids[places, 0].long(), ends)
    there = to_device(rows, device)
    first = step.logits[there]
    last = torch.zeros(first.shape[1], dtype=torch.bool, device=device)
    last[to_device(members[0].eos_ids, device)] = True
    first = first.masked_fill(writes[:, None] & last, _LAST)
    return replace(
        step,
        logits=step.logits.index_copy(0, there, first),
        chosen=step.chosen.index_copy(0, there, launch(first, 1).ids[:, 0]),
    )
