"""The operations from Python: anything may be wrong with the arguments; the answer is an InputError, or what
the same numbers in ordinary tensors give."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from counting import counted
from oracle import random_embedding, random_logits

from deepen_ext import InputError
from deepen_ext.ops import (
    FuseInput,
    RelativeRows,
    Similarity,
    TopK,
    fuse,
    inverse_search,
    relative_rows,
    topk_softmax,
    topk_softmax_many,
)

Arguments = dict[str, Any]


def rows_of(vocab: int, anchors: int, chance: random.Random) -> RelativeRows:
    seed = chance.randrange(1000)
    dense = torch.softmax(4 * torch.randn(vocab, anchors, generator=torch.Generator().manual_seed(seed)), 1)
    if chance.random() < 0.3:
        return RelativeRows(None, dense, None, anchors)
    top = dense.topk(chance.randint(1, anchors), dim=1)
    return RelativeRows(top.indices.int(), top.values, (1 - top.values.sum(1)).clamp(min=0), anchors)


def for_topk(chance: random.Random) -> Arguments:
    vocab = chance.choice([1, 7, 30, 3000])
    logits = random_logits(chance.randint(0, 3), vocab, chance.randrange(99))
    dtype = chance.choice([torch.float32, torch.float16, torch.bfloat16])
    return {"logits": logits.to(dtype), "k": chance.randint(1, vocab)}


def for_many(chance: random.Random) -> Arguments:
    found = [for_topk(chance)["logits"] for _ in range(chance.randint(1, 3))]
    return {f"logits{i}": one for i, one in enumerate(found)} | {"k": chance.randint(1, 40)}


def for_rows(chance: random.Random) -> Arguments:
    vocab, anchors, dim = chance.randint(2, 40), chance.randint(1, 30), chance.randint(1, 20)
    embedding = random_embedding(vocab, dim, chance.randrange(99))
    ids = torch.randint(vocab, (anchors,))
    return {
        "tokens": torch.randint(vocab, (chance.randint(0, 4),)),
        "embedding": embedding.to(chance.choice([torch.float32, torch.float16, torch.bfloat16])),
        "anchor_ids": ids,
        "anchor_inverse_norm": 1 / embedding[ids].norm(dim=1),
        "mean": chance.choice([None, embedding.mean(0)]),
        "temperature": 20.0,
        "normalise": chance.random() < 0.5,
        "entries": chance.randint(1, anchors),
    }


def for_search(chance: random.Random) -> Arguments:
    vocab, anchors, batch = chance.randint(1, 30), chance.randint(1, 25), chance.randint(0, 4)
    candidates = chance.randint(1, vocab)
    rows = rows_of(vocab, anchors, chance)
    return {
        "logits": torch.randn(batch, candidates),
        "ids": torch.stack([torch.randperm(vocab)[:candidates] for _ in range(batch)]).int()
        if batch
        else torch.empty(0, candidates, dtype=torch.int32),
        "tail_logit": torch.randn(batch),
        "target": torch.randn(batch, anchors).softmax(1),
        **rows._asdict(),
        "learning_rate": 0.15,
        "steps": chance.randint(0, 6),
    }


def for_fuse(chance: random.Random) -> Arguments:
    anchors, batch, count = chance.randint(1, 25), chance.randint(0, 4), chance.randint(1, 3)
    found: Arguments = {}
    dense = None
    for i in range(count):
        vocab = chance.randint(1, 30)
        logits = random_logits(batch, vocab, chance.randrange(99))
        rows = rows_of(vocab, anchors, chance)
        dense = rows.columns is None if dense is None else dense
        if dense != (rows.columns is None):
            weights = torch.full((vocab, anchors), 1 / anchors)
            none, columns = torch.zeros(vocab), torch.arange(anchors, dtype=torch.int32).repeat(vocab, 1)
            rows = RelativeRows(None if dense else columns, weights, None if dense else none, anchors)
        top = topk_softmax(logits, chance.randint(1, vocab))
        found |= {f"{name}{i}": one for name, one in (rows._asdict() | top._asdict()).items()}
        del found[f"status{i}"]  # fuse does not look at it
        if i == 0:
            found["logits"] = logits
    weights = torch.rand(batch, count).softmax(1)
    return found | {
        "weights": weights,
        "learning_rate": 0.15,
        "steps": 3,
        "min_probability": 1e-4,
        "log_probs": True,
    }


def run_topk(given: Arguments) -> Any:
    return tuple(topk_softmax(given["logits"], given["k"]))


def run_many(given: Arguments) -> Any:
    logits = [one for name, one in given.items() if name.startswith("logits")]
    return tuple(part for one in topk_softmax_many(logits, given["k"]) for part in one)


def run_rows(given: Arguments) -> Any:
    names = Similarity._fields
    return relative_rows(given["tokens"], Similarity(*(given[name] for name in names)))


def run_search(given: Arguments) -> Any:
    rows = RelativeRows(*(given[name] for name in RelativeRows._fields))
    more = {name: one for name, one in given.items() if name not in RelativeRows._fields}
    return (inverse_search(**more, rows=rows),)


def run_fuse(given: Arguments) -> Any:
    members = []
    for i in range(3):
        if f"ids{i}" in given:
            top = TopK(*(given.get(f"{name}{i}") for name in TopK._fields))
            members.append(FuseInput(top, RelativeRows(*(given[f"{n}{i}"] for n in RelativeRows._fields))))
    more = {name: given[name] for name in ("learning_rate", "steps", "min_probability", "log_probs")}
    logits = given["logits"]
    return (*fuse(logits, members, given["weights"], **more), logits)


CASES: dict[str, tuple[Callable[[random.Random], Arguments], Callable[[Arguments], Any]]] = {
    "topk_softmax": (for_topk, run_topk),
    "topk_softmax_many": (for_many, run_many),
    "relative_rows": (for_rows, run_rows),
    "inverse_search": (for_search, run_search),
    "fuse": (for_fuse, run_fuse),
}


def broken_tensor(one: torch.Tensor, chance: random.Random) -> Any:
    """Something else about a tensor: often wrong, sometimes the same numbers in an unusual tensor."""
    kinds: list[Callable[[], Any]] = [
        lambda: one.to(chance.choice([torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64])),
        lambda: one[..., None],
        lambda: one.flatten(),
        lambda: one.sum(),
        lambda: one.repeat(*[2] * one.dim())[tuple(slice(size) for size in one.shape)],  # strides of a slice
        lambda: torch.empty(one.numel() + 1, dtype=one.dtype)[1:].view(one.shape).copy_(one),  # an odd offset
        lambda: one.t() if one.dim() == 2 else one.flip(0),
        lambda: one[:1].expand(one.shape) if len(one) > 0 else one,
        lambda: one.new_zeros(()).expand(2**40, 2**20) if one.dim() == 2 else one.new_zeros(()).expand(2**60),
        lambda: one.new_empty(0, 2**61) if one.dim() == 2 else one[:0],
        lambda: one.to("meta"),
        lambda: one.to_sparse(),
        lambda: one.clone().requires_grad_() if one.is_floating_point() else one,
        lambda: torch.nn.Parameter(one.clone(), requires_grad=False),
        lambda: torch._neg_view(one) if one.is_floating_point() else one,
        lambda: one.tolist(),
        lambda: one.numpy() if one.dtype != torch.bfloat16 else None,
        lambda: None,
        lambda: freed(one),
        lambda: filled(one, chance),
        lambda: one[:, :-1] if one.dim() == 2 else one[:-1],
    ]
    return chance.choice(kinds)()


def freed(one: torch.Tensor) -> torch.Tensor:
    copy = one.clone()
    copy.untyped_storage().resize_(0)
    return copy


def is_freed(one: Any) -> bool:
    strided = isinstance(one, torch.Tensor) and one.layout is torch.strided and one.device.type == "cpu"
    return strided and one.numel() > 0 and one.untyped_storage().nbytes() == 0


def filled(one: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """One number, or all of them, is a hostile one."""
    copy = one.clone()
    if one.is_floating_point():
        largest = torch.finfo(one.dtype).max
        number: Any = chance.choice([math.nan, math.inf, -math.inf, largest, 1e-40, -1.0, 0.0])
    else:
        number = chance.choice([-1, -(2**31), 2**31 - 1, 10**6])
    if chance.random() < 0.5 or copy.numel() == 0:
        return copy.fill_(number)
    copy.view(-1)[chance.randrange(copy.numel())] = number
    return copy


def broken_number(one: Any, chance: random.Random) -> Any:
    wrong = [0, -1, 2**31, 2**63, 10**30, 10**400, 1.5, float("nan"), float("inf"), -0.0, 1e-320, True]
    wrong += ["2", None, [], torch.tensor(2), torch.tensor([1.0, 2.0]), np.int64(2), np.float32(0.5), 2 + 3j]
    return chance.choice([*wrong, one])


def ordinary(one: Any) -> Any:
    """The same numbers in an ordinary tensor."""
    if not isinstance(one, torch.Tensor) or one.dim() == 0:
        return one
    return one.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("name", CASES)
def test_whatever_is_wrong_is_an_input_error(name: str) -> None:
    make, run = CASES[name]
    seen = {"refused": 0, "right": 0}
    with counted(f"python {name}", 200) as seeds:
        for seed in seeds:
            chance = random.Random(seed)
            torch.manual_seed(seed)
            given = make(chance)
            for which in chance.sample(list(given), chance.choice([0, 1, 1, 1, 2])):
                one = given[which]
                broken = broken_tensor if isinstance(one, torch.Tensor) else broken_number
                given[which] = broken(one, chance)
            try:
                same = None
                if not any(map(is_freed, given.values())):
                    same = {which: ordinary(one) for which, one in given.items()}
            except (RuntimeError, TypeError, NotImplementedError):
                same = None  # too large
            try:
                found = run(given)
            except InputError:
                seen["refused"] += 1
                continue
            except Exception as error:
                kinds = {
                    n: (one.shape, one.dtype) if isinstance(one, torch.Tensor) else one
                    for n, one in given.items()
                }
                raise AssertionError(f"{name}, seed {seed}: {kinds}") from error
            assert same is not None, f"{name}, seed {seed}"
            for ours, theirs in zip(found, run(same), strict=True):
                assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), f"{name}, seed {seed}"
            seen["right"] += 1
    assert min(seen.values()) > 0.1 * len(seeds), seen
