"""Log-probabilities of tokens and of the candidates beside them, for those who ask."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch

from deepen_ext.decoding.prompts import Prompt
from deepen_ext.decoding.team import Team
from deepen_ext.errors import InputError
from deepen_ext.members.distribution import select
from deepen_ext.serving.requests import Candidate, Prompted, Scored


def scored(
    logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
) -> list[Scored | None]:
    """What the distributions say of some tokens, and of the most probable ones.

    Args:
        logits: [n, V], in any float dtype.
        rows: of each token, its row there.
        tokens: ids.
        tops: of each token, how many candidates are wanted; 0 for nothing at all.
    """
    wanted = [i for i, top in enumerate(tops) if top]
    found: list[Scored | None] = [None] * len(tokens)
    if not wanted:
        return found
    known = select(logits, [rows[i] for i in wanted]).float()
    logprobs = known - known.logsumexp(-1, keepdim=True)
    best = logprobs.topk(min(max(tops), logprobs.shape[1]), dim=-1)
    own = logprobs.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=logprobs.device))
    values, ids, owns = best.values.tolist(), best.indices.tolist(), own[:, 0].tolist()
    for at, i in enumerate(wanted):
        top = zip(ids[at][: tops[i]], values[at][: tops[i]], strict=True)
        found[i] = Scored(owns[at], tuple(Candidate(token, logprob) for token, logprob in top))
    return found


def read_prompt(team: Team, prompt: Prompt, top: int) -> Prompted:
    """Read a prompt through a member alone, and score every token of it but the first.

    Raises:
        InputError: the team has several members: what they would say together of a text that is there
            already, `deepen-ext nll` tells.
        ModelError: the forward pass failed.
    """
    if len(team.members) > 1:
        raise InputError(
            "log-probabilities of the prompt's tokens are given of a member alone; "
            "name one of them as the model, or leave echo with logprobs out"
        )
    ids, found = list(prompt.main_ids), []
    if len(ids) > 1:
        with closing(team.main.backend.open(1, len(ids))) as session:
            at = 1
            for block in session.read(0, ids[:-1], 0, top):
                logits, count = block.scores(), len(block)
                following = ids[at : at + count]
                found += scored(logits, range(count), following, [top] * count)
                at += count
                del block, logits  # or they would stay beside the next block's
    return Prompted(tuple(ids), tuple(one for one in found if one is not None))
