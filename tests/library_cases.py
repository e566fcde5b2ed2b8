"""Calls of the registered operators, for tests on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from oracle import random_embedding, random_logits, similarity_rows

from deepen_ext import RelativeMap
from deepen_ext.ops import topk_softmax
from deepen_ext.space.row_sources import SimilarityRows

VOCABS, ANCHORS, K = (400, 520), 120, 40


def chooser(rows: int, vocab_size: int, device: str = "cpu", **settings: Any) -> Callable[..., torch.Tensor]:
    """A `Chooser` of rows without prompts: scores [rows, V] and their argmax, if known -> tokens [rows]."""
    # Here, since they take seconds to import and most of these cases do without.
    from transformers import LlamaConfig, LlamaForCausalLM

    from deepen_ext.decoding.sampler import Chooser
    from deepen_ext.decoding.settings import Settings

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    main = SimpleNamespace(model=LlamaForCausalLM(config), vocab_size=vocab_size, eos_ids=(2,))
    made = Chooser(Settings.read(main, **settings), [[1]] * rows, device)
    return lambda scores, chosen=None: made.choose(scores, range(rows), [[1]] * rows, chosen)


def maps(device: str, *, dense: bool = False) -> list[RelativeMap]:
    made = []
    for i, vocab in enumerate(VOCABS):
        embedding = random_embedding(vocab, 16 + 5 * i, seed=i)
        ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(i))[:ANCHORS]
        if dense:
            whole = similarity_rows(embedding, ids, recipe="calibrated", temperature=20)
            made.append(RelativeMap.from_dense(whole.float().to(device)))
        else:
            made.append(RelativeMap.from_embedding(embedding, ids, temperature=20, entries=9).to(device))
            made[-1].fill()
    return made


def _logits(device: str, batch: int = 3) -> list[torch.Tensor]:
    return [random_logits(batch, vocab, seed=i).to(device) for i, vocab in enumerate(VOCABS)]


def _rows(device: str, dense: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    rows = [one.rows for one in maps(device, dense=dense)]
    columns = [one.columns for one in rows if one.columns is not None]
    return columns, [one.values for one in rows], [one.rest for one in rows if one.rest is not None]


def _topk_case(dtype: torch.dtype) -> Callable[[str], tuple[Any, tuple[Any, ...]]]:
    return lambda device: (
        torch.ops.deepen_ext.topk_softmax.default,
        (_logits(device)[0].to(dtype), K),
    )


def _topk_many_case(device: str) -> tuple[Any, tuple[Any, ...]]:
    return torch.ops.deepen_ext.topk_softmax_many.default, (_logits(device), VOCABS[0] + 20)


def _relative_rows_case(recipe: str) -> Callable[[str], tuple[Any, tuple[Any, ...]]]:
    def case(device: str) -> tuple[Any, tuple[Any, ...]]:
        embedding = random_embedding(90, 24, seed=1).to(device)
        source = SimilarityRows(embedding, torch.arange(0, 90, 2), recipe=recipe, entries=7)
        tokens = torch.arange(5, device=device)
        return torch.ops.deepen_ext.relative_rows.default, (tokens, *source.similarity)

    return case


def _search_case(dense: bool) -> Callable[[str], tuple[Any, tuple[Any, ...]]]:
    def case(device: str) -> tuple[Any, tuple[Any, ...]]:
        columns, values, rest = _rows(device, dense)
        top = topk_softmax(_logits(device)[0], K)
        target = torch.softmax(torch.randn(3, ANCHORS, generator=torch.Generator().manual_seed(0)), 1)
        sparse = (columns[0], values[0], rest[0]) if columns else (None, values[0], None)
        arguments = (top.probs.log(), top.ids, top.tail.log(), target.to(device), *sparse, ANCHORS, 0.2, 5)
        return torch.ops.deepen_ext.inverse_search.default, arguments

    return case


def _fuse_case(dense: bool) -> Callable[[str], tuple[Any, tuple[Any, ...]]]:
    def case(device: str) -> tuple[Any, tuple[Any, ...]]:
        logits = _logits(device)
        tops = [topk_softmax(one, K) for one in logits]
        lists = ([one.ids for one in tops], [one.probs for one in tops], [one.tail for one in tops])
        weights = torch.full((3, 2), 0.5, device=device)
        arguments = (logits[0], *lists, *_rows(device, dense), ANCHORS, weights, 0.2, 5, 1e-3, dense)
        return torch.ops.deepen_ext.fuse.default, arguments

    return case


CASES = {
    "topk_softmax float32": _topk_case(torch.float32),
    "topk_softmax bfloat16": _topk_case(torch.bfloat16),
    "topk_softmax_many": _topk_many_case,
    "relative_rows calibrated": _relative_rows_case("calibrated"),
    "relative_rows paper": _relative_rows_case("paper"),
    "inverse_search sparse": _search_case(False),
    "inverse_search dense": _search_case(True),
    "fuse sparse": _fuse_case(False),
    "fuse dense": _fuse_case(True),
}


def step_arguments(arguments: tuple[Any, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    """The arguments with every tensor, also in lists, changed."""
    found: list[Any] = []
    for one in arguments:
        if isinstance(one, torch.Tensor):
            found.append(change(one))
        elif isinstance(one, list):
            found.append([change(each) for each in one])
        else:
            found.append(one)
    return found


def compiled_step(device: str, *, dense: bool) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """A whole fusion step of the registered operators, and logits for it."""
    columns, values, rest = _rows(device, dense)
    weights = torch.full((3, 2), 0.5, device=device)

    def step(main: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, probs, tails, _ = torch.ops.deepen_ext.topk_softmax_many([main, other], K)
        fused = main.clone()
        _, chosen = torch.ops.deepen_ext.fuse(
            fused, ids, probs, tails, columns, values, rest, ANCHORS, weights, 0.2, 5, 1e-3
        )
        return fused, chosen

    return step, _logits(device)
