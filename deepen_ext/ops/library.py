"""The operations as torch.library operators, `torch.ops.deepen_ext.*`.

torch.compile traces them by their fake kernels, CUDA graphs capture their launches. Importing this module,
which `deepen_ext.ops` does, registers them; their schemas are at its end.

Shapes and dtypes are those of the functions in `deepen_ext.ops`; lists have one entry for each member, and
dense relative rows have no `columns` and `rest`. The operators never wait for a device: a batch row that has
no result is reported in `status`, on the CPU too, and raises nothing. Ids and columns out of range are
InputErrors on the CPU and left out on CUDA, as in the functions. No operator has a derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepen_ext.errors import InputError
from deepen_ext.ops.checks import largest_entries
from deepen_ext.ops.fuse import FuseInput, fuse
from deepen_ext.ops.inverse_search import inverse_search
from deepen_ext.ops.relative_rows import Similarity
from deepen_ext.ops.relative_rows import launch as launch_relative_rows
from deepen_ext.ops.rows import RelativeRows
from deepen_ext.ops.topk_softmax import TopK, launch_many
from deepen_ext.ops.topk_softmax import launch as launch_topk_softmax

_Tensors = Sequence[torch.Tensor]
_Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_FourLists = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


def _register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = f"deepen_ext::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, ("cpu", "cuda"), kernel)
    torch.library.register_fake(name, fake)


def _topk_softmax_fake(logits: torch.Tensor, k: int) -> _Four:
    return largest_entries(logits.shape[0], k, logits.device)


def _topk_softmax_many(logits: _Tensors, k: int) -> _FourLists:
    return _turned(launch_many(logits, k, [f"logits {i}" for i in range(len(logits))]))


def _topk_softmax_many_fake(logits: _Tensors, k: int) -> _FourLists:
    return _turned([_topk_softmax_fake(one, min(k, one.shape[1])) for one in logits])


def _turned(found: Sequence[_Four]) -> _FourLists:
    """Each member's four results as four lists."""
    ids, probs, tails, status = ([one[i] for one in found] for i in range(4))
    return ids, probs, tails, status


def _inverse_search(
    logits: torch.Tensor,
    ids: torch.Tensor,
    tail_logit: torch.Tensor,
    target: torch.Tensor,
    columns: torch.Tensor | None,
    values: torch.Tensor,
    rest: torch.Tensor | None,
    anchors: int,
    learning_rate: float,
    steps: int,
) -> torch.Tensor:
    rows = RelativeRows(columns, values, rest, anchors)
    return inverse_search(logits, ids, tail_logit, target, rows, learning_rate=learning_rate, steps=steps)


def _fuse(
    logits: torch.Tensor,
    ids: _Tensors,
    probs: _Tensors,
    tails: _Tensors,
    columns: _Tensors,
    values: _Tensors,
    rest: _Tensors,
    anchors: int,
    weights: torch.Tensor,
    learning_rate: float,
    steps: int,
    min_probability: float,
    log_probs: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    lists = {"probs": probs, "tails": tails, "columns": columns, "values": values, "rest": rest}
    for name, given in lists.items():
        if len(given) != len(ids) and (given or name not in ("columns", "rest")):
            raise InputError(f"{name} has {len(given)} tensors for {len(ids)} members; give one for each")
    members = []
    for i, top in enumerate(zip(ids, probs, tails, strict=True)):
        rows = RelativeRows(columns[i] if columns else None, values[i], rest[i] if rest else None, anchors)
        members.append(FuseInput(TopK(*top, status=top[0]), rows))  # nobody looks at the status here
    return fuse(
        logits,
        members,
        weights,
        learning_rate=learning_rate,
        steps=steps,
        min_probability=min_probability,
        log_probs=log_probs,
    )


def _fuse_fake(logits: torch.Tensor, ids: _Tensors, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(ids[0], dtype=torch.float32),
        logits.new_empty(logits.shape[0], dtype=torch.int32),
    )


_register(
    "topk_softmax(Tensor logits, SymInt k) -> (Tensor ids, Tensor probs, Tensor tail, Tensor status)",
    launch_topk_softmax,
    _topk_softmax_fake,
)
_register(
    "topk_softmax_many(Tensor[] logits, SymInt k) -> "
    "(Tensor[] ids, Tensor[] probs, Tensor[] tails, Tensor[] status)",
    _topk_softmax_many,
    _topk_softmax_many_fake,
)
_register(
    "relative_rows(Tensor tokens, Tensor embedding, Tensor anchor_ids, Tensor anchor_inverse_norm, "
    "Tensor? mean, float temperature, bool normalise, SymInt entries)"
    " -> (Tensor columns, Tensor values, Tensor rest, Tensor status)",
    lambda tokens, *similarity: launch_relative_rows(tokens, Similarity(*similarity)),
    lambda tokens, *similarity: largest_entries(len(tokens), Similarity(*similarity).entries, tokens.device),
)
_register(
    "inverse_search(Tensor logits, Tensor ids, Tensor tail_logit, Tensor target, Tensor? columns, "
    "Tensor values, Tensor? rest, SymInt anchors, float learning_rate, int steps) -> Tensor",
    _inverse_search,
    lambda logits, *_: torch.empty_like(logits),
)
_register(
    "fuse(Tensor(a!) logits, Tensor[] ids, Tensor[] probs, Tensor[] tails, Tensor[] columns, "
    "Tensor[] values, Tensor[] rest, SymInt anchors, Tensor weights, float learning_rate, int steps, "
    "float min_probability, bool log_probs=True) -> (Tensor fused, Tensor chosen)",
    _fuse,
    _fuse_fake,
)
