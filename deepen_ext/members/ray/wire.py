"""What a call to a member's actor carries: one buffer of int32 there, one back.

A request, n lanes with m new ids in all (4 bytes a number, 12 + 16 n + 4 m bytes):

    session, k, n;  n times: lane, kept, count, positions;  m ids

`kept` is how many ids the lane's text shares with the one before it, `count` how many follow. A reply, n
positions of k tokens (8 + 8 n + 8 n k bytes; 1,040 for one position with k = 128):

    n, k;  ids [n, k];  float32 bits of the probabilities [n, k] and of the tail [n];  status [n]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from deepen_ext.ops.topk_softmax import TopK


class NewIds(NamedTuple):
    """What a lane's text becomes: of the one before it the first `kept` ids, then these."""

    lane: int
    kept: int
    ids: Sequence[int]
    positions: int


class Request(NamedTuple):
    """See the module."""

    session: int
    k: int
    texts: Sequence[NewIds]


def pack_request(request: Request) -> bytes:
    """The request's bytes."""
    numbers = [request.session, request.k, len(request.texts)]
    for one in request.texts:
        numbers += (one.lane, one.kept, len(one.ids), one.positions)
    for one in request.texts:
        numbers += one.ids
    return np.array(numbers, np.int32).tobytes()


def unpack_request(data: bytes) -> Request:
    """The request of these bytes."""
    numbers = np.frombuffer(data, np.int32).tolist()
    session, k, lanes = numbers[:3]
    at = 3 + 4 * lanes
    texts = []
    for start in range(3, at, 4):
        lane, kept, count, positions = numbers[start : start + 4]
        texts.append(NewIds(lane, kept, numbers[at : at + count], positions))
        at += count
    return Request(session, k, texts)


def pack_reply(top: TopK) -> bytes:
    """The reply's bytes. From a device it is copied once."""
    ids, probs, tail, status = top
    shape = torch.tensor(ids.shape, dtype=torch.int32, device=ids.device)
    parts = [shape, ids, probs.view(torch.int32), tail.view(torch.int32), status]
    return torch.cat([one.reshape(-1) for one in parts]).cpu().numpy().tobytes()


def unpack_reply(data: bytes) -> TopK:
    """The top-k of these bytes, on the CPU."""
    numbers = torch.from_numpy(np.frombuffer(data, np.int32).copy())
    n, k = numbers[:2].tolist()
    ids, probs, tail, status = torch.split(numbers[2:], [n * k, n * k, n, n])
    return TopK(ids.view(n, k), probs.view(torch.float32).view(n, k), tail.view(torch.float32), status)
